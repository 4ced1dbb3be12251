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

_SESSION_BYTES = 2**28  # of weights and activations in one session
_IR_VERSION = 9
_END = re.compile(r"(before|after)(\d+)(_nchwc)?")


@dataclass(frozen=True)
class ConvShape:
    """A conv and what replaces it.

    Attributes:
        in_channels, out_channels, kernel_size, stride, dilation: as in the conv itself.
        padding: in front along each dimension, then behind, pixels.
        input_size: spatial size, pixels.
        groups: number of groups.
        pointwise: whether a dense 1×1 conv follows before the activation.
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
    pointwise: bool = False
    shuffle: bool = False

    def __str__(self) -> str:
        def by(sizes: Sequence[int]) -> str:
            return "x".join(map(str, sizes))

        return (
            f"{self.in_channels}x{by(self.input_size)} to {self.out_channels}, "
            f"kernel {by(self.kernel_size)}, "
            f"stride {by(self.stride)}, padding {by(self.padding)}, dilation {by(self.dilation)}, "
            f"groups {self.groups}" + (", pointwise" if self.pointwise else "")
            + (", shuffle" if self.shuffle else "")
        )  # fmt: skip

    @property
    def dense(self) -> ConvShape:
        """The same conv with one group."""
        return replace(self, groups=1, pointwise=False, shuffle=False)

    @property
    def weights(self) -> int:
        """Number of weights."""
        own = self.out_channels * self.in_channels // self.groups * math.prod(self.kernel_size)
        return own + (self.out_channels**2 if self.pointwise else 0)

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
    shapes: Iterable[ConvShape],
    *,
    threads: int = 1,
    batch_size: int = 1,
    rounds: int = 24,
    warm: bool = False,
    progress: bool = False,
) -> dict[ConvShape, float]:
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
    times: dict[ConvShape, float] = {}
    total = sum(map(len, sessions))
    with tqdm(total=total, desc="latency table", unit="conv", disable=None if progress else True) as bar:
        for session in sessions:
            times |= _time_session(session, threads, batch_size, rounds)
            bar.update(len(session))
    return times


def _session_bytes(shape: ConvShape, batch_size: int) -> int:
    """Memory that one conv takes in a session: its weights, and its tensors with their copies."""
    values = shape.in_channels * math.prod(shape.input_size)
    values += shape.out_channels * math.prod(shape.output_size)
    return 4 * (shape.weights + 3 * batch_size * values)


def _time_session(
    shapes: Sequence[ConvShape], threads: int, batch_size: int, rounds: int
) -> dict[ConvShape, float]:
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

    def add(self, number: int, shape: ConvShape) -> None:
        """Add the branch of one conv."""
        channels, outputs = shape.in_channels, shape.out_channels
        point = (1,) * len(shape.kernel_size)
        kind = onnx.TensorProto.FLOAT
        source = f"input{number}"
        self._inputs.append(
            helper.make_tensor_value_info(source, kind, [self._batch_size, channels, *shape.input_size])
        )
        value = self._conv(f"before{number}", source, channels, channels, channels, kernel_shape=point)
        value = self._conv(
            f"conv{number}", value, channels, outputs, shape.groups, kernel_shape=shape.kernel_size,
            strides=shape.stride, dilations=shape.dilation, pads=shape.padding,
        )  # fmt: skip
        if shape.pointwise:
            value = self._conv(f"pointwise{number}", value, outputs, outputs, 1, kernel_shape=point)
        value = self._node("Relu", f"relu{number}", [value])
        readers = outputs
        if shape.shuffle:
            swapped = [0, 2, 1, *range(3, 3 + len(point))]
            for step, perm in ((0, None), (1, swapped), (2, None)):
                value = self._shuffle_step(f"shuffle{number}_{step}", value, shape, step, perm)
            readers = 2  # a shuffle could move through a depthwise conv, away from where it is timed
        value = self._conv(f"after{number}", value, outputs, outputs, readers, kernel_shape=point)
        self._outputs.append(helper.make_tensor_value_info(value, kind, None))

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
        self, name: str, value: str, shape: ConvShape, step: int, perm: list[int] | None
    ) -> str:
        if perm is not None:
            return self._node("Transpose", name, [value], perm=perm)
        width = shape.out_channels // shape.groups
        channels = [shape.groups, width] if step == 0 else [shape.out_channels]
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
