"""Which node of an ONNX file is the first that departs from the model that it was exported from."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from groupify.graph.call import Call
from groupify.graph.forward import evaluating
from groupify.onnx.comparison import compare_outputs, scale_of
from groupify.onnx.runtime import Array, open_session, session_feed


def first_divergence(
    model: nn.Module, path: Path, batch: Call, reference: Mapping[str, Array], *, tolerance: float
) -> str:
    """Say which node of an ONNX file is the first that departs from the model's layers.

    The graph is run with ONNX Runtime's optimisations off and every layer's output exposed. The export names
    its nodes after the module whose output they compute (``layer1.0.bn1/Conv``), so that they are compared
    with the outputs of the model's leaf modules, in the order of execution. Both are sorted along the
    channels first: permutation folding may have stored a tensor in another order, which is no error.

    Args:
        model: left as it was.
        path: the ONNX file.
        batch: inputs of which the outputs differ.
        reference: the model's own outputs for them.
        tolerance: largest difference allowed, relative to the largest absolute value of a layer's output.

    Returns:
        A phrase for an error message.
    """
    expected = _module_outputs(model, batch)
    graph = onnx.load(str(path)).graph
    calls = _layer_calls(graph, {name: len(outputs) for name, outputs in expected.items()})
    values, outputs = _run_exposed(path, batch, [call.output for call in calls])
    last_good = None
    for call in calls:
        layer = expected[call.module][call.index]
        value = values[call.output]
        if value.size != layer.size:  # it is not that output after all
            continue
        if not _equal_up_to_channels(layer, value, tolerance):
            return f"first diverging node {call.node!r}" + (
                f" (weights {call.weights!r})" if call.weights else ""
            )
        last_good = call.node
    if compare_outputs(reference, dict(zip(reference, outputs, strict=True))).within(tolerance):
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


def _module_outputs(model: nn.Module, batch: Call) -> dict[str, list[Array]]:
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
    try:
        with evaluating(model), torch.no_grad():
            batch.on(model).run(model)
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


def _run_exposed(path: Path, batch: Call, names: list[str]) -> tuple[dict[str, Array], list[Array]]:
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
    results = session.run(own + names, session_feed(session, path, batch))
    return dict(zip(names, results[len(own) :], strict=True)), results[: len(own)]


def _equal_up_to_channels(reference: Array, value: Array, tolerance: float) -> bool:
    value = value.reshape(reference.shape)
    axis = 1 if reference.ndim > 1 else 0
    difference = np.max(np.abs(np.sort(reference, axis) - np.sort(value, axis)), initial=0.0)
    return bool(difference <= tolerance * scale_of(reference))
