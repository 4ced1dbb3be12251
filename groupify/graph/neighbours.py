"""Questions to a graph about the neighbours of some layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from groupify.graph.model_graph import ModelGraph
from groupify.graph.operators import ADDITION, RELU, operator_name


def refittable(graph: ModelGraph, sites: Iterable[str], max_inputs: int) -> tuple[str, ...]:
    """Names of the dense convs and linears behind converted convs that can make good for their error.

    Args:
        graph: the dense model's graph.
        sites: the convs to be converted.
        max_inputs: layers with more inputs per output are left out; the fit would cost too much.
    """
    names, behind, found = set(sites), set[fx.Node](), list[str]()
    for node in graph.graph.nodes:
        changed = any(source in behind for source in node.all_input_nodes)
        if node.op == "call_module":
            name, layer = str(node.target), graph.layer(node)
            dense = getattr(layer, "groups", 1) == 1
            if (
                changed
                and name not in names
                and dense
                and layer.get_parameter("weight")[0].numel() <= max_inputs
            ):
                found.append(name)
            changed = changed or name in names
        if changed:
            behind.add(node)
    calls = graph.calls
    return tuple(name for name in dict.fromkeys(found) if calls[name] == 1)


def residual_sums(graph: ModelGraph, sites: Iterable[str]) -> dict[fx.Node, fx.Node]:
    """Find the sites whose output, perhaps behind a batch norm, is one term of a residual sum."""
    names = set(sites)
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op != "call_module" or str(node.target) not in names:
            continue
        last = node
        reader = only_reader(last)
        if reader is not None and graph.norm(reader) is not None:
            last = reader
            reader = only_reader(last)
        if reader is not None and _is_sum_of_two(reader):
            found[node] = reader
    return found


def only_reader(node: fx.Node) -> fx.Node | None:
    """Return the node that alone reads another; None where several do, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum_of_two(node: fx.Node) -> bool:
    return (
        operator_name(node) == ADDITION
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(arg, fx.Node) for arg in node.args)
        and node.args[0] is not node.args[1]
    )


def is_relu(node: fx.Node) -> bool:
    """Whether a node is a ReLU."""
    return operator_name(node) == RELU
