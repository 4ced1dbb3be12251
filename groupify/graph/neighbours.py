"""Questions to a graph about the neighbours of some layers."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import fx, nn

from groupify.graph.operations import CONVS, conv_kind, is_batch_norm


def refittable(module: fx.GraphModule, sites: Iterable[str], max_inputs: int) -> tuple[str, ...]:
    """Names of the dense convs and linears behind converted convs that can make good for their error.

    Args:
        module: traced dense model.
        sites: the convs to be converted.
        max_inputs: layers with more inputs per output are left out; the fit would cost too much.
    """
    names, behind, found = set(sites), set[fx.Node](), list[str]()
    calls: dict[str, int] = {}
    for node in module.graph.nodes:
        name = str(node.target)
        changed = any(source in behind for source in node.all_input_nodes)
        if node.op == "call_module":
            calls[name] = calls.get(name, 0) + 1
            layer = module.get_submodule(name)
            if (
                changed
                and name not in names
                and isinstance(layer, (nn.Linear, *CONVS))
                and (type(layer) is nn.Linear or conv_kind(layer) is not None)
                and isinstance(layer._parameters.get("weight"), nn.Parameter)  # else computed before each run
                and getattr(layer, "groups", 1) == 1
                and layer.weight[0].numel() <= max_inputs
            ):
                found.append(name)
            changed = changed or name in names
        if changed:
            behind.add(node)
    return tuple(dict.fromkeys(name for name in found if calls[name] == 1))


def residual_sums(module: fx.GraphModule, sites: Iterable[str]) -> dict[fx.Node, fx.Node]:
    """Find the sites whose output, perhaps behind a batch norm, is one term of a residual sum."""
    additions = {operator.add, operator.iadd, torch.add, "add", "add_"}
    names = set(sites)
    found: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "call_module" or str(node.target) not in names:
            continue
        last = node
        reader = next(iter(last.users), None)
        if len(last.users) == 1 and reader is not None and _is_batch_norm(module, reader):
            last = reader
            reader = next(iter(last.users), None)
        if (
            reader is not None
            and len(last.users) == 1
            and reader.op in ("call_function", "call_method")
            and reader.target in additions
            and len(reader.args) == 2
            and not reader.kwargs
            and all(isinstance(arg, fx.Node) for arg in reader.args)
            and reader.args[0] is not reader.args[1]
        ):
            found[node] = reader
    return found


def is_relu(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a ReLU, as a module, a function or a method."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.ReLU)
    return node.target in (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def _is_batch_norm(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and is_batch_norm(module.get_submodule(str(node.target)))
