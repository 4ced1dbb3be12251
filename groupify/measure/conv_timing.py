"""Time single convs in ONNX Runtime as they would run inside a network.

Each conv stands between two cheap 1×1 convs that are not counted, with its activation behind it: its input
comes in ONNX Runtime's blocked layout and its output goes on in it, so that a reorder of the layout is only
counted where the conv itself forces one. Many convs share one session and run in turns, so that weights have
left the caches when their turn comes, as in a network. The times are those of ONNX Runtime's own profiler.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from tqdm import tqdm

from groupify.machine import chunks
from groupify.measure.benchmarks import UNDISTURBED, percentile
from groupify.measure.profiling import kernel_times
from groupify.onnx.lowering import optimise
from groupify.onnx.tracing import OPSET
from groupify.structures import ConvShape, Structure

_SESSION_BYTES = 2**28  # of weights and activations in one session
_IR_VERSION = 9
_AS_IT_IS = Structure()
_END = re.compile(r"(before|after)(\d+)(_nchwc)?")


@dataclass(frozen=True)
class TimedConv:
    """A conv and what replaces it.

    Attributes:
        in_channels, out_channels, kernel_size, stride, dilation: as in the conv itself.
        padding: in front along each dimension, then behind, pixels.
        input_size: spatial size, pixels.
        groups: number of groups of the conv itself.
        structure: what it becomes.
        shuffle: whether a channel shuffle follows behind the activation.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    input_size: tuple[int, ...]
    groups: int = 1
    structure: Structure = _AS_IT_IS
    shuffle: bool = False

    def __str__(self) -> str:
        def by(sizes: Sequence[int]) -> str:
            return "x".join(map(str, sizes))

        return (
            f"{self.in_channels}x{by(self.input_size)} to {self.out_channels}, "
            f"kernel {by(self.kernel_size)}, "
            f"stride {by(self.stride)}, padding {by(self.padding)}, dilation {by(self.dilation)}, "
            f"groups {self.groups}, structure {self.structure}" + (", shuffle" if self.shuffle else "")
        )  # fmt: skip

    @property
    def dense(self) -> TimedConv:
        """The conv as it is."""
        return replace(self, structure=Structure(groups=self.groups), shuffle=False)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.structure.parameters(
            ConvShape(self.in_channels, self.out_channels, self.kernel_size, self.groups)
        )

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output, pixels."""
        dims = len(self.kernel_size)
        ends = zip(self.padding[:dims], self.padding[dims:], strict=True)
        return tuple(
            (size + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1
            for size, pads, kernel, stride, dilation in zip(
                self.input_size, ends, self.kernel_size, self.stride, self.dilation, strict=True
            )
        )


def time_convs(
    shapes: Iterable[TimedConv],
    *,
    threads: int = 1,
    batch_size: int = 1,
    rounds: int = 24,
    warm: bool = False,
    progress: bool = False,
) -> dict[TimedConv, float]:
    """Return the time of each conv with its activation, in milliseconds for one image.

    Args:
        shapes: what to time.
        threads: intra-op threads.
        batch_size: images per run.
        rounds: measured runs of each.
        warm: run each conv over and over instead of many in turns, so that its weights stay in the caches.
        progress: show a bar on stderr.

    Raises:
        GroupifyError: ONNX Runtime refuses a conv.
    """
    sessions = list(
        chunks(
            dict.fromkeys(shapes),
            lambda shape: _session_bytes(shape, batch_size),
            1 if warm else _SESSION_BYTES,
        )
    )
    times: dict[TimedConv, float] = {}
    total = sum(map(len, sessions))
    with tqdm(total=total, desc="latency table", unit="conv", disable=None if progress else True) as bar:
        for session in sessions:
            times |= _time_session(session, threads, batch_size, rounds)
            bar.update(len(session))
    return times


def _session_bytes(shape: TimedConv, batch_size: int) -> int:
    """Memory that one conv takes in a session: its weights, and its tensors with their copies."""
    values = shape.in_channels * math.prod(shape.input_size)
    values += shape.out_channels * math.prod(shape.output_size)
    return 4 * (shape.weights + 3 * batch_size * values)


def _time_session(
    shapes: Sequence[TimedConv], threads: int, batch_size: int, rounds: int
) -> dict[TimedConv, float]:
    graph = _Graph(batch_size)
    for number, shape in enumerate(shapes):
        graph.add(number, shape)
    with tempfile.TemporaryDirectory(prefix="groupify-") as folder:
        optimised = Path(folder, "optimised.onnx")
        durations = kernel_times(graph.serialised(), threads, rounds, save_optimised=optimised)
        owners = _owners(onnx.load(str(optimised), load_external_data=False).graph.node)
    runs: dict[int, list[float]] = {number: [0.0] * rounds for number in range(len(shapes))}
    for (_, name), values in durations.items():
        if name in owners:
            runs[owners[name]] = [sum(pair) for pair in zip(runs[owners[name]], values, strict=True)]
    return {shape: percentile(runs[number], UNDISTURBED) / batch_size for number, shape in enumerate(shapes)}


def _owners(nodes: Iterable[Any]) -> Mapping[str, int]:
    """Nodes between ``before`` and ``after`` of each conv, in the graph that ONNX Runtime really runs."""
    owner_of_value: dict[str, int] = {}
    owners: dict[str, int] = {}
    pending = list(nodes)
    while pending:
        waiting = []
        produced = {output for node in pending for output in node.output}
        for node in pending:
            if any(value in produced for value in node.input):
                waiting.append(node)
                continue
            end = _END.fullmatch(node.name)
            if end is not None:
                if end[1] == "before":
                    owner_of_value |= dict.fromkeys(node.output, int(end[2]))
                continue
            found = {owner_of_value[value] for value in node.input if value in owner_of_value}
            if found:
                owners[node.name] = found.pop()
                owner_of_value |= dict.fromkeys(node.output, owners[node.name])
        pending = waiting
    return owners


class _Graph:
    """An ONNX graph of independent branches, one for each conv."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._generator = np.random.default_rng(0)
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def add(self, number: int, shape: TimedConv) -> None:
        """Add the branch of one conv."""
        channels, outputs = shape.in_channels, shape.out_channels
        point = (1,) * len(shape.kernel_size)
        kind = onnx.TensorProto.FLOAT
        source = f"input{number}"
        self._inputs.append(
            helper.make_tensor_value_info(source, kind, [self._batch_size, channels, *shape.input_size])
        )
        value = self._conv(f"before{number}", source, channels, channels, channels, kernel_shape=point)
        value = self._structure(number, value, shape)
        value = self._node("Relu", f"relu{number}", [value])
        readers = outputs
        if shape.shuffle:
            swapped = [0, 2, 1, *range(3, 3 + len(point))]
            for step, perm in ((0, None), (1, swapped), (2, None)):
                value = self._shuffle_step(f"shuffle{number}_{step}", value, shape, step, perm)
            readers = 2  # a shuffle could move through a depthwise conv, away from where it is timed
        value = self._conv(f"after{number}", value, outputs, outputs, readers, kernel_shape=point)
        self._outputs.append(helper.make_tensor_value_info(value, kind, None))

    def _structure(self, number: int, value: str, shape: TimedConv) -> str:
        """Add what the conv becomes; of a 1×1 conv the first takes the stride."""
        point, structure = (1,) * len(shape.kernel_size), shape.structure
        reads, writes = structure.reduce or shape.in_channels, structure.expand or shape.out_channels
        kernel = {
            "kernel_shape": shape.kernel_size, "strides": shape.stride, "dilations": shape.dilation,
            "pads": shape.padding,
        }  # fmt: skip
        plain = {"kernel_shape": point}
        if structure.reduce is not None:
            own, kernel = (kernel, plain) if shape.kernel_size == point else (plain, kernel)
            value = self._conv(f"reduce{number}", value, shape.in_channels, reads, shape.groups, **own)
        value = self._conv(f"conv{number}", value, reads, writes, structure.groups, **kernel)
        if structure.expand is not None:
            value = self._conv(f"expand{number}", value, writes, shape.out_channels, shape.groups, **plain)
        return value

    def serialised(self) -> bytes:
        """Return the model, its shuffles brought into the form that an export gives them."""
        graph = helper.make_graph(self._nodes, "convs", self._inputs, self._outputs, self._weights)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION
        )
        if not any(node.op_type == "Transpose" for node in self._nodes):
            return bytes(model.SerializeToString())
        inferred = ir.from_proto(onnx.shape_inference.infer_shapes(model))
        optimise(inferred.graph)
        return bytes(ir.to_proto(inferred).SerializeToString())

    def _shuffle_step(
        self, name: str, value: str, shape: TimedConv, step: int, perm: list[int] | None
    ) -> str:
        if perm is not None:
            return self._node("Transpose", name, [value], perm=perm)
        groups = shape.structure.groups
        channels = [groups, shape.out_channels // groups] if step == 0 else [shape.out_channels]
        sizes = np.array([self._batch_size, *channels, *shape.output_size], dtype=np.int64)
        self._weights.append(numpy_helper.from_array(sizes, f"{name}_sizes"))
        return self._node("Reshape", name, [value, f"{name}_sizes"])

    def _conv(self, name: str, value: str, inputs: int, outputs: int, groups: int, **attributes: Any) -> str:
        kernel = attributes["kernel_shape"]
        weight = self._generator.standard_normal((outputs, inputs // groups, *kernel), dtype=np.float32)
        weight /= math.sqrt(weight[0].size)  # outputs keep the size of the inputs
        for suffix, array in (("weight", weight), ("bias", np.zeros(outputs, np.float32))):
            self._weights.append(numpy_helper.from_array(array, f"{name}_{suffix}"))
        return self._node("Conv", name, [value, f"{name}_weight", f"{name}_bias"], group=groups, **attributes)

    def _node(self, operator: str, name: str, inputs: list[str], **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name
