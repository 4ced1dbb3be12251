"""Outputs of two side by side: a PyTorch model and an ONNX file, or two files that should do the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from groupify.documents import Amount, Count, Fraction
from groupify.errors import DataError, GroupifyError
from groupify.graph.call import Call
from groupify.graph.forward import evaluating
from groupify.onnx.outputs import named_outputs
from groupify.onnx.runtime import Array, OnnxModule

_BATCH = 16


def reference_outputs(model: nn.Module, call: Call) -> dict[str, Array]:
    """Run the model in evaluation mode; outputs by name, of their own types but half precision as float32."""
    with evaluating(model), torch.no_grad():
        outputs = named_outputs(call.on(model).run(model))
    return {name: as_array(output) for name, output in outputs.items()}


def as_array(output: Tensor) -> Array:
    """Return a tensor as an array; half precision becomes float32."""
    half = output.dtype in (torch.float16, torch.bfloat16)
    return (output.float() if half else output).detach().cpu().numpy()


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
        """Share of equal argmaxes of outputs (N, K), a fraction; None without such an output."""
        return self.agreeing / self.decided if self.decided else None


NO_DIFFERENCE = Comparison(0.0, 0.0, 0.0, 0, 0)


def scale_of(reference: Array) -> float:
    """Return what a difference is measured against: the largest finite absolute value, or 1e-3 if that is
    less."""
    return max(1e-3, _largest(reference))


def _largest(values: Array) -> float:
    return float(np.max(np.abs(_numbers(values)), initial=0.0, where=np.isfinite(values)))


def _numbers(values: Array) -> npt.NDArray[Any]:
    """Return booleans and integers as float64, in which their differences do not wrap around."""
    return values if values.dtype.kind == "f" else values.astype(np.float64)


def other_shapes(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> str | None:
    """Say how the number or the shapes of two runs' outputs differ; None where they do not."""
    if len(expected) != len(actual):
        return f"{len(actual)} outputs, expected {len(expected)}"
    for (name, reference), output in zip(expected.items(), actual.values(), strict=True):
        if reference.shape != output.shape:
            return f"output {name!r} of shape {output.shape}, expected {reference.shape}"
    return None


def compare_outputs(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> Comparison:
    """Compare outputs of equal shapes one by one, in their order."""
    total = NO_DIFFERENCE
    for reference, output in zip(expected.values(), actual.values(), strict=True):
        total = total.worst(_compare(reference, output))
    return total


def differences(reference: Array, output: Array) -> npt.NDArray[Any]:
    """Return absolute differences; 0 where both are the same infinity, NaN where either is NaN."""
    one, other = _numbers(reference), _numbers(output)
    with np.errstate(invalid="ignore"):  # ∞ − ∞
        apart = np.abs(one - other)
    return np.where(one == other, 0.0, apart)


def _compare(reference: Array, output: Array) -> Comparison:
    difference = float(np.max(differences(reference, output), initial=0.0))
    largest = _largest(reference)
    agreeing = decided = 0
    if reference.dtype.kind == "f" and reference.ndim == 2 and reference.shape[1] > 1:
        agreeing = int(np.sum(reference.argmax(1) == output.argmax(1)))
        decided = len(reference)
    ratio = difference / largest if largest > 0 else difference
    return Comparison(difference, ratio, difference / scale_of(reference), agreeing, decided)


@dataclass(frozen=True)
class Agreement:
    """Outputs of one file against those of another.

    Attributes:
        max_abs_diff: the largest difference of any output value.
        max_rel_diff: the same, of the largest absolute value of the same output in its batch.
        top1_agreement: share of equal argmaxes of outputs (N, K), a fraction; None without such an output.
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
        shapes = other_shapes(expected, actual)
        if shapes is not None:
            raise GroupifyError(f"{str(other)!r} gives {shapes}: compare two exports of one model")
        total = total.worst(compare_outputs(expected, actual))
    return Agreement(total.absolute, total.relative, total.top1_agreement, len(images))
