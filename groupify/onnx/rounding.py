"""What rounding does to a model: how far its float32 outputs are from exact ones, and which decisions it
makes.

A deep net without the batch-norm statistics of its own inputs, say, multiplies a relative error of 1e-7 by
10⁴ and more. Two right implementations then differ by that much, and a tolerance made for sound nets would
refuse both.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from groupify.graph.call import Call
from groupify.onnx.comparison import differences, other_shapes, reference_outputs, scale_of
from groupify.onnx.runtime import Array

# Perturbations of the inputs, of each sign where the sign matters.
_TRIES = 4
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Rounding:
    """What rounding does on one batch.

    Attributes:
        reference: the outputs that others are judged by; float64 where the model runs in it.
        noise: how far PyTorch's own float32 is from them, of the largest value of the same output.
    """

    reference: Mapping[str, Array]
    noise: float


def measure_rounding(model: nn.Module, batch: Call, outputs: Mapping[str, Array]) -> Rounding:
    """Compare a model's float32 outputs with its float64 ones, or with those for inputs one rounding error
    off.

    Args:
        model: left as it was.
        batch: inputs, float32.
        outputs: what the model gives for them in float32.
    """
    exact = _float64_outputs(model, batch)
    if exact is not None and other_shapes(outputs, exact) is None:
        return Rounding(exact, _noise(exact, outputs))
    generator = torch.Generator().manual_seed(0)
    noises = []
    for _ in range(_TRIES):
        # One rounding error more or less in the inputs, and all that follow fall out differently.
        shaken = batch.floats(lambda x: x * (1 + _EPS * torch.randn(x.shape, generator=generator).to(x)))
        noises.append(_noise(outputs, reference_outputs(model, shaken)))
    return Rounding(outputs, max(noises))


def _noise(reference: Mapping[str, Array], outputs: Mapping[str, Array]) -> float:
    floating = [name for name, value in outputs.items() if value.dtype.kind == "f"]
    one, other = ({name: values[name] for name in floating} for values in (reference, outputs))
    return max(0.0, furthest(one, other, {})[1])


def _float64_outputs(model: nn.Module, batch: Call) -> dict[str, Array] | None:
    """Run a copy of the model in float64; None where it does not run in that."""
    try:
        double = copy.deepcopy(model).double()
        with _default_type(torch.float64):
            return reference_outputs(double, batch.floats(Tensor.double))
    except Exception:  # what a user's own model raises on types that it was not made for
        return None


@contextlib.contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    """Let tensors that a model makes on its way have this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Change:
    """Adds noise of a size relative to the largest value of a tensor; the same for each seed."""

    def __init__(self, seed: int, size: float) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._size = size

    def __call__(self, values: Tensor) -> Tensor:
        largest = float(values.abs().max()) if values.numel() else 0.0
        return values + (self._size * largest) * torch.randn(values.shape, generator=self._generator).to(
            values
        )


def undecided(
    model: nn.Module, batch: Call, outputs: Mapping[str, Array], tolerance: float
) -> dict[str, npt.NDArray[np.bool_]]:
    """Say which elements of the boolean and integer outputs change when the inputs do, a little.

    Args:
        model: left as it was.
        batch: inputs, float32.
        outputs: what the model gives for them.
        tolerance: size of the changes, of the largest input.

    Returns:
        A mask for each output that is not floating point.
    """
    masks = {name: np.zeros(value.shape, bool) for name, value in outputs.items() if value.dtype.kind != "f"}
    generator = torch.Generator().manual_seed(0)
    for _ in range(_TRIES if masks else 0):
        seed = int(torch.randint(2**31, (), generator=generator))
        for sign in (1, -1):
            others = reference_outputs(model, batch.floats(_Change(seed, sign * tolerance)))
            for name, mask in masks.items():
                same_shape = name in others and others[name].shape == mask.shape
                mask |= others[name] != outputs[name] if same_shape else True
    return masks


def furthest(
    reference: Mapping[str, Array],
    outputs: Mapping[str, Array],
    ignored: Mapping[str, npt.NDArray[Any]],
) -> tuple[str, float]:
    """Return the output that is furthest off, and by how much of its largest value; NaN is furthest of
    all."""
    worst = "", -1.0
    for (name, expected), actual in zip(reference.items(), outputs.values(), strict=True):
        apart = differences(expected, actual)
        if name in ignored:
            apart = np.where(ignored[name], 0.0, apart)
        off = float(np.max(apart, initial=0.0)) / scale_of(expected)
        if np.isnan(off) or off > worst[1]:
            worst = name, off
        if np.isnan(off):
            break
    return worst
