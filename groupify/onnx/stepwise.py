"""Run a quantised graph node by node over all batches, so that nodes can be changed on the way.

Between the nodes lie the 8-bit values that the file quantises to, and inside them are floats, as the file
says: what the integer kernels compute, up to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper

from groupify.onnx.exposed import readers_of, weights_of
from groupify.onnx.int8.ranges import Feed
from groupify.onnx.runtime import open_session

Values = list[npt.NDArray[Any]]  # of one tensor, batch by batch


class StepwiseRun:
    """A run of a quantised model that stops where its caller wants.

    Args:
        model: it may be changed while it runs, but not its nodes.
        batches: what it is fed.
    """

    def __init__(self, model: onnx.ModelProto, batches: Sequence[Feed]) -> None:
        self._model = model
        self._batches = len(batches)
        self._weights = weights_of(model.graph)
        self._producers = {output: node for node in model.graph.node for output in node.output}
        self._readers = readers_of(model.graph.node)
        self._stored: dict[str, Values] = {
            source.name: [batch[source.name] for batch in batches]
            for source in model.graph.input
            if source.name not in self._weights
        }
        self.steps = [node for node in model.graph.node if not self._is_part(node)]
        self._left: dict[str, int] = {}
        for node in self.steps:
            for name in self._sources(node):
                self._left[name] = self._left.get(name, 0) + 1

    def outputs(self, node: onnx.NodeProto) -> Iterator[npt.NDArray[Any]]:
        """Give what a step computes before it is quantised, batch by batch, and keep nothing."""
        for (values,) in self._run(node, [node], node.output[:1]):
            yield values

    def advance(self, node: onnx.NodeProto) -> None:
        """Run the next step and keep what later ones read of it."""
        quantising = [
            reader
            for output in node.output
            for reader in self._readers.get(output, ())
            if reader.op_type == "QuantizeLinear" and reader is not node
        ]
        kept = [output for output in node.output if output in self._left]
        kept += [output for reader in quantising for output in reader.output if output in self._left]
        found: dict[str, Values] = {name: [] for name in kept}
        if kept:
            for values in self._run(node, [node, *quantising], kept):
                for name, value in zip(kept, values, strict=True):
                    found[name].append(value)
        self._stored |= found
        self._forget(self._sources(node))

    def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            self._left[name] -= 1
            if self._left[name] == 0:
                del self._stored[name]

    def _is_part(self, node: onnx.NodeProto) -> bool:
        """Whether a node runs along with a neighbour: with its reader if it dequantises, else its source."""
        if node.op_type == "DequantizeLinear":
            return True
        source = self._producers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        return source is not None and source.op_type != "DequantizeLinear"

    def _dequantising(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        producers = (self._producers.get(source) for source in dict.fromkeys(node.input))
        return [found for found in producers if found is not None and found.op_type == "DequantizeLinear"]

    def _sources(self, node: onnx.NodeProto) -> list[str]:
        """The values other than weights that a step reads, behind what dequantises them."""
        parts = self._dequantising(node)
        made = {output for part in parts for output in part.output}
        names = [name for name in node.input if name and name not in made]
        names += [part.input[0] for part in parts]
        return [name for name in dict.fromkeys(names) if name not in self._weights]

    def _run(
        self, node: onnx.NodeProto, behind: Sequence[onnx.NodeProto], outputs: Sequence[str]
    ) -> Iterator[Values]:
        """Run a step on all batches, from what dequantises its inputs to what quantises its outputs."""
        sources = self._sources(node)
        nodes = [*self._dequantising(node), *behind]
        read = dict.fromkeys(name for part in nodes for name in part.input)
        graph = helper.make_graph(
            nodes,
            "step",
            [self._described(name) for name in sources],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [self._weights[name] for name in read if name in self._weights],
        )
        model = helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )
        session = open_session(model.SerializeToString(), optimise=False, threads=torch.get_num_threads())
        for batch in range(self._batches):
            yield session.run(list(outputs), {name: self._stored[name][batch] for name in sources})

    def _described(self, name: str) -> onnx.ValueInfoProto:
        """A value for the runtime: of its sizes where all batches have the same, as a shape has."""
        first, *others = self._stored[name]
        kind = helper.np_dtype_to_tensor_dtype(np.asarray(first).dtype)
        fixed = all(value.shape == first.shape for value in others)
        return helper.make_tensor_value_info(name, kind, first.shape if fixed else [None] * first.ndim)
