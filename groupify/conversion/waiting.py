"""How much memory the activations of a calibration take that wait for later, told before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from groupify.conversion.fit import is_cheap_to_repeat
from groupify.conversion.site_fit import FitOptions
from groupify.graph.call import Call
from groupify.graph.execute import needs_exact_values
from groupify.graph.model_graph import ModelGraph
from groupify.graph.prepared import batch_sizes
from groupify.stats.samples import SampleBudget, Sampling, patch_width

_HALF = 2  # bytes


@torch.no_grad()
def waiting_bytes(
    graph: ModelGraph,
    batches: Sequence[Call],
    layers: Mapping[str, Sampling],
    budget: SampleBudget,
    options: FitOptions,
) -> int:
    """Return about how many bytes of activations wait at the same time, if nothing limits them.

    Samples of all layers wait while the student runs node by node, and with them the values of all images
    that are still to be read.

    Args:
        graph: of the dense model.
        batches: calibration images; the first is run once.
        layers: what is sampled.
        budget: how many positions.
        options: of the fit.
    """
    images, first = sum(batch_sizes(batches)), batches[0]
    share = images / first.batch_size
    exact = needs_exact_values(graph.graph)
    sizes: dict[fx.Node, float] = {}
    samples = patches = 0.0
    for node, value, _ in graph.walk(first):
        sizes[node] = share * _size(value, halved=node not in exact)
        sampling = layers.get(str(node.target)) if node.op == "call_module" else None
        if sampling is not None:
            layer, values = graph.layer(node), value.numel() * share
            samples += _outputs(layer, values, sampling, budget)
            patches += _patches(layer, values, sampling, budget) if sampling.patches else 0
    waiting = _most_at_once(graph, sizes, options.refresh_batch_norm)
    # Where convs are fitted on the student's inputs, the teacher's are forgotten before the student runs.
    return int(samples + (max(patches, waiting) if options.in_order else patches + waiting))


def _size(value: Any, *, halved: bool) -> float:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(
        tensor.numel() * (_HALF if halved and tensor.dtype == torch.float32 else tensor.element_size())
        for tensor in tensors
    )


def _outputs(layer: Any, values: float, sampling: Sampling, budget: SampleBudget) -> float:
    """Bytes of the sampled outputs of one layer, of which there are so many values."""
    width = len(layer.weight)
    return _HALF * width * min(values / width, budget.count(patch_width(layer) // sampling.groups))


def _patches(layer: Any, values: float, sampling: Sampling, budget: SampleBudget) -> float:
    """Bytes of its sampled input patches, and of the outputs there."""
    width, inputs = len(layer.weight), patch_width(layer)
    return _HALF * (width + inputs) * min(values / width, budget.patch_count(inputs // sampling.groups))


def _most_at_once(graph: ModelGraph, sizes: Mapping[fx.Node, float], refreshes: bool) -> float:
    """Bytes of the values that wait, where they are the most."""
    nodes = [node for node in graph.graph.nodes if node.op != "get_attr"]
    repeated = {node for node in nodes if is_cheap_to_repeat(graph, node, refreshes=refreshes)}
    last_reader: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in _kept_sources(node, repeated):
            if node not in repeated:
                last_reader[source] = node
    waiting = most = 0.0
    for node in nodes:
        if node in repeated:
            continue
        if node in last_reader:
            waiting += sizes[node]
        most = max(most, waiting)
        waiting -= sum(sizes[source] for source, reader in last_reader.items() if reader is node)
    return most


def _kept_sources(node: fx.Node, repeated: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for source in node.all_input_nodes:
        if source in repeated:
            found |= _kept_sources(source, repeated)
        elif source.op != "get_attr":
            found.add(source)
    return found
