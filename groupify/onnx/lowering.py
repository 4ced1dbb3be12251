"""Rewrites of an exported graph into forms that ONNX Runtime's optimisers recognise.

Above all: permutations of channels, moved into the weights wherever that is possible. The passes work on the
ONNX graph and not on the traced PyTorch one: batch norms are folded there already, it has a few dozen
operators with exact semantics in place of hundreds, permutations from the user's own model look like those of
groupify, and what is left can be lowered to forms that only ONNX Runtime knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from groupify.onnx.channel_orders import ChannelOrders, Edge
from groupify.onnx.graph_edits import (
    Order,
    attribute,
    constant,
    insert_gather,
    inverse,
    is_identity,
    keeps_batch,
    known_constant,
    new_constant,
    only_reader,
    product,
    remove_dead,
    replace_constant,
    replace_output,
    replace_value,
    static_shape,
)
from groupify.onnx.node_roles import Convolution, Linear, Permute, Same, role_of


@dataclass(frozen=True)
class PermutationFolding:
    """How many permutations a graph had, and how many gathers are left in it."""

    found: int
    kept: int


def optimise(graph: ir.Graph) -> PermutationFolding:
    """Run all passes on an exported graph, in place; one with branches or loops is left as it is."""
    if any(isinstance(entry.value, ir.Graph) for node in graph for entry in node.attributes.values()):
        # A branch or loop may read any value of this graph without saying so.
        return PermutationFolding(0, 0)
    folding = fold_permutations(graph)
    fold_batch_norms(graph)
    pool_means(graph)
    return folding


def fold_permutations(graph: ir.Graph) -> PermutationFolding:
    """Store every tensor in the order that leaves the fewest channels to move, and the weights to match.

    A permutation goes through elementwise operations, batch norms, pooling, additions, concatenations and
    flattening, into the columns or rows of dense convs and linear layers, and inside the groups of grouped
    ones. What cannot go becomes one ``Gather`` in front of its readers, behind the activation. The outputs of
    the graph stay what they were.
    """
    found = recognise_shuffles(graph)
    _sink(graph)
    orders = ChannelOrders(graph)
    orders.improve()
    _rewrite_weights(graph, orders)
    _rewrite_edges(graph, orders)
    remove_dead(graph)
    return PermutationFolding(found, sum(isinstance(role_of(node), Permute) for node in graph))


def recognise_shuffles(graph: ir.Graph) -> int:
    """Turn each reshape-transpose-reshape of channels into a ``Gather``; return the permutations in all."""
    for node in list(graph):
        order = _shuffle_order(node)
        if order is not None:
            transpose = node.inputs[0].producer()  # type: ignore[union-attr]
            split = transpose.inputs[0].producer()  # type: ignore[union-attr]
            source = split.inputs[0]  # type: ignore[union-attr]
            assert source is not None
            gathered = insert_gather(graph, source, order, _name(node), node)
            replace_value(graph, node.outputs[0], gathered)
    remove_dead(graph)
    return sum(isinstance(role_of(node), Permute) for node in graph)


def _name(node: ir.Node) -> str:
    # No slash, which would say that the gather computes the module's output.
    return "Shuffle." + (node.name or "").rpartition("/")[0]


def _shuffle_order(node: ir.Node) -> Order | None:
    if node.op_type != "Reshape" or node.inputs[0] is None:
        return None
    transpose = node.inputs[0].producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        return None
    split = transpose.inputs[0].producer()
    if split is None or split.op_type != "Reshape":
        return None
    before, after = static_shape(split.inputs[0]), static_shape(node.outputs[0])
    view, axes = static_shape(split.outputs[0]), attribute(transpose, "perm")
    if before is None or after is None or view is None or axes is None or len(before) < 2:
        return None
    if before[1:] != after[1:] or None in before[1:] or not isinstance(before[1], int):
        return None
    if not keeps_batch(before, view) or not keeps_batch(before, after):
        return None
    for count in range(2, len(view)):
        factors = [factor for factor in view[1 : 1 + count] if isinstance(factor, int)]
        if len(factors) == count and product(factors) == before[1]:
            moved, fixed = axes[1 : 1 + count], [0, *range(1 + count, len(view))]
            if sorted(moved) != list(range(1, 1 + count)) or [axes[axis] for axis in fixed] != fixed:
                return None
            numbered = np.arange(before[1]).reshape(factors)
            return numbered.transpose([axis - 1 for axis in moved]).reshape(-1).astype(np.int64)
    return None


def _sink(graph: ir.Graph) -> None:
    """Move each permutation behind the operations that treat all channels alike, one after the other."""
    for node in list(graph):
        role = role_of(node)
        if not isinstance(role, Permute):
            continue
        while (reader := only_reader(node.outputs[0])) is not None:
            behind = role_of(reader)
            if not isinstance(behind, Same) or behind.inputs != (0,) or behind.factor != 1:
                break
            _swap(graph, node, reader, role.order, behind)


def _swap(graph: ir.Graph, permutation: ir.Node, reader: ir.Node, order: Order, role: Same) -> None:
    """Turn ``reader(permutation(x))`` into ``permutation(reader(x))``."""
    source, inner, outer = permutation.inputs[0], permutation.outputs[0], reader.outputs[0]
    assert source is not None
    back = inverse(order)
    for index, axis in role.constants:
        _permute_constant(graph, reader, index, axis, back)
    reader.replace_input_with(0, source)
    replace_value(graph, outer, inner)
    permutation.replace_input_with(0, outer)
    inner.shape, inner.type = outer.shape, outer.type
    graph.remove(permutation)
    graph.insert_after(reader, permutation)


def _permute_constant(graph: ir.Graph, node: ir.Node, index: int, axis: int, order: Order) -> None:
    if not is_identity(order):
        replace_constant(graph, node, index, np.take(known_constant(node.inputs[index]), order, axis))


def _rewrite_weights(graph: ir.Graph, orders: ChannelOrders) -> None:
    for node in graph:
        role = orders.roles[node]
        stored = orders.of(node.outputs[0]) if node.outputs else None
        if isinstance(role, Same) and stored is not None:
            for index, axis in role.constants:
                _permute_constant(graph, node, index, axis, stored)
        elif isinstance(role, Convolution) and stored is not None:
            source = orders.of(node.inputs[0]) if role.groups == 1 else orders.of_reader(node, 0)
            assert source is not None
            _rewrite_conv(graph, node, role.groups, source, stored)
        elif isinstance(role, Linear) and stored is not None:
            source = orders.of(node.inputs[0])
            assert source is not None
            _permute_constant(graph, node, 1, role.weight_columns_axis, source)
            _permute_constant(graph, node, 1, 1 - role.weight_columns_axis, stored)
            _permute_bias(graph, node, stored)


def _rewrite_conv(graph: ir.Graph, node: ir.Node, groups: int, source: Order, stored: Order) -> None:
    """Store a conv's output channels, and each group's input channels, in other orders."""
    if is_identity(source) and is_identity(stored):
        return
    weights = known_constant(node.inputs[1])
    width = len(source) // groups
    columns = source.reshape(groups, width) - np.arange(groups)[:, None] * width
    group_of_row = stored // (len(stored) // groups)
    rows = [weights[row][columns[group]] for row, group in zip(stored, group_of_row, strict=True)]
    replace_constant(graph, node, 1, np.stack(rows))
    _permute_bias(graph, node, stored)


def _permute_bias(graph: ir.Graph, node: ir.Node, order: Order) -> None:
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if bias is not None and bias.ndim and bias.shape[-1] == len(order):
        _permute_constant(graph, node, 2, bias.ndim - 1, order)


def _rewrite_edges(graph: ir.Graph, orders: ChannelOrders) -> None:
    gathered: dict[tuple[int, bytes], ir.Value] = {}
    for edge in orders.edges:
        left = orders.residual(edge)
        if edge.node is not None and isinstance(orders.roles[edge.node], Permute):
            source = edge.node.inputs[0]
            assert source is not None
            if is_identity(left):
                replace_value(graph, edge.node.outputs[0], source)
            else:
                replace_constant(graph, edge.node, 1, left)
        elif not is_identity(left):
            _gather_for_reader(graph, edge, left, gathered)


def _gather_for_reader(
    graph: ir.Graph, edge: Edge, order: Order, gathered: dict[tuple[int, bytes], ir.Value]
) -> None:
    """Put a gather in front of one reader, or let it share that of another."""
    # Not edge.value: a permutation in front of it may have been removed by now.
    value = graph.outputs[edge.index] if edge.node is None else edge.node.inputs[edge.index]
    assert value is not None
    if edge.node is None:
        replace_output(graph, edge.index, insert_gather(graph, value, order, "Shuffle.output", None))
        return
    key = (id(value), order.tobytes())
    if key not in gathered:
        gathered[key] = insert_gather(graph, value, order, _name(edge.node), edge.node)
    edge.node.replace_input_with(edge.index, gathered[key])


def fold_batch_norms(graph: ir.Graph) -> int:
    """Fold each batch norm into the conv in front of it; return how many are left.

    The exporter does so where the two are neighbours; moving a shuffle away makes more of them neighbours.
    """
    left = 0
    for node in list(graph):
        if node.op_type == "BatchNormalization" and not _fold_batch_norm(graph, node):
            left += 1
    remove_dead(graph)
    return left


def _fold_batch_norm(graph: ir.Graph, norm: ir.Node) -> bool:
    source = norm.inputs[0]
    conv = source.producer() if source is not None else None
    if conv is None or conv.op_type != "Conv" or source is None or len(source.uses()) != 1:
        return False
    biased = len(conv.inputs) > 2 and conv.inputs[2] is not None
    weights, bias = constant(conv.inputs[1]), constant(conv.inputs[2]) if biased else None
    parameters = [constant(value) for value in norm.inputs[1:5]]
    if source.is_graph_output() or weights is None or (biased and bias is None):
        return False
    if any(parameter is None for parameter in parameters):
        return False
    scale, shift, mean, variance = (np.asarray(parameter, np.float64) for parameter in parameters)
    factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    folded = shift + ((bias if bias is not None else 0.0) - mean) * factor
    per_filter = factor.reshape(-1, *[1] * (weights.ndim - 1))
    replace_constant(graph, conv, 1, (weights * per_filter).astype(weights.dtype))
    if biased:
        replace_constant(graph, conv, 2, folded.astype(weights.dtype))
    else:
        value = new_constant(graph, f"{_stem(conv.inputs[1])}.bias", folded.astype(weights.dtype))
        conv.resize_inputs(3)
        conv.replace_input_with(2, value)
    # The conv now computes the output of the batch norm's module; node names say so throughout.
    conv.name, norm.name = (norm.name or "").replace("/BatchNormalization", "/Conv") or conv.name, None
    replace_value(graph, norm.outputs[0], conv.outputs[0])
    graph.remove(norm, safe=True)
    return True


def _stem(value: ir.Value | None) -> str:
    name = (value.name if value is not None else None) or "conv.weight"
    return name.removesuffix(".weight")


def pool_means(graph: ir.Graph) -> None:
    """Turn means over both spatial dimensions into ``GlobalAveragePool``, which has a blocked kernel."""
    for node in list(graph):
        shape = static_shape(node.inputs[0]) if node.inputs else None
        if node.op_type != "ReduceMean" or shape is None or len(shape) != 4 or len(node.inputs) < 2:
            continue
        axes = constant(node.inputs[1])
        if (
            axes is None
            or sorted(axis % 4 for axis in axes.tolist()) != [2, 3]
            or not attribute(node, "keepdims", 1)
        ):
            continue
        old = node.outputs[0]
        output = ir.Value(name=f"{old.name}.pooled", type=old.type, shape=old.shape)
        name = (node.name or "").replace("/ReduceMean", "/GlobalAveragePool")
        graph.insert_before(
            node, ir.Node("", "GlobalAveragePool", [node.inputs[0]], outputs=[output], name=name)
        )
        replace_value(graph, old, output)
    remove_dead(graph)
