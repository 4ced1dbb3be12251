"""Outputs of a PyTorch model next to those of an ONNX file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from groupify.graph.forward import evaluating

Array = npt.NDArray[np.float32]


def reference_outputs(model: nn.Module, batch: Tensor) -> dict[str, Array]:
    """Run the model in evaluation mode; outputs by position, as float32 arrays."""
    parameter = next(model.parameters(), None)
    with evaluating(model), torch.no_grad():
        outputs = model(batch if parameter is None else batch.to(parameter.device))
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return {str(index): value.float().cpu().numpy() for index, value in enumerate(values)}


@dataclass(frozen=True)
class Comparison:
    """The largest differences between two runs of one batch."""

    absolute: float
    relative: float
    scaled: float  # of the largest output or 1e-3: outputs near zero are not held to their own scale
    agreeing: int
    decided: int

    def within(self, tolerance: float) -> bool:
        """Whether the difference is allowed; a NaN on either side never is."""
        return self.scaled <= tolerance


def scale_of(reference: Array) -> float:
    """Return what a difference is measured against: the largest absolute value, or 1e-3 if that is less."""
    return max(1e-3, float(np.max(np.abs(reference), initial=0.0)))


def compare_outputs(expected: Mapping[str, Array], actual: Sequence[Array]) -> Comparison:
    """Compare outputs one by one; shapes that differ are NaN apart."""
    absolute = relative = scaled = 0.0
    agreeing = decided = 0
    for reference, output in zip(expected.values(), actual, strict=True):
        if reference.shape != output.shape:
            return Comparison(math.nan, math.nan, math.nan, 0, 1)
        difference = float(np.max(np.abs(reference - output), initial=0.0))
        largest = float(np.max(np.abs(reference), initial=0.0))
        ratio = difference / largest if largest > 0 else difference
        share = difference / scale_of(reference)
        # np.maximum, unlike max, keeps a NaN, which no tolerance admits.
        absolute = float(np.maximum(absolute, difference))
        relative = float(np.maximum(relative, ratio))
        scaled = float(np.maximum(scaled, share))
        if reference.ndim >= 2 and reference.shape[1] > 1:
            agreeing += int(np.sum(reference.argmax(1) == output.argmax(1)))
            decided += reference.size // reference.shape[1]
    return Comparison(absolute, relative, scaled, agreeing, decided)
