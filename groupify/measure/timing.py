"""Timing several callables against each other in one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_BURST_SECONDS = 0.03
_MIN_ROUNDS = 5
_MAX_BURST = 50
# The percentile of runs that is taken where nothing is timed beside them: on a busy machine more than half
# of them may have been interrupted.
UNDISTURBED = 25


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one callable, in milliseconds."""

    runs_ms: tuple[float, ...]
    rounds_ms: tuple[float, ...]  # the median of each round; round k of two callables ran side by side

    @property
    def median_ms(self) -> float:
        """The median over all runs."""
        return statistics.median(self.runs_ms)

    @property
    def p10_ms(self) -> float:
        """The time that one run in ten stays under."""
        return percentile(self.runs_ms, 10)

    @property
    def p90_ms(self) -> float:
        """The time that nine runs in ten stay under."""
        return percentile(self.runs_ms, 90)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile by linear interpolation; ``values`` must not be empty."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def time_interleaved(callables: Mapping[str, Callable[[], object]], *, seconds: float) -> dict[str, Timing]:
    """Time callables in turns, so that a change of the machine's speed hits all of them alike.

    Each round gives every callable one unmeasured call, which refills the caches that the others emptied,
    and then a short burst of measured ones. The order of the callables turns from round to round.

    Args:
        callables: what to time, by name.
        seconds: about how long to measure in all; at least five rounds are run whatever it takes.
    """
    bursts = {name: _burst_length(function) for name, function in callables.items()}
    runs: dict[str, list[float]] = {name: [] for name in callables}
    rounds: dict[str, list[float]] = {name: [] for name in callables}
    names = list(callables)
    deadline = time.perf_counter() + seconds
    turn = 0
    while turn < _MIN_ROUNDS or time.perf_counter() < deadline:
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            function = callables[name]
            function()
            burst = [_run_ms(function) for _ in range(bursts[name])]
            runs[name].extend(burst)
            rounds[name].append(statistics.median(burst))
        turn += 1
    return {name: Timing(tuple(runs[name]), tuple(rounds[name])) for name in names}


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """Return how many times longer ``numerator`` takes: the median of the ratios round by round."""
    pairs = zip(numerator.rounds_ms, denominator.rounds_ms, strict=True)
    return statistics.median(long / short for long, short in pairs)


def _burst_length(function: Callable[[], object]) -> int:
    function()
    estimate = min(_run_ms(function) for _ in range(2))
    return max(1, min(_MAX_BURST, round(_BURST_SECONDS * 1000 / max(estimate, 1e-3))))


def _run_ms(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000
