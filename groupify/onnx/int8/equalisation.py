"""Scale the channels between two convs alike, so that one int8 step suits all of them.

What a conv's output channel is multiplied by, the conv behind can divide by: exact as long as nothing but
positively homogeneous operators, a ReLU or a pooling, lies between (Nagel, van Baalen, Blankevoort and
Welling, 2019). Factors of a conv, with nothing in between, always allow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from groupify.onnx.exposed import exposing, has_branches, readers_of, weights_of
from groupify.onnx.int8.ranges import Feed

_HOMOGENEOUS = frozenset(
    ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "LeakyRelu", "MaxPool", "Relu")
)
# Of the channels' ranges against those of the weights that read them: ½, ¾ and 1 were tried.
_POWER = 0.75
# Ranges and weights below this share of the largest are not scaled any further.
_LEAST = 1e-3


@dataclass(frozen=True)
class Pair:
    """Two convs, the second of which alone reads the channels of the first.

    Attributes:
        first, second: the nodes.
        between: the value that the second reads.
    """

    first: onnx.NodeProto
    second: onnx.NodeProto
    between: str


def equalise(model: onnx.ModelProto, batches: Sequence[Feed]) -> int:
    """Equalise the channels of all pairs of convs in place; the function stays the same up to rounding.

    Args:
        model: a float model.
        batches: what it is fed, for the ranges of the channels.

    Returns:
        The number of pairs.
    """
    if has_branches(model.graph):
        return 0
    pairs = find_pairs(model.graph)
    ranges = _channel_ranges(model, [pair.between for pair in pairs], batches)
    weights = weights_of(model.graph)
    for pair in pairs:
        columns = _columns(numpy_helper.to_array(weights[pair.second.input[1]]), _groups(pair.second))
        scale = _scale(ranges[pair.between], columns)
        for name in filter(None, pair.first.input[1:]):
            _multiply(weights[name], np.reciprocal(scale))
        _multiply_columns(weights[pair.second.input[1]], scale, _groups(pair.second))
    return len(pairs)


def find_pairs(graph: onnx.GraphProto) -> list[Pair]:
    """Return the pairs of convs whose channels can be scaled."""
    readers, weights = readers_of(graph.node), weights_of(graph)
    handed_out = {output.name for output in graph.output}

    def own(node: onnx.NodeProto) -> bool:
        names = [name for name in node.input[1:] if name]
        return all(name in weights and len(readers[name]) == 1 for name in names)

    pairs = []
    for first in graph.node:
        if first.op_type != "Conv" or not own(first):
            continue
        value = first.output[0]
        while value not in handed_out and len(readers.get(value, ())) == 1:
            reader = readers[value][0]
            if reader.op_type == "Conv" and reader.input[0] == value and own(reader):
                pairs.append(Pair(first, reader, value))
            if reader.op_type not in _HOMOGENEOUS or len(reader.output) > 1:
                break
            value = reader.output[0]
    return pairs


def _groups(conv: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in conv.attribute if attribute.name == "group"), 1)


def _channel_ranges(
    model: onnx.ModelProto, names: Sequence[str], batches: Sequence[Feed]
) -> dict[str, npt.NDArray[np.float32]]:
    """The largest absolute value of each channel, shape (C,)."""
    found: dict[str, npt.NDArray[np.float32]] = {}
    if not names:
        return found
    with exposing(model, names) as session:
        for batch in batches:
            for name, value in zip(names, session.run(list(names), dict(batch)), strict=True):
                largest = np.abs(value).max(axis=tuple(axis for axis in range(value.ndim) if axis != 1))
                found[name] = np.maximum(found.get(name, 0), largest)
    return found


def _columns(weights: npt.NDArray[np.float32], groups: int) -> npt.NDArray[np.float32]:
    """How much of a filter's range the weights of each input channel take up at most, shape (C,)."""
    sizes = np.abs(weights).reshape(groups, len(weights) // groups, weights.shape[1], -1).max(axis=-1)
    filters = sizes.max(axis=2, keepdims=True)
    shares = np.divide(sizes, filters, out=np.zeros_like(sizes), where=filters > 0)
    return np.asarray(shares.max(axis=1).reshape(-1))


def _scale(ranges: npt.NDArray[np.float32], columns: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What each channel is divided by; 1 in the geometric mean."""
    if ranges.max() == 0:
        return np.ones_like(ranges)
    clamped = np.maximum(ranges, _LEAST * ranges.max())
    logarithms = _POWER * np.log(clamped) - (1 - _POWER) * np.log(np.maximum(columns, _LEAST))
    return np.asarray(np.exp(logarithms - logarithms.mean()), dtype=np.float32)


def _multiply(tensor: onnx.TensorProto, factors: npt.NDArray[np.float32]) -> None:
    values = numpy_helper.to_array(tensor)
    scaled = values * factors.reshape(-1, *[1] * (values.ndim - 1))
    tensor.CopyFrom(numpy_helper.from_array(scaled.astype(values.dtype), tensor.name))


def _multiply_columns(tensor: onnx.TensorProto, factors: npt.NDArray[np.float32], groups: int) -> None:
    values = numpy_helper.to_array(tensor)
    by_group = values.reshape(groups, len(values) // groups, *values.shape[1:])
    scaled = by_group * factors.reshape(groups, 1, values.shape[1], *[1] * (values.ndim - 2))
    tensor.CopyFrom(numpy_helper.from_array(scaled.reshape(values.shape).astype(values.dtype), tensor.name))
