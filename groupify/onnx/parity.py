"""Does the exported file compute what the model computes, and if not, where do they part?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupify.errors import GroupifyError, ParityError
from groupify.onnx.comparison import Array, Comparison, compare_outputs, reference_outputs
from groupify.onnx.divergence import first_divergence
from groupify.onnx.runtime import open_session

# Float32 sums in another order came to 1e-7 to 1.6e-4 of the largest output, the latter in a deeplabv3 with
# random weights, where PyTorch's float32 is as far from its own float64. A channel in the wrong place comes
# to 1e-2 and more.
TOLERANCE = 5e-4


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime's outputs are from PyTorch's, over all inputs that were tried."""

    max_abs_diff: float
    max_rel_diff: float  # of the largest absolute value of the same output
    top1_agreement: float | None  # share of equal argmaxes over dimension 1; None without one
    batch_sizes: tuple[int, ...]
    real_images: int  # how many of the inputs were not random


def check_parity(
    model: nn.Module,
    path: Path | str,
    *,
    input_shape: tuple[int, ...],
    images: Tensor | None = None,
    batch_sizes: Sequence[int] = (1, 3),
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Compare an ONNX file with the model it was exported from, on fresh random inputs and real ones.

    Args:
        model: the PyTorch model; its modes are restored afterwards.
        path: the ONNX file. Where the check fails it is renamed to ``<name>.failed``.
        input_shape: shape of one input, without the batch dimension.
        images: real inputs, normalised, shape (N, *input_shape); tried in batches of each size.
        batch_sizes: the batches to try; a file of fixed batch size is tried at that one only.
        seed: of the random inputs (standard normal).
        tolerance: largest difference allowed, relative to the largest absolute value of an output, or to
            1e-3 where that is smaller.

    Raises:
        ParityError: the outputs differ; the message names the node that diverges first.
        GroupifyError: ONNX Runtime cannot run the file.
    """
    file = Path(path)
    session = open_session(file)
    sizes = _batch_sizes(session, batch_sizes)
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(size, *input_shape, generator=generator) for size in sizes]
    real = _real_batches(images, sizes)
    comparisons: list[Comparison] = []
    for batch in batches + real:
        expected = reference_outputs(model, batch)
        actual = _run(session, batch, file)
        comparison = compare_outputs(expected, actual)
        if not comparison.within(tolerance):
            _fail(model, file, batch, comparison, tolerance)
        comparisons.append(comparison)
    decided = sum(comparison.decided for comparison in comparisons)
    return Parity(
        max_abs_diff=max(comparison.absolute for comparison in comparisons),
        max_rel_diff=max(comparison.relative for comparison in comparisons),
        top1_agreement=sum(comparison.agreeing for comparison in comparisons) / decided if decided else None,
        batch_sizes=tuple(sizes),
        real_images=sum(len(batch) for batch in real),
    )


def _batch_sizes(session: Any, wanted: Sequence[int]) -> list[int]:
    if not wanted or min(wanted) < 1:
        raise GroupifyError(f"batch sizes {tuple(wanted)} to check: expected one or more, each at least 1")
    fixed = session.get_inputs()[0].shape[0]
    return [fixed] if isinstance(fixed, int) else list(wanted)


def _real_batches(images: Tensor | None, sizes: Sequence[int]) -> list[Tensor]:
    if images is None:
        return []
    batches = []
    start = 0
    for size in sizes:
        if start + size <= len(images):
            batches.append(images[start : start + size].float())
            start += size
    return batches


def _run(session: Any, batch: Tensor, file: Path) -> list[Array]:
    try:
        outputs: list[Array] = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    except Exception as error:  # onnxruntime raises bare pybind classes of its own
        reason = str(error).splitlines()[0]
        raise GroupifyError(
            f"ONNX Runtime cannot run {str(file)!r} on {tuple(batch.shape)}: {reason}"
        ) from error
    return outputs


def _fail(model: nn.Module, file: Path, batch: Tensor, comparison: Comparison, tolerance: float) -> None:
    place = first_divergence(model, file, batch, tolerance=tolerance)
    kept = file.with_name(file.name + ".failed")
    os.replace(file, kept)
    raise ParityError(
        f"{file.name} differs from the PyTorch model by {comparison.absolute:.3g} "
        f"({comparison.scaled:.3g} of the largest output, {tolerance:g} allowed; batch of {len(batch)}); "
        f"{place}; the file is kept as {str(kept)!r}"
    )
