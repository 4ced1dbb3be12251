"""Does the exported file compute what the model computes, and if not, where do they part?"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from groupify.errors import GroupifyError, ParityError
from groupify.graph.forward import evaluating
from groupify.onnx.comparison import NO_DIFFERENCE, Comparison, compare_outputs, reference_outputs, scale_of
from groupify.onnx.runtime import Array, OnnxModule, open_session

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
    exported = OnnxModule(file)
    sizes = _batch_sizes(exported.fixed_batch, batch_sizes)
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randn(size, *input_shape, generator=generator) for size in sizes]
    real = _real_batches(images, sizes)
    total = NO_DIFFERENCE
    for batch in random + real:
        outputs = list(exported.outputs(batch).values())
        comparison = compare_outputs(reference_outputs(model, batch), outputs)
        if not comparison.within(tolerance):
            _fail(model, file, batch, comparison, tolerance)
        total = total.worst(comparison)
    return Parity(
        total.absolute, total.relative, total.top1_agreement, tuple(sizes), sum(len(batch) for batch in real)
    )


def _batch_sizes(fixed: int | None, wanted: Sequence[int]) -> list[int]:
    if not wanted or min(wanted) < 1:
        raise GroupifyError(f"batch sizes {tuple(wanted)} to check: expected one or more, each at least 1")
    return list(wanted) if fixed is None else [fixed]


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


def _fail(model: nn.Module, file: Path, batch: Tensor, comparison: Comparison, tolerance: float) -> None:
    place = _first_divergence(model, file, batch, tolerance=tolerance)
    kept = file.with_name(file.name + ".failed")
    os.replace(file, kept)
    raise ParityError(
        f"{file.name} differs from the PyTorch model by {comparison.absolute:.3g} "
        f"({comparison.scaled:.3g} of the largest output, {tolerance:g} allowed; batch of {len(batch)}); "
        f"{place}; the file is kept as {str(kept)!r}"
    )


# ---- where they part, layer by layer, up to a permutation of channels


def _first_divergence(model: nn.Module, path: Path, batch: Tensor, *, tolerance: float) -> str:
    """Say which node of an ONNX file is the first that departs from the model's layers.

    The graph is run with ONNX Runtime's optimisations off and every layer's output exposed. The export names
    its nodes after the module whose output they compute (``layer1.0.bn1/Conv``), so that they are compared
    with the outputs of the model's leaf modules, in the order of execution. Both are sorted along the
    channels first: permutation folding may have stored a tensor in another order, which is no error.

    Returns:
        A phrase for an error message.
    """
    expected = _module_outputs(model, batch)
    graph = onnx.load(str(path)).graph
    calls = _layer_calls(graph, {name: len(outputs) for name, outputs in expected.items()})
    values, outputs = _run_exposed(path, batch, [call.output for call in calls])
    last_good = None
    for call in calls:
        reference = expected[call.module][call.index]
        value = values[call.output]
        if value.size != reference.size:  # it is not that output after all
            continue
        if not _equal_up_to_channels(reference, value, tolerance):
            return f"first diverging node {call.node!r}" + (
                f" (weights {call.weights!r})" if call.weights else ""
            )
        last_good = call.node
    if compare_outputs(reference_outputs(model, batch), outputs).within(tolerance):
        return "no node diverges with ONNX Runtime's graph optimisations off: they change the result"
    return f"first diverging node behind {last_good!r}" if last_good else "no layer could be compared"


@dataclass(frozen=True)
class _LayerCall:
    """One call of a leaf module, as the nodes that compute it."""

    module: str
    index: int  # of the call
    node: str  # the last one
    output: str
    weights: str | None
    position: int


def _module_outputs(model: nn.Module, batch: Tensor) -> dict[str, list[Array]]:
    """Return the outputs of the leaf modules, one per call, by module name."""
    outputs: dict[str, list[Array]] = defaultdict(list)
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def record(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    # A copy: an in-place activation overwrites its input.
                    outputs[name].append(output.detach().float().cpu().numpy().copy())

            handles.append(module.register_forward_hook(record))
    parameter = next(model.parameters(), None)
    try:
        with evaluating(model), torch.no_grad():
            model(batch if parameter is None else batch.to(parameter.device))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _layer_calls(graph: Any, call_counts: dict[str, int]) -> list[_LayerCall]:
    """Return the calls of leaf modules that the graph's node names let us find, in graph order."""
    nodes = defaultdict(list)
    for position, node in enumerate(graph.node):
        module, slash, _ = node.name.rpartition("/")
        if slash:
            nodes[module].append((position, node))
    calls = []
    for module, members in nodes.items():
        count = call_counts.get(module, 0)
        if not count or len(members) % count:
            continue
        step = len(members) // count
        for index in range(count):
            chunk = members[index * step : (index + 1) * step]
            inputs = [source for _, node in chunk for source in node.input]
            weights = next((source for source in inputs if ".weight" in source), None)
            position, last = chunk[-1]
            calls.append(_LayerCall(module, index, last.name, last.output[0], weights, position))
    return sorted(calls, key=lambda call: call.position)


def _run_exposed(path: Path, batch: Tensor, names: list[str]) -> tuple[dict[str, Array], list[Array]]:
    """Run the graph unoptimised; return the named values and the graph's own outputs."""
    model = onnx.load(str(path))
    own = [output.name for output in model.graph.output]
    for name in names:
        if name not in own:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name  # a file, since above 2 GB a model cannot be serialised in memory
        onnx.save(model, str(draft), save_as_external_data=model.ByteSize() > 2**31 - 1)
        session = open_session(draft, optimise=False)
    results = session.run(own + names, {session.get_inputs()[0].name: batch.numpy()})
    return dict(zip(names, results[len(own) :], strict=True)), results[: len(own)]


def _equal_up_to_channels(reference: Array, value: Array, tolerance: float) -> bool:
    value = value.reshape(reference.shape)
    axis = 1 if reference.ndim > 1 else 0
    difference = np.max(np.abs(np.sort(reference, axis) - np.sort(value, axis)), initial=0.0)
    return bool(difference <= tolerance * scale_of(reference))
