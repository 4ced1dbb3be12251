"""Time single convs in ONNX Runtime as they would run inside a network.

Each conv stands between two cheap 1×1 convs that are not counted, with its activation behind it: its input
comes in the layout of ONNX Runtime's kernels and its output goes on in it, so that a reorder of the layout is
only counted where the conv itself forces one. In int8 the two 1×1 convs compute in int8 as well, so that what
quantises and dequantises stands in front of them and behind. Many convs share one session and run in turns,
so that weights have left the caches when their turn comes, as in a network. The times are those of ONNX
Runtime's own profiler.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from tqdm import tqdm

from groupify.machine import chunks
from groupify.measure.benchmarks import UNDISTURBED, percentile
from groupify.measure.profiling import kernel_times
from groupify.onnx.tracing import OPSET
from groupify.structures import FLOAT32, INT8, PRECISIONS, ConvShape, Precision, Structure

# Of weights and activations in one session: as many as a network has. Those of an int8 network stay in a
# large processor's last cache; among 256 MiB thin convs took up to 15% longer than in networks.
_SESSION_BYTES: Mapping[Precision, int] = {FLOAT32: 2**28, INT8: 2**25}
_VALUE_BYTES: Mapping[Precision, int] = {FLOAT32: 4, INT8: 1}
_IR_VERSION = 9
_AS_IT_IS = Structure()
_END = re.compile(r"(before|after)(\d+)(_nchwc|_token_\d+)?")
# Of all int8 values: how long a conv takes does not depend on them.
_SCALE = 0.02
_MIDDLE, _LOWEST = 128, 0  # zero points: of values of both signs, and of those behind a ReLU


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
        precision: what it computes in.
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
    precision: Precision = FLOAT32

    def __str__(self) -> str:
        def by(sizes: Sequence[int]) -> str:
            return "x".join(map(str, sizes))

        return (
            f"{self.in_channels}x{by(self.input_size)} to {self.out_channels}, "
            f"kernel {by(self.kernel_size)}, "
            f"stride {by(self.stride)}, padding {by(self.padding)}, dilation {by(self.dilation)}, "
            f"groups {self.groups}, structure {self.structure}{', shuffle' * self.shuffle}"
            f"{', int8' * (self.precision == INT8)}"
        )

    @property
    def dense(self) -> TimedConv:
        """The conv as it is."""
        return replace(self, structure=Structure(groups=self.groups), shuffle=False)

    @property
    def kernels(self) -> int:
        """Number of kernels that run it."""
        structure = self.structure
        return 1 + (structure.reduce is not None) + (structure.expand is not None) + self.shuffle

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
    progress: bool = False,
) -> Iterator[dict[TimedConv, float]]:
    """Give the time of each conv with its activation, in milliseconds for one image, a session at a time.

    Args:
        shapes: what to time; those that fit in memory together share a session, in which they run in turns.
        threads: intra-op threads.
        batch_size: images per run.
        rounds: measured runs of each.
        progress: show a bar on stderr.

    Raises:
        GroupifyError: ONNX Runtime refuses a conv.
    """
    asked = list(dict.fromkeys(shapes))
    sessions = [
        session
        for precision in PRECISIONS
        for session in chunks(
            [shape for shape in asked if shape.precision == precision],
            lambda shape: _session_bytes(shape, batch_size),
            _SESSION_BYTES[precision],
        )
    ]
    total = sum(map(len, sessions))
    with tqdm(
        total=total, desc="latency table", unit="conv", disable=None if progress else True, leave=False
    ) as bar:
        for session in sessions:
            yield _time_session(session, threads, batch_size, rounds)
            bar.update(len(session))


def _session_bytes(shape: TimedConv, batch_size: int) -> int:
    """Memory that one conv takes in a session: its weights, and its tensors with their copies."""
    values = shape.in_channels * math.prod(shape.input_size)
    values += shape.out_channels * math.prod(shape.output_size)
    return _VALUE_BYTES[shape.precision] * (shape.weights + 3 * batch_size * values)


def _time_session(
    shapes: Sequence[TimedConv], threads: int, batch_size: int, rounds: int
) -> dict[TimedConv, float]:
    graph = (_QuantisedGraph if shapes[0].precision == INT8 else _Graph)(batch_size)
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
        value = self._source(f"input{number}", [self._batch_size, channels, *shape.input_size])
        value = self._conv(f"before{number}", value, channels, channels, channels, kernel_shape=point)
        value = self._structure(number, value, shape)
        if shape.shuffle:
            value = self._shuffle(f"shuffle{number}", value, outputs, shape.structure.groups)
        value = self._conv(f"after{number}", value, outputs, outputs, outputs, kernel_shape=point)
        self._outputs.append(helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))

    def _structure(self, number: int, value: str, shape: TimedConv) -> str:
        """Add what the conv becomes, with its activation; of a 1×1 conv the first takes the stride."""
        point, structure = (1,) * len(shape.kernel_size), shape.structure
        reads, writes = structure.reduce or shape.in_channels, structure.expand or shape.out_channels
        kernel: dict[str, Any] = {
            "kernel_shape": shape.kernel_size, "strides": shape.stride, "dilations": shape.dilation,
            "pads": shape.padding,
        }  # fmt: skip
        plain: dict[str, Any] = {"kernel_shape": point}
        if structure.reduce is not None:
            own, kernel = (kernel, plain) if shape.kernel_size == point else (plain, kernel)
            value = self._conv(f"reduce{number}", value, shape.in_channels, reads, shape.groups, **own)
        last = structure.expand is None
        value = self._conv(f"conv{number}", value, reads, writes, structure.groups, relu=last, **kernel)
        if not last:
            value = self._conv(
                f"expand{number}", value, writes, shape.out_channels, shape.groups, relu=True, **plain
            )
        return value

    def serialised(self) -> bytes:
        """Return the model."""
        graph = helper.make_graph(self._nodes, "convs", self._inputs, self._outputs, self._weights)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        return bytes(model.SerializeToString())

    def _source(self, name: str, sizes: Sequence[int]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes))
        return name

    def _shuffle(self, name: str, value: str, channels: int, groups: int) -> str:
        """Add a channel shuffle as an export writes it."""
        order = np.arange(channels, dtype=np.int64).reshape(groups, -1).T.flatten()
        return self._node("Gather", name, [value, self._constant(f"{name}_order", order)], axis=1)

    def _conv(
        self, name: str, value: str, inputs: int, outputs: int, groups: int, *, relu: bool = False,
        **attributes: Any,
    ) -> str:  # fmt: skip
        weight = self._normal((outputs, inputs // groups, *attributes["kernel_shape"]))
        weight /= math.sqrt(weight[0].size)  # outputs keep the size of the inputs
        weights = [
            self._constant(f"{name}_weight", weight),
            self._constant(f"{name}_bias", np.zeros(outputs, np.float32)),
        ]
        value = self._node("Conv", name, [value, *weights], group=groups, **attributes)
        return self._node("Relu", f"{name}_relu", [value]) if relu else value

    def _normal(self, sizes: tuple[int, ...]) -> Any:
        return self._generator.standard_normal(sizes, dtype=np.float32)

    def _constant(self, name: str, array: Any) -> str:
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def _node(self, operator: str, name: str, inputs: list[str], **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name


class _QuantisedGraph(_Graph):
    """The same in int8, in the form that ONNX Runtime's quantiser gives a graph.

    Every value goes through a pair of nodes that quantise and dequantise it, weights are dequantised per
    output channel, and a ReLU is gone: the range of the conv's output ends at 0.
    """

    def _source(self, name: str, sizes: Sequence[int]) -> str:
        return self._pair(super()._source(name, sizes), _MIDDLE)

    def _shuffle(self, name: str, value: str, channels: int, groups: int) -> str:
        return self._pair(super()._shuffle(name, value, channels, groups), _LOWEST)

    def _conv(
        self, name: str, value: str, inputs: int, outputs: int, groups: int, *, relu: bool = False,
        **attributes: Any,
    ) -> str:  # fmt: skip
        sizes = (outputs, inputs // groups, *attributes["kernel_shape"])
        weight = self._generator.integers(-127, 128, sizes, dtype=np.int8)
        scales = np.full(outputs, _SCALE, np.float32)
        weights = [
            self._dequantised(f"{name}_weight", weight, scales),
            self._dequantised(f"{name}_bias", np.zeros(outputs, np.int32), _SCALE * scales),
        ]
        value = self._node("Conv", name, [value, *weights], group=groups, **attributes)
        return self._pair(value, _LOWEST if relu else _MIDDLE)

    def _dequantised(self, name: str, array: Any, scales: Any) -> str:
        zeros = np.zeros(len(scales), array.dtype)
        inputs = [self._constant(name, array), self._constant(f"{name}_scale", scales)]
        inputs.append(self._constant(f"{name}_zero", zeros))
        return self._node("DequantizeLinear", f"{name}_dequantised", inputs, axis=0)

    def _pair(self, value: str, zero_point: int) -> str:
        scale = self._constant(f"{value}_scale", np.array(_SCALE, np.float32))
        zero = self._constant(f"{value}_zero", np.array(zero_point, np.uint8))
        quantised = self._node("QuantizeLinear", f"{value}_quantised", [value, scale, zero])
        return self._node("DequantizeLinear", f"{value}_dequantised", [quantised, scale, zero])
