"""An int8 file in PyTorch: float arithmetic, every tensor rounded to the steps that the file gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor


def fake_quantised(path: Path, images: Tensor) -> Tensor:
    """Run an int8 file of a small CNN on images; return its first output."""
    graph = onnx.load(str(path)).graph
    values = {
        weights.name: torch.from_numpy(numpy_helper.to_array(weights).copy()) for weights in graph.initializer
    }
    values[graph.input[0].name] = images
    for node in graph.node:
        inputs = [values[name] for name in node.input]
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        values[node.output[0]] = _OPERATORS[node.op_type](inputs, attributes)
    return values[graph.output[0].name]


def _by_channel(parameter: Tensor, like: Tensor, axis: int) -> Tensor:
    return (
        parameter.reshape([-1 if d == axis else 1 for d in range(like.dim())])
        if parameter.dim()
        else parameter
    )


def _quantise(inputs: list[Tensor], attributes: dict[str, Any]) -> Tensor:
    values, scale, zero = inputs
    assert zero.dtype == torch.uint8
    return torch.round(values / scale + zero).clamp(0, 255).to(torch.uint8)


def _dequantise(inputs: list[Tensor], attributes: dict[str, Any]) -> Tensor:
    values, scale, *zero = inputs
    axis = attributes.get("axis", 1)
    shifted = values.double() - (_by_channel(zero[0].double(), values, axis) if zero else 0)
    return (shifted * _by_channel(scale.double(), values, axis)).float()


def _conv(inputs: list[Tensor], attributes: dict[str, Any]) -> Tensor:
    data, weights, *bias = inputs
    rank = weights.dim() - 2
    pads = attributes.get("pads", [0] * 2 * rank)
    both = [pads[d + side * rank] for d in reversed(range(rank)) for side in (0, 1)]
    return F.conv2d(
        F.pad(data, both), weights, bias[0] if bias else None, attributes.get("strides", 1), 0,
        attributes.get("dilations", 1), attributes.get("group", 1),
    )  # fmt: skip


def _gemm(inputs: list[Tensor], attributes: dict[str, Any]) -> Tensor:
    data, weights, bias = inputs
    return data @ (weights.T if attributes.get("transB") else weights) + bias


def _max_pool(inputs: list[Tensor], attributes: dict[str, Any]) -> Tensor:
    pad = attributes.get("pads", [0])[0]
    data = inputs[0]
    return F.max_pool2d(data, attributes["kernel_shape"], attributes.get("strides"), pad)


_OPERATORS: dict[str, Callable[[list[Tensor], dict[str, Any]], Tensor]] = {
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _dequantise,
    "Conv": _conv,
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "Relu": lambda inputs, _: inputs[0].relu(),
    "Add": lambda inputs, _: inputs[0] + inputs[1],
    "GlobalAveragePool": lambda inputs, _: inputs[0].mean((2, 3), keepdim=True),
    "Flatten": lambda inputs, _: inputs[0].flatten(1),
    "Reshape": lambda inputs, _: inputs[0].reshape([len(inputs[0]), *inputs[1].tolist()[1:]]),
}
