"""Does the exported file compute what the model computes?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groupify.errors import GroupifyError, ParityError
from groupify.graph.call import Call, Example, one_example, shape_of
from groupify.graph.copying import on_cpu
from groupify.onnx.any_size import image_shape, other_shape
from groupify.onnx.comparison import (
    NO_DIFFERENCE,
    Comparison,
    compare_outputs,
    other_shapes,
    reference_outputs,
)
from groupify.onnx.divergence import first_divergence
from groupify.onnx.rounding import furthest, measure_rounding, undecided
from groupify.onnx.runtime import Array, OnnxModule

# Float32 sums in another order came to 1e-7 to 1.6e-4 of the largest output, the latter in a deeplabv3 with
# random weights, where PyTorch's float32 is as far from its own float64. A channel in the wrong place comes
# to 1e-2 and more.
TOLERANCE = 5e-4
# A file may be this much further from float64 than PyTorch's own float32: ONNX Runtime sums in another order.
# What amplifies rounding amplifies a channel in the wrong place as well, far beyond that.
_NOISE_FACTOR = 4.0
_ONE_SIZE = "leave out dynamic_size (--dynamic-size), and export a file for each"
# Above it, a file cannot be judged.
_MOST_NOISE = 0.02


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime's outputs are from PyTorch's, over all inputs that were tried.

    Attributes:
        max_abs_diff: the largest difference of any output value.
        max_rel_diff: the same, of the largest absolute value of the same output.
        top1_agreement: share of equal argmaxes of outputs (N, K), a fraction; None without such an output.
        batch_sizes: that were tried.
        real_images: how many of the inputs were not random.
        shapes: of one input, that were tried; one of them where the size is fixed.
        noise: how far PyTorch's own float32 is from float64, of the largest absolute value of the same
            output, where the outputs were judged by float64 since they differ by more than the tolerance;
            else None.
    """

    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float | None
    batch_sizes: tuple[int, ...]
    real_images: int
    noise: float | None = None
    shapes: tuple[tuple[int, ...], ...] = ()


def check_parity(
    model: nn.Module,
    path: Path | str,
    *,
    input_shape: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    images: Tensor | None = None,
    batch_sizes: Sequence[int] = (1, 3),
    dynamic_size: bool = False,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Compare an ONNX file with the model it was exported from, on fresh random inputs and real ones.

    Both run on the CPU, a model on another device as a copy.

    Outputs that differ by more than the tolerance are judged against the model's float64 outputs: the file
    passes if it is as near to those as PyTorch's own float32 is, up to a factor of 4. Elements of boolean and
    integer outputs must be equal, but where a change of the inputs by the tolerance changes them too.

    Args:
        model: the PyTorch model; its modes are restored afterwards.
        path: the ONNX file. Where the check fails it is renamed to ``<name>.failed``.
        input_shape: shape of one input, without the batch dimension.
        example_inputs: in its place, what the model is called with. Fresh inputs are then its examples, mixed
            and changed by up to a half, or random where all values of a tensor are the same; the examples
            themselves count as real ones.
        images: real inputs, normalised, shape (N, *input_shape); tried in batches of each size.
        batch_sizes: the batches to try; a file of fixed batch size is tried at that one only.
        dynamic_size: try another height and width too, the nearest larger ones that the model takes.
        seed: of the random inputs (standard normal).
        tolerance: largest difference allowed, relative to the largest absolute value of an output, or to
            1e-3 where that is smaller.

    Raises:
        ParityError: the outputs differ, or their shapes do; the message names the node that diverges first,
            and whether the size of the batch makes the difference.
        GroupifyError: ONNX Runtime cannot run the file.
    """
    file = Path(path)
    model, exported = on_cpu(model), OnnxModule(file)
    sizes = _batch_sizes(exported.fixed_batch, batch_sizes)
    generator = torch.Generator().manual_seed(seed)
    example = one_example(input_shape, example_inputs)
    if isinstance(example, Call):
        example = example.map(Tensor.cpu)
    shapes = [] if isinstance(example, Call) else [tuple(example)]
    if dynamic_size:
        shapes = [image_shape(example), other_shape(model, image_shape(example))]
    random = [_random(example, size, generator) for size in sizes]
    random += [_random(shape, size, generator) for shape in shapes[1:] for size in sizes]
    real = [Call((batch,)) for batch in _real_batches(images, sizes)]
    if isinstance(example, Call):
        real += [example.of_size(size) for size in sizes]
    check = _Check(model, file, exported, tolerance)
    total, noises = NO_DIFFERENCE, []
    for batch in random + real:
        found = check.compare(batch)
        if found.problem is not None:
            place = "" if found.other_shape else f"; {check.divergence(batch, found)}"
            if shape_of(batch) in shapes[1:]:
                advice = f"; {shapes[0]} is right, so what the model does depends on the size: {_ONE_SIZE}"
            else:
                same = [other for other in random if shape_of(other) == shape_of(batch)]
                advice = check.advice([other for other in same if other.batch_size != batch.batch_size])
            _fail(file, f"{found.problem} (batch of {batch.batch_size}){place}{advice}")
        total = total.worst(found.comparison)
        noises += [] if found.noise is None else [found.noise]
    return Parity(
        total.absolute,
        total.relative,
        total.top1_agreement,
        tuple(sizes),
        sum(batch.batch_size for batch in real),
        max(noises, default=None),
        tuple(shapes),
    )


def _batch_sizes(fixed: int | None, wanted: Sequence[int]) -> list[int]:
    if not wanted or min(wanted) < 1:
        raise GroupifyError(f"batch sizes {tuple(wanted)} to check: expected one or more, each at least 1")
    return list(wanted) if fixed is None else [fixed]


def _random(example: Example, size: int, generator: torch.Generator) -> Call:
    if not isinstance(example, Call):
        return Call((torch.randn(size, *example, generator=generator),))
    mixed = example.part(torch.randint(example.batch_size, (size,), generator=generator))

    def change(values: Tensor) -> Tensor:
        if values.numel() and bool((values == values.reshape(-1)[0]).all()):
            return torch.randn(values.shape, generator=generator).to(values)
        return values * (0.5 + torch.rand(values.shape, generator=generator)).to(values)

    return mixed.floats(change)


def _real_batches(images: Tensor | None, sizes: Sequence[int]) -> list[Tensor]:
    if images is None:
        return []
    images = images.cpu()
    batches = []
    start = 0
    for size in sizes:
        if start + size <= len(images):
            batches.append(images[start : start + size].float())
            start += size
    return batches


def _fail(file: Path, problem: str) -> None:
    kept = file.with_name(file.name + ".failed")
    os.replace(file, kept)
    raise ParityError(f"{file.name} {problem}; the file is kept as {str(kept)!r}")


@dataclass(frozen=True)
class _Found:
    """What one batch showed.

    Attributes:
        comparison: with the model's float32 outputs.
        expected: those.
        noise: of PyTorch's own float32, where it was needed.
        problem: what is wrong, None if nothing is.
        other_shape: whether it is the shapes.
    """

    comparison: Comparison
    expected: Mapping[str, Array]
    noise: float | None = None
    problem: str | None = None
    other_shape: bool = False


@dataclass(frozen=True)
class _Check:
    model: nn.Module
    file: Path
    exported: OnnxModule
    tolerance: float

    def compare(self, batch: Call) -> _Found:
        """Compare the outputs for one batch, with more effort where they differ."""
        expected = reference_outputs(self.model, batch)
        try:
            outputs = self.exported.outputs(batch)
        except GroupifyError as error:
            return _Found(NO_DIFFERENCE, expected, problem=f"does not run: {error}", other_shape=True)
        shapes = other_shapes(expected, outputs)
        if shapes is not None:
            return _Found(NO_DIFFERENCE, expected, problem=f"gives {shapes}", other_shape=True)
        found = _Found(compare_outputs(expected, outputs), expected)
        return found if found.comparison.within(self.tolerance) else self._judge(batch, found, outputs)

    def _judge(self, batch: Call, found: _Found, outputs: Mapping[str, Array]) -> _Found:
        """Ask whether rounding explains the difference."""
        rounding = measure_rounding(self.model, batch, found.expected)
        ignored = undecided(self.model, batch, found.expected, self.tolerance)
        name, off = furthest(rounding.reference, outputs, ignored)
        allowed = max(self.tolerance, _NOISE_FACTOR * min(rounding.noise, _MOST_NOISE))
        found = replace(found, noise=rounding.noise)
        if off <= allowed:
            return found
        broken = [name for name, value in found.expected.items() if bool(np.isnan(value).any())]
        if broken:
            problem = f"cannot be judged: the model's own {broken[0]!r} holds NaN"
        elif rounding.noise > _MOST_NOISE:
            problem = (
                f"cannot be judged: the model's own float32 outputs are {rounding.noise:.2g} of the largest "
                "off its float64 ones, so that rounding decides them; check on real images, or the batch "
                "norms' statistics"
            )
        else:
            problem = (
                f"differs from the PyTorch model by {found.comparison.absolute:.3g} in output {name!r} "
                f"({off:.3g} of the largest value, {allowed:.2g} allowed; the model's own rounding: "
                f"{rounding.noise:.1g})"
            )
        return replace(found, problem=problem)

    def divergence(self, batch: Call, found: _Found) -> str:
        """Say which node of the file is the first that is off."""
        tolerance = max(self.tolerance, _NOISE_FACTOR * (found.noise or 0.0))
        return first_divergence(self.model, self.file, batch, found.expected, tolerance=tolerance)

    def advice(self, others: Sequence[Call]) -> str:
        """Say so if the outputs for batches of other sizes are right."""
        good = [batch.batch_size for batch in others if self.compare(batch).problem is None]
        if not good:
            return ""
        return (
            f"; a batch of {good[0]} is right, so what the model does depends on the size of the batch: "
            f"export it for a fixed one with static_batch (--static-batch {good[0]})"
        )
