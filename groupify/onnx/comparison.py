"""Outputs of two side by side: a PyTorch model and an ONNX file, or two files that should do the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from groupify.documents import Amount, Count, Fraction
from groupify.errors import DataError, GroupifyError
from groupify.graph.forward import evaluating
from groupify.onnx.runtime import Array, OnnxModule

_BATCH = 16


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

    def worst(self, other: Comparison) -> Comparison:
        """Return the larger differences and the sum of the decisions of two batches."""
        # np.maximum, unlike max, keeps a NaN, which no tolerance admits.
        return Comparison(
            float(np.maximum(self.absolute, other.absolute)),
            float(np.maximum(self.relative, other.relative)),
            float(np.maximum(self.scaled, other.scaled)),
            self.agreeing + other.agreeing,
            self.decided + other.decided,
        )

    @property
    def top1_agreement(self) -> float | None:
        """Share of equal argmaxes over dimension 1, a fraction; None without one."""
        return self.agreeing / self.decided if self.decided else None


NO_DIFFERENCE = Comparison(0.0, 0.0, 0.0, 0, 0)


def scale_of(reference: Array) -> float:
    """Return what a difference is measured against: the largest absolute value, or 1e-3 if that is less."""
    return max(1e-3, float(np.max(np.abs(reference), initial=0.0)))


def compare_outputs(expected: Mapping[str, Array], actual: Sequence[Array]) -> Comparison:
    """Compare outputs one by one; shapes that differ are NaN apart."""
    total = NO_DIFFERENCE
    for reference, output in zip(expected.values(), actual, strict=True):
        if reference.shape != output.shape:
            return Comparison(math.nan, math.nan, math.nan, 0, 1)
        total = total.worst(_compare(reference, output))
    return total


def _compare(reference: Array, output: Array) -> Comparison:
    difference = float(np.max(np.abs(reference - output), initial=0.0))
    largest = float(np.max(np.abs(reference), initial=0.0))
    agreeing = decided = 0
    if reference.ndim >= 2 and reference.shape[1] > 1:
        agreeing = int(np.sum(reference.argmax(1) == output.argmax(1)))
        decided = reference.size // reference.shape[1]
    ratio = difference / largest if largest > 0 else difference
    return Comparison(difference, ratio, difference / scale_of(reference), agreeing, decided)


@dataclass(frozen=True)
class Agreement:
    """Outputs of one file against those of another.

    Attributes:
        max_abs_diff: the largest difference of any output value.
        max_rel_diff: the same, of the largest absolute value of the same output in its batch.
        top1_agreement: share of equal argmaxes over dimension 1, a fraction; None without one.
        images: how many were tried.
    """

    max_abs_diff: Amount
    max_rel_diff: Amount
    top1_agreement: Fraction | None
    images: Count


def compare_files(reference: Path | str, other: Path | str, *, images: Tensor, threads: int = 1) -> Agreement:
    """Run two ONNX files on the same images and compare their outputs; nothing is held to a tolerance.

    Args:
        reference: the file that is right by definition.
        other: the file to judge, with the same inputs and outputs.
        images: normalised inputs, shape (N, C, H, W).
        threads: intra-op threads.

    Raises:
        DataError: no images.
        GroupifyError: the files differ in their outputs, or ONNX Runtime cannot run them.
    """
    if len(images) == 0:
        raise DataError("no images to compare two files on: expected at least one, better some hundred")
    first, second = OnnxModule(reference, threads=threads), OnnxModule(other, threads=threads)
    total = NO_DIFFERENCE
    for batch in images.float().split(_BATCH):
        expected, actual = first.outputs(batch), second.outputs(batch)
        if expected.keys() != actual.keys():
            raise GroupifyError(
                f"{str(other)!r} has the outputs {', '.join(actual)}, expected {', '.join(expected)}: "
                "compare two exports of one model"
            )
        total = total.worst(compare_outputs(expected, list(actual.values())))
    return Agreement(total.absolute, total.relative, total.top1_agreement, len(images))
