"""Rewrites of an exported graph into forms that ONNX Runtime's optimisers recognise."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from groupify.onnx.graph_edits import (
    attribute,
    constant,
    new_constant,
    remove_dead,
    replace_constant,
    replace_value,
    static_shape,
)
from groupify.onnx.permutations import PermutationFolding, fold_permutations


def optimise(graph: ir.Graph) -> PermutationFolding:
    """Run all passes on an exported graph, in place; one with branches or loops is left as it is."""
    if any(isinstance(entry.value, ir.Graph) for node in graph for entry in node.attributes.values()):
        # A branch or loop may read any value of this graph without saying so.
        return PermutationFolding(0, 0)
    folding = fold_permutations(graph)
    fold_batch_norms(graph)
    pool_means(graph)
    return folding


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
