"""How far two ONNX files that should do the same are from each other on real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from groupify.documents import Amount, Count, Fraction
from groupify.errors import DataError, GroupifyError
from groupify.onnx.comparison import compare_outputs
from groupify.onnx.quantisation import OnnxModule

_BATCH = 16


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
    absolute = relative = 0.0
    agreeing = decided = 0
    for batch in images.float().split(_BATCH):
        expected, actual = first.outputs(batch), second.outputs(batch)
        if expected.keys() != actual.keys():
            raise GroupifyError(
                f"{str(other)!r} has the outputs {', '.join(actual)}, expected {', '.join(expected)}: "
                "compare two exports of one model"
            )
        comparison = compare_outputs(expected, list(actual.values()))
        # np.maximum, unlike max, keeps a NaN.
        absolute = float(np.maximum(absolute, comparison.absolute))
        relative = float(np.maximum(relative, comparison.relative))
        agreeing += comparison.agreeing
        decided += comparison.decided
    return Agreement(absolute, relative, agreeing / decided if decided else None, len(images))
