"""Constants that channels are multiplied by, which ``forward`` makes: they cannot follow reordered channels.

A channel that changes its place is multiplied by another constant than before. That is made up for where
it is read: by a conv or a linear layer, whose weight takes the quotient of the two. On the way there may be
only operators that a positive factor passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from groupify.devices import double
from groupify.graph.model_graph import ModelGraph
from groupify.graph.operators import Effect, effect, operator_name

_PRODUCTS, _QUOTIENTS = ("mul", "multiply"), ("div", "divide", "true_divide")
# Where a positive factor of a channel of the input is one of the output.
_PASSING = {Effect.SAME, Effect.MOVES, Effect.WITHIN_CHANNELS}
_PASSING_NAMES = {"relu", "leaky_relu", "abs", "mean", "sum", "amax", "amin"}
_READING = {Effect.CONV, Effect.TRANSPOSED_CONV, Effect.LINEAR}
_OF_CONSTANTS = {Effect.SAME, Effect.MOVES, Effect.ELEMENTWISE}


def takes_factors(node: fx.Node, value: Any) -> bool:
    """Whether factors of what a node reads pass through it, or can be made up for in its weight."""
    if node.op == "call_module" or effect(node) in _READING:
        return True
    if operator_name(node) in (*_PRODUCTS, *_QUOTIENTS):
        return isinstance(node.args[0], fx.Node) and not isinstance(node.args[1], fx.Node)
    first = value[0] if isinstance(value, (list, tuple)) else value  # a second output are places of maxima
    floating = isinstance(first, Tensor) and first.is_floating_point()
    return floating and (effect(node) in _PASSING or operator_name(node) in _PASSING_NAMES)


def constant_factors(
    node: fx.Node, value: Any, graph: ModelGraph, fetch: Callable[[fx.Node], Tensor]
) -> tuple[fx.Node, Tensor] | None:
    """Find the constants that a node multiplies channels by.

    Args:
        node: a node of the graph.
        value: its value.
        graph: the graph.
        fetch: gives the values of the nodes that it reads.

    Returns:
        What is multiplied, and a positive factor for each channel (dimension 1), shape (C,); None where the
        node does anything else.
    """
    name, operands = operator_name(node), node.args[:2]
    if name not in (*_PRODUCTS, *_QUOTIENTS) or node.kwargs or len(node.args) != 2:
        return None
    for factor, source in (operands, operands[::-1]) if name in _PRODUCTS else (operands[::-1],):
        if not isinstance(factor, fx.Node) or not isinstance(source, fx.Node):
            return None
        if _is_constant(factor, graph) and fetch(source).shape == value.shape:
            factors = _of_each_channel(fetch(factor), value.shape)
            if factors is not None:
                return source, 1 / factors if name in _QUOTIENTS else factors
    return None


def _is_constant(node: fx.Node, graph: ModelGraph) -> bool:
    if node.op == "get_attr":
        return not graph.is_state(str(node.target))
    sources = node.all_input_nodes
    return (
        effect(node) in _OF_CONSTANTS and bool(sources) and all(_is_constant(one, graph) for one in sources)
    )


def _of_each_channel(constant: Tensor, shape: torch.Size) -> Tensor | None:
    """One positive factor for each channel; None where it is another kind of tensor."""
    wide = constant.reshape((1,) * (len(shape) - constant.dim()) + constant.shape)
    if len(shape) < 2 or shape[1] < 2 or wide.shape != (1, shape[1], *[1] * (len(shape) - 2)):
        return None
    factors = double(wide.reshape(-1).cpu())
    return factors if bool(((factors > 0) & factors.isfinite()).all()) else None
