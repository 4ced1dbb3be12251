"""The range of each activation that int8 loses least with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from groupify.onnx.exposed import activations, exposing
from groupify.onnx.runtime import Array

Feed = Mapping[str, Array]
Range = tuple[float, float]

_BINS = 2048
_CLIPPINGS = np.linspace(0.2, 1.0, 81)  # of the largest absolute value
_SAMPLE = 2**18  # values of one tensor and batch that a histogram gets at most
_STEPS = 255  # of uint8


def best_ranges(model: onnx.ModelProto, batches: Sequence[Feed]) -> dict[str, Range]:
    """Return, for each float32 activation, the range with the least mean squared error of uint8 in it.

    It holds zero, and is that of minimum and maximum unless clipping what is rare pays in finer steps. What
    the model hands out is never clipped: the peaks of a map are what it says.

    Args:
        model: a float model.
        batches: what it is fed.
    """
    names = activations(model.graph)
    with exposing(model, names) as session:
        outputs = [output.name for output in session.get_outputs()]
        extremes: dict[str, Range] = {}
        for values in _runs(session, outputs, batches):
            for name, value in values.items():
                low, high = extremes.get(name, (0.0, 0.0))
                extremes[name] = min(low, float(value.min())), max(high, float(value.max()))
        handed_out = {output.name for output in model.graph.output}
        histograms = {
            name: Histogram(*found)
            for name, found in extremes.items()
            if found[0] < found[1] and name not in handed_out
        }
        for values in _runs(session, outputs, batches):
            for name in values.keys() & histograms.keys():
                histograms[name].add(values[name])
    flat = {name: found for name, found in extremes.items() if name not in histograms}
    return {**flat, **{name: histogram.best_range() for name, histogram in histograms.items()}}


def _runs(session: Any, names: Sequence[str], batches: Sequence[Feed]) -> Iterator[dict[str, Array]]:
    """The float32 values that are not empty, batch by batch, the inputs among them."""
    for batch in batches:
        values = {**batch, **dict(zip(names, session.run(names, dict(batch)), strict=True))}
        yield {name: value for name, value in values.items() if value.dtype == np.float32 and value.size > 0}


@dataclass(frozen=True)
class Histogram:
    """How often a tensor's values occur.

    Attributes:
        low, high: the smallest and the largest value, zero counted in; unequal.
        counts: of bins of equal width between them; ``add`` changes them.
    """

    low: float
    high: float
    counts: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(_BINS))

    def add(self, values: Array) -> None:
        """Count values, or a part of them, evenly spread, where there are many."""
        sample = values.reshape(-1)[:: max(1, values.size // _SAMPLE)]
        self.counts[:] += np.histogram(sample, len(self.counts), (self.low, self.high))[0]

    def best_range(self) -> Range:
        """Return the range, clipped at one absolute value on both sides, with the least squared error."""
        largest = max(-self.low, self.high)
        limits = [float(share) * largest for share in reversed(_CLIPPINGS)]
        ranges = [(max(self.low, -limit), min(self.high, limit)) for limit in limits]
        return min(ranges, key=lambda found: self._squared_error(*found))

    def _squared_error(self, low: float, high: float) -> float:
        width = (self.high - self.low) / len(self.counts)
        centres = self.low + width * (np.arange(len(self.counts)) + 0.5)
        beyond = np.maximum(low - centres, centres - high).clip(min=0)
        rounding = ((high - low) / _STEPS) ** 2 / 12  # of values spread evenly over a step
        return float(self.counts @ np.where(beyond > 0, beyond**2, rounding))
