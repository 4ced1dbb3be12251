"""Where a grouped conv is slower than the dense one in ONNX Runtime, next to what a plan expects.

One conv between two others that run in the blocked kernel, dense and with groups of some widths; one thread,
batch 1, interleaved. This is the measurement behind the constants of
``groupify/planning/slow_kernels.py``: no conv may be measured slower (speed-up below 1) where the plan
expects it to be faster.

    python -m scripts.benchmarks.narrow_groups [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from groupify.machine import blocked_width, describe_machine
from groupify.measure.benchmarks import benchmark_onnx, speed_up
from groupify.planning.slow_kernels import relative_latency
from groupify.structures import Change, SitePlan
from scripts.benchmarks.harness import write_results

WIDTHS = (1, 2, 4, 8, 16, 32)
SIZES = (
    (16, 56), (32, 56), (32, 14), (64, 56), (64, 14), (64, 1), (128, 28), (128, 7), (128, 1), (256, 14),
    (256, 1), (512, 7), (512, 1), (24, 28), (48, 14), (96, 14),
)  # fmt: skip


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three sizes, shorter")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there as well")
    arguments = parser.parse_args()
    sizes = SIZES[:3] if arguments.quick else SIZES
    seconds = 0.1 if arguments.quick else 0.5
    rows = [
        (kernel, channels, side, measure(kernel, channels, side, seconds))
        for kernel in (1, 3)
        for channels, side in sizes
        if kernel <= side
    ]
    table = Table(
        "conv", *(f"width {width}" for width in WIDTHS), title="speed-up (expected for the conv alone)"
    )
    missed = []
    for kernel, channels, side, gains in rows:
        cells = []
        for width in WIDTHS:
            if width not in gains:
                cells.append("")
                continue
            expected = 1 / relative_latency(site(kernel, channels, side, width), blocked_width())
            if gains[width] < 1 <= expected:
                missed.append((kernel, channels, side, width))
            cells.append(f"{gains[width]:.2f} ({expected:.2f})")
        table.add_row(f"{channels}, {kernel}×{kernel}, {side}²", *cells)
    console = Console(width=140)
    console.print(str(describe_machine()))
    console.print(table)
    console.print(f"slower where it was expected to be faster: {missed or 'none'}")
    if arguments.json is not None:
        keys = ("kernel", "channels", "side", "speed_up")
        write_results(arguments.json, {"rows": [dict(zip(keys, row, strict=True)) for row in rows]})


def site(kernel: int, channels: int, side: int, width: int) -> SitePlan:
    """Return the conv as a plan has it."""
    return SitePlan(
        "conv", "grouped", 1, channels // width, False, None, channels, channels, (kernel, kernel), (1, 1),
        (side, side), Change(1, 1), Change(1, 1),
    )  # fmt: skip


def measure(kernel: int, channels: int, side: int, seconds: float) -> dict[int, float]:
    """Return the speed-up over the dense conv, neighbours included, by group width."""
    widths = [channels, *(width for width in WIDTHS if channels % width == 0 and width < channels)]
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for width in widths:
            files[str(width)] = Path(folder) / f"{width}.onnx"
            onnx.save(chain(kernel, channels, side, channels // width), str(files[str(width)]))
        rows = benchmark_onnx(files, input_shape=(channels, side, side), seconds=seconds * len(files))
    return {int(row.model): speed_up(rows[0], row) for row in rows[1:]}


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
