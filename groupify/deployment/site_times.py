"""How long each conv of an ONNX file runs, fused operators included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groupify.deployment.profiling import node_times
from groupify.deployment.runtime import require

# What ONNX Runtime fuses into the conv in front.
_FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Add", "Sum", "Identity")
_BLOCKED = "_nchwc"


def site_times(
    path: Path,
    sites: Sequence[str],
    *,
    input_shape: tuple[int, ...],
    threads: int,
    batch_size: int,
    runs: int = 10,
) -> dict[str, float]:
    """Profile a file that ``export_onnx`` wrote; return milliseconds per batch by site.

    A site is a module of the exported model; the time of all its convs is added up, with the activation or
    sum that ONNX Runtime fused into them. A site that the profile does not name is left out.

    Args:
        path: the file.
        sites: qualified module names.
        input_shape: shape of one input, without the batch dimension.
        threads: intra-op threads.
        batch_size: inputs per run.
        runs: how often to run it.

    Raises:
        GroupifyError: ONNX Runtime or onnx is missing, or refuses the file.
    """
    graph = require("onnx").load(str(path), load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    nodes = {node.name: node for node in graph.node}
    times = node_times(path, input_shape, threads, batch_size, runs, seed=0)
    timed = {name.removesuffix(_BLOCKED) for _, name in times}
    found: dict[str, float] = {}
    for (operator, name), milliseconds in times.items():
        if "Conv" not in operator:
            continue
        # The blocked kernels are named after their output, the others after their node.
        node = producers.get(name.removesuffix(_BLOCKED))
        node = nodes.get(name.removeprefix("fused ")) if node is None else node
        label = "" if node is None else _weight_behind(node, producers, timed)
        site = next((site for site in sites if label.startswith(f"{site}.")), None)
        if site is not None:
            found[site] = found.get(site, 0.0) + milliseconds
    return found


def _weight_behind(node: Any, producers: dict[str, Any], timed: set[str]) -> str:
    """Return the name of the weight of the conv that a fused output comes from; empty if there is none."""
    waiting, seen = [node], 0
    while waiting and seen < 16:
        node, seen = waiting.pop(), seen + 1
        if node.op_type == "Conv":
            return str(node.input[1])
        if node.op_type in _FUSED:
            # The other term of a sum is a value of its own, with a time of its own.
            waiting += [producers[name] for name in node.input if name in producers and name not in timed]
    return ""
