"""Correct the biases of a quantised file, layer by layer, for the mean error of what they are added to.

Rounding and clipping shift the mean of a layer's outputs, and such shifts add up from layer to layer where
few weights are summed, as in depthwise convs. In the order in which the layers run, each gets back the mean
that the float file has, on the inputs that the quantised file feeds it (Nagel, van Baalen, Blankevoort and
Welling, 2019).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from groupify.onnx.exposed import exposing, has_branches, readers_of, weights_of
from groupify.onnx.int8.ranges import Feed
from groupify.onnx.stepwise import StepwiseRun

Mean = npt.NDArray[np.float64]  # of each channel, shape (C,)
# The layers with a bias → the axis of their channels.
_CHANNEL_AXES = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1}


def correct_biases(quantised: onnx.ModelProto, model: onnx.ModelProto, batches: Sequence[Feed]) -> int:
    """Correct the biases of a quantised model in place.

    Args:
        quantised: with the node names of the float model.
        model: the float model.
        batches: what both are fed.

    Returns:
        The number of layers whose bias was corrected.
    """
    biases = _biases(quantised.graph)
    if has_branches(quantised.graph) or not biases:
        return 0
    wanted = _means(model, biases.keys(), batches)
    run = StepwiseRun(quantised, batches)
    corrected = 0
    for node in run.steps:
        if node.name in wanted:
            found = _Sum(_CHANNEL_AXES[node.op_type])
            for values in run.outputs(node):
                found.add(values)
            biases[node.name].add(wanted[node.name] - found.mean)
            corrected += 1
        if corrected == len(wanted):
            break
        run.advance(node)
    return corrected


@dataclass(frozen=True)
class Bias:
    """Where a layer's bias is kept.

    Attributes:
        tensor: floats, or 32-bit integers.
        scale: of the integers, one number or one for each channel; None for floats.
    """

    tensor: onnx.TensorProto
    scale: npt.NDArray[np.float32] | None

    def add(self, values: Mean) -> None:
        """Add to the bias, in place."""
        old = numpy_helper.to_array(self.tensor)
        if self.scale is None:
            new = (old + values).astype(old.dtype)
        else:
            limits = np.iinfo(old.dtype)
            new = np.rint(old + values / self.scale).clip(limits.min, limits.max).astype(old.dtype)
        self.tensor.CopyFrom(numpy_helper.from_array(new, self.tensor.name))


def _biases(graph: onnx.GraphProto) -> dict[str, Bias]:
    """The biases that one layer alone has, by the name of its node."""
    weights, readers = weights_of(graph), readers_of(graph.node)
    producers = {output: node for node in graph.node for output in node.output}
    found = {}
    for node in graph.node:
        if node.op_type not in _CHANNEL_AXES or not node.name or len(node.input) < 3 or not node.input[2]:
            continue
        name, scale, source = node.input[2], None, producers.get(node.input[2])
        alone = len(readers[name]) == 1
        if source is not None and source.op_type == "DequantizeLinear" and source.input[1] in weights:
            name, scale = source.input[0], numpy_helper.to_array(weights[source.input[1]])
        if alone and name in weights and len(readers[name]) == 1:
            found[node.name] = Bias(weights[name], scale)
    return found


def _means(model: onnx.ModelProto, nodes: Collection[str], batches: Sequence[Feed]) -> dict[str, Mean]:
    """The mean output of each channel, by the name of the node."""
    kinds = {node.output[0]: node for node in model.graph.node if node.name in nodes}
    sums: dict[str, _Sum] = {node.name: _Sum(_CHANNEL_AXES[node.op_type]) for node in kinds.values()}
    with exposing(model, kinds) as session:
        for batch in batches:
            for name, values in zip(kinds, session.run(list(kinds), dict(batch)), strict=True):
                sums[kinds[name].name].add(values)
    return {name: total.mean for name, total in sums.items()}


class _Sum:
    """Adds up values by channel."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._total: Any = 0.0
        self._count = 0

    def add(self, values: npt.NDArray[Any]) -> None:
        channel = self._axis % values.ndim
        self._total += values.sum(
            tuple(axis for axis in range(values.ndim) if axis != channel), dtype=np.float64
        )
        self._count += values.size // values.shape[channel]

    @property
    def mean(self) -> Mean:
        return np.asarray(self._total / self._count)
