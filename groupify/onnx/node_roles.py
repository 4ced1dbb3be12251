"""What a node does to the order of the channels it reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from groupify.onnx.graph_edits import (
    Order,
    attribute,
    channels,
    constant,
    keeps_batch,
    product,
    static_shape,
)

_ELEMENTWISE = frozenset(
    (
        *("Abs", "Cast", "Ceil", "Celu", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
        *("HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu"),
        *("Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Tanh", "ThresholdedRelu"),
    )
)
_POOLING = frozenset(["AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"])
_BROADCASTING = frozenset(["Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Sum"])


@dataclass(frozen=True)
class Permute:
    """``output = input[:, order]``."""

    order: Order


@dataclass(frozen=True)
class Same:
    """The output has the channel order of its inputs.

    ``factor`` output elements per channel (more than 1 where spatial dimensions are flattened into it).
    """

    inputs: tuple[int, ...]
    constants: tuple[tuple[int, int], ...] = ()  # (input, its axis that holds the channels)
    factor: int = 1


@dataclass(frozen=True)
class Convolution:
    """A conv of constant weights; its rows and, inside each group, its columns may be stored in any order."""

    groups: int


@dataclass(frozen=True)
class Linear:
    """A matrix product with constant weights."""

    weight_columns_axis: int  # the axis of the weights along which the inputs lie


@dataclass(frozen=True)
class Concatenation:
    """The inputs one behind the other along the channels."""


@dataclass(frozen=True)
class Shapeless:
    """Reads only the shape, whatever the order."""


@dataclass(frozen=True)
class Opaque:
    """Anything else: it must see the channels in their own order."""


Role = Permute | Same | Convolution | Linear | Concatenation | Shapeless | Opaque


def role_of(node: ir.Node) -> Role:
    """Classify one node; what is not known to be safe is opaque."""
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1 or not node.inputs:
        return Opaque()
    kind = node.op_type
    if kind == "Shape":
        return Shapeless()
    if kind == "Conv":
        return _convolution(node)
    if kind in ("Gemm", "MatMul"):
        return _linear(node)
    data, output = node.inputs[0], node.outputs[0]
    if data is None or channels(data) is None or channels(output) is None:
        return Opaque()
    if kind in _BROADCASTING:
        return _broadcasting(node)
    if channels(data) == channels(output):
        if kind in _ELEMENTWISE or kind in _POOLING:
            return Same((0,))
        if kind in ("Clip", "Resize") and all(
            constant(value) is not None for value in node.inputs[1:] if value
        ):
            return Same((0,))
    if kind == "BatchNormalization":
        return Same((0,), tuple((index, 0) for index in range(1, 5)))
    if kind == "ReduceMean":
        return _reduction(node)
    if kind in ("Reshape", "Flatten", "Squeeze"):
        return _reshape(data, output)
    if kind == "Concat" and attribute(node, "axis") == 1:
        return Concatenation() if all(channels(value) for value in node.inputs) else Opaque()
    if kind == "Gather" and attribute(node, "axis", 0) == 1:
        return _gather(node)
    return Opaque()


def _convolution(node: ir.Node) -> Role:
    weights = constant(node.inputs[1])
    biased = len(node.inputs) > 2 and node.inputs[2] is not None
    if weights is None or (biased and constant(node.inputs[2]) is None) or channels(node.inputs[0]) is None:
        return Opaque()
    groups = attribute(node, "group", 1)
    if groups > 1 and weights.shape[1] == 1 and weights.shape[0] == groups:
        return Same((0,), ((1, 0), (2, 0)) if biased else ((1, 0),))
    return Convolution(groups)


def _linear(node: ir.Node) -> Role:
    data = static_shape(node.inputs[0])
    weights = constant(node.inputs[1])
    if data is None or len(data) != 2 or weights is None or weights.ndim != 2:
        return Opaque()
    if node.op_type == "MatMul":
        return Linear(0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if attribute(node, "transA", 0) or (bias is not None and constant(bias) is None):
        return Opaque()
    return Linear(1 if attribute(node, "transB", 0) else 0)


def _broadcasting(node: ir.Node) -> Role:
    output = node.outputs[0]
    count, rank = channels(output), len(static_shape(output) or ())
    inputs, constants = [], []
    for index, value in enumerate(node.inputs):
        shape = static_shape(value)
        if shape is None:
            return Opaque()
        axis = 1 - (rank - len(shape))  # broadcasting lines the shapes up at their ends
        wide = axis >= 0 and shape[axis] == count
        if not wide and axis >= 0 and shape[axis] != 1:
            return Opaque()
        if not wide:
            # One value for all channels, a constant or a map without channels.
            if constant(value) is None and shape and not (len(shape) == rank and shape[1] == 1):
                return Opaque()
        elif constant(value) is not None:
            constants.append((index, axis))
        elif len(shape) == rank:
            inputs.append(index)
        else:
            return Opaque()
    return Same(tuple(inputs), tuple(constants)) if inputs and count != 1 else Opaque()


def _reduction(node: ir.Node) -> Role:
    axes = attribute(node, "axes")
    if axes is None:
        found = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = None if found is None else found.tolist()
    rank = len(static_shape(node.inputs[0]) or ())
    if not axes or any(axis % rank < 2 for axis in axes):
        return Opaque()
    return Same((0,))


def _reshape(data: ir.Value, output: ir.Value) -> Role:
    before, after = static_shape(data), static_shape(output)
    if before is None or after is None or not keeps_batch(before, after):
        return Opaque()
    if before[1] == after[1]:
        return Same((0,))
    factor = product(before[2:])
    if len(after) == 2 and factor is not None and after[1] == product(before[1:]):
        return Same((0,), factor=factor)
    return Opaque()


def _gather(node: ir.Node) -> Role:
    order = constant(node.inputs[1])
    count = channels(node.inputs[0])
    if order is None or order.ndim != 1 or count is None or sorted(order.tolist()) != list(range(count)):
        return Opaque()
    return Permute(order.astype(np.int64))
