"""Outputs of a student against its teacher's: relative errors, image by image, each output by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from groupify.devices import double
from groupify.errors import DataError
from groupify.graph.forward import output_tensors


def float_outputs(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors among a model's outputs."""
    return [values for values in output_tensors(outputs) if values.is_floating_point()]


def relative_errors(ours: Sequence[Tensor], theirs: Sequence[Tensor], variances: Sequence[float]) -> Tensor:
    """Return the relative error of each image's outputs, shape (n,): the mean over the outputs.

    Its mean over the images that the variances are of is the error by which plans are judged.

    Args:
        ours, theirs: the student's and the teacher's outputs, each of shape (n, …).
        variances: of the teacher's outputs, what squared errors are divided by.

    Raises:
        DataError: outputs of other shapes, or none.
    """
    if [values.shape for values in ours] != [values.shape for values in theirs] or not ours:
        own, other = (
            ", ".join(str(tuple(values.shape)) for values in some) or "none" for some in (ours, theirs)
        )
        raise DataError(
            f"the student's floating-point outputs are {own}, its teacher's {other}: outputs are learned "
            "from a teacher where both give the same ones, in training mode too; else give a loss of your own"
        )
    errors = [
        _by_image((mine.float() - right.to(mine.device).float()).square(), len(ours[0])) / variance
        for mine, right, variance in zip(ours, theirs, variances, strict=True)
    ]
    return torch.stack(errors).mean(0)


def _by_image(values: Tensor, count: int) -> Tensor:
    if values.dim() and len(values) == count:
        return values.reshape(count, -1).mean(1)
    return values.mean().expand(count)  # one for the whole batch


class Spread:
    """The variance of each of a model's outputs, over batches."""

    def __init__(self) -> None:
        self._sums: list[tuple[float, float, float]] = []

    def add(self, outputs: Sequence[Tensor]) -> None:
        """Take in the outputs for a batch."""
        found = [double(values.detach()) for values in outputs]
        before = self._sums or [(0.0, 0.0, 0.0)] * len(found)
        self._sums = [
            (count + values.numel(), total + float(values.sum()), squares + float(values.square().sum()))
            for (count, total, squares), values in zip(before, found, strict=True)
        ]

    @property
    def sums(self) -> list[tuple[float, float, float]]:
        """Of each output, how many numbers, their sum and that of their squares."""
        return self._sums

    @staticmethod
    def variances(sums: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """Return the variances that such sums give; of an output that never changes its mean square, or 1."""
        found = []
        for count, total, squares in sums:
            mean_square = squares / max(count, 1.0)
            variance = mean_square - (total / max(count, 1.0)) ** 2
            scale = variance if variance > 1e-9 * mean_square else mean_square
            found.append(scale if scale > 0 and math.isfinite(scale) else 1.0)
        return tuple(found)
