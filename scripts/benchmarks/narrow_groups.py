"""Where a grouped conv is slower than the dense one in ONNX Runtime, next to what a plan expects.

One conv between two others that run in the blocked kernel, dense and with groups of some widths; one thread,
batch 1, interleaved. This is the measurement behind the constants of
``groupify/planning/slow_kernels.py``: no conv may be measured slower (speed-up below 1) where the plan
expects it to be faster.

    python -m scripts.benchmarks.narrow_groups [--quick]
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from groupify.machine import blocked_width
from groupify.measure.benchmarks import benchmark_onnx, speed_up
from groupify.planning.slow_kernels import relative_latency
from groupify.structures import Change, SitePlan, Structure
from scripts.benchmarks.harness import Parser, Results

WIDTHS = (1, 2, 4, 8, 16, 32)
SIZES = (
    (16, 56), (32, 56), (32, 14), (64, 56), (64, 14), (64, 1), (128, 28), (128, 7), (128, 1), (256, 14),
    (256, 1), (512, 7), (512, 1), (24, 28), (48, 14), (96, 14),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One conv: measured speed-up over the dense one, neighbours included, and that expected of it alone.

    Both by group width.
    """

    kernel: int
    channels: int
    side: int
    speed_up: Mapping[str, float]
    expected: Mapping[str, float] = field(default_factory=dict)

    @property
    def missed(self) -> list[str]:
        """The widths that were measured slower than dense where they were expected to be faster."""
        return [width for width, gain in self.speed_up.items() if gain < 1 <= self.expected[width]]


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "narrow_groups", "three sizes, shorter")
    arguments = parser.parse()
    sizes, seconds = (SIZES[:3], 0.1) if arguments.quick else (SIZES, 0.5)
    convs = {
        f"{channels}, {kernel}×{kernel}, {side}²": (kernel, channels, side)
        for kernel in (1, 3)
        for channels, side in sizes
        if kernel <= side
    }
    results = Results(Row, ("kernel", "channels", "side"), arguments.json, again=arguments.again)
    for name in parser.chosen(convs, arguments.only):
        if results.known(*convs[name]) is None:
            gains = measure(*convs[name], seconds)
            expected = {width: expected_gain(*convs[name], int(width)) for width in gains}
            results.put(row := Row(*convs[name], gains, expected))
            print(f"{name}: slower where it was expected to be faster: {row.missed or 'none'}", flush=True)
    results.show("narrow_groups")


def expected_gain(kernel: int, channels: int, side: int, width: int) -> float:
    """Return the speed-up that a plan expects of the conv on this CPU."""
    return 1 / relative_latency(site(kernel, channels, side, width), blocked_width())


def site(kernel: int, channels: int, side: int, width: int) -> SitePlan:
    """Return the conv as a plan has it."""
    return SitePlan(
        "conv", 1, Structure(groups=channels // width), False, None, channels, channels, (kernel, kernel),
        (1, 1), (side, side), Change(1, 1), Change(1, 1),
    )  # fmt: skip


def measure(kernel: int, channels: int, side: int, seconds: float) -> dict[str, float]:
    """Return the speed-up over the dense conv, neighbours included, by group width."""
    widths = [channels, *(width for width in WIDTHS if channels % width == 0 and width < channels)]
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for width in widths:
            files[str(width)] = Path(folder) / f"{width}.onnx"
            onnx.save(chain(kernel, channels, side, channels // width), str(files[str(width)]))
        rows = benchmark_onnx(files, input_shape=(channels, side, side), seconds=seconds * len(files))
    return {row.model: speed_up(rows[0], row) for row in rows[1:]}


def chain(kernel: int, channels: int, side: int, groups: int) -> onnx.ModelProto:
    """Build the conv and its neighbours as an ONNX model."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    neighbour = channels // 16 if channels % 16 == 0 else 1
    value = "input"
    for number, (size, count) in enumerate(((1, neighbour), (kernel, groups), (1, neighbour))):
        weights = random.standard_normal((channels, channels // count, size, size)).astype(np.float32) * 0.05
        constants.append(numpy_helper.from_array(weights.astype(np.float32), f"weight{number}"))
        nodes.append(
            helper.make_node(
                "Conv",
                [value, f"weight{number}"],
                [f"conv{number}"],
                group=count,
                kernel_shape=[size, size],
                pads=[size // 2] * 4,
            )
        )
        value = "output" if number == 2 else f"relu{number}"
        nodes.append(helper.make_node("Relu", [f"conv{number}"], [value]))
    shape: list[str | int | None] = ["batch", channels, side, side]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


if __name__ == "__main__":
    main()
