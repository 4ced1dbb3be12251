"""Repairs of a graph that ONNX Runtime's quantiser wrote."""

from __future__ import annotations

import onnx
from onnx import helper

from groupify.onnx.exposed import readers_of, weights_of

_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm")


def keep_linear_outputs(graph: onnx.GraphProto) -> None:
    """Hand out what linear layers compute as it is, in place: the integer kernel gives floats as fast.

    The quantiser rounds it to 8 bits, which class scores and regressed numbers need not suffer.
    """
    producers = {output: node for node in graph.node for output in node.output}
    readers = readers_of(graph.node)
    for output in graph.output:
        last = _of_kind(producers.get(output.name), "DequantizeLinear")
        rounding = _of_kind(producers.get(last.input[0]), "QuantizeLinear") if last is not None else None
        layer = _of_kind(producers.get(rounding.input[0]), "Gemm") if rounding is not None else None
        if last is None or rounding is None or layer is None or output.name in readers:
            continue
        if len(readers[rounding.input[0]]) == len(readers[last.input[0]]) == 1:
            layer.output[0] = output.name
            graph.node.remove(rounding)
            graph.node.remove(last)


def protect_float_layers(graph: onnx.GraphProto) -> None:
    """Keep ONNX Runtime from quantising the layers that were left in float32, in place.

    Between 8-bit values it would: their weights per tensor, which ruins a depthwise conv. It does not behind
    other operators than a ReLU or a clipping, so that one that changes nothing is put there; with a conv it
    runs fused.
    """
    weights, readers = weights_of(graph), readers_of(graph.node)
    dequantised = {
        output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output
    }
    nodes = []
    for node in graph.node:
        nodes.append(node)
        is_float = node.op_type in _WITH_WEIGHTS and node.input[1] in weights
        if is_float and node.input[0] in dequantised and node.output[0] in readers:
            result, inner = node.output[0], f"{node.output[0]}.float32"
            node.output[0] = inner
            name = f"{node.name}.float32"
            nodes.append(helper.make_node("LeakyRelu", [inner], [result], name=name, alpha=1.0))
    if len(nodes) > len(graph.node):
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)


def _of_kind(node: onnx.NodeProto | None, kind: str) -> onnx.NodeProto | None:
    return node if node is not None and node.op_type == kind else None
