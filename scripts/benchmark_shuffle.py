"""What a channel shuffle between two grouped convs costs in ONNX Runtime, by the form it is lowered to.

Chains of alternating 1×1 and 3×3 grouped convs (g=4), one thread, batch 1; the cost is the difference from
the same chain without shuffles, per shuffle. This is the measurement behind ``MIN_BYTES`` in
``groupify/onnx/splitting.py`` and the choice of ``Gather``.

    python -m scripts.benchmark_shuffle [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from groupify.conversion.layers import shuffle_order
from groupify.machine import blocked_width, describe_machine
from groupify.measure.benchmarks import benchmark_onnx
from scripts.benchmarks.harness import write_results

GROUPS = 4
LAYERS = 4
FORMS = ("none", "gather", "transpose", "permuting conv", "slices + concat")
SIZES = ((64, 56), (128, 28), (256, 14), (512, 7), (256, 56), (512, 28), (1024, 14), (2048, 7))


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, half a second each")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there as well")
    arguments = parser.parse_args()
    sizes = SIZES[:2] if arguments.quick else SIZES
    rows = [
        (channels, side, measure(channels, side, 0.5 if arguments.quick else 4.0)) for channels, side in sizes
    ]
    console = Console(width=140)
    console.print(str(describe_machine()))
    table = Table("channels × size", "KB", "chain, ms", *FORMS[1:], title="cost of one shuffle, µs")
    for channels, side, medians in rows:
        costs = [
            f"{(medians[form] - medians['none']) / LAYERS * 1000:.0f}" if form in medians else ""
            for form in FORMS[1:]
        ]
        kilobytes = f"{channels * side * side * 4 / 1000:.0f}"
        table.add_row(f"{channels} × {side}²", kilobytes, f"{medians['none']:.2f}", *costs)
    console.print(table)
    if arguments.json is not None:
        result: dict[str, Any] = {
            "groups": GROUPS,
            "shuffles": LAYERS,
            "rows": [
                {"channels": channels, "side": side, "median_ms": medians} for channels, side, medians in rows
            ],
        }
        write_results(arguments.json, result)


def measure(channels: int, side: int, seconds: float) -> dict[str, float]:
    """Return the median milliseconds of the chain for every form that fits the width."""
    fits = channels // GROUPS**2 % blocked_width() == 0
    forms = [form for form in FORMS if form != "slices + concat" or fits]
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, form in enumerate(forms):
            files[form] = Path(folder) / f"{number}.onnx"
            onnx.save(chain(channels, side, form), str(files[form]))
        rows = benchmark_onnx(files, input_shape=(channels, side, side), seconds=seconds)
    return {row.model: row.median_ms for row in rows}


def chain(channels: int, side: int, form: str) -> onnx.ModelProto:
    """Build the chain as an ONNX model."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(array: Any) -> str:
        constants.append(numpy_helper.from_array(array, f"c{len(constants)}"))
        return constants[-1].name

    def add(kind: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"v{len(nodes)}"], **attributes))
        return f"v{len(nodes) - 1}"

    def conv(value: str, outputs: int, kernel: int, weights: Any = None) -> str:
        groups = GROUPS if weights is None else 1
        if weights is None:
            fan_in = channels // GROUPS * kernel**2
            weights = (
                random.standard_normal((outputs, channels // GROUPS, kernel, kernel)) * (2 / fan_in) ** 0.5
            )
        inputs = [value, constant(weights.astype(np.float32))]
        return add("Conv", inputs, group=groups, kernel_shape=[kernel, kernel], pads=[kernel // 2] * 4)

    order = shuffle_order(channels, GROUPS).numpy()
    value = add("Relu", [conv("input", channels, 1)])
    for layer in range(LAYERS):
        kernel = 1 if layer % 2 == 0 else 3
        if form == "slices + concat":
            parts = [add("Relu", [conv(value, channels // GROUPS, kernel)]) for _ in range(GROUPS)]
            value = add("Concat", parts, axis=1)
            continue
        value = add("Relu", [conv(value, channels, kernel)])
        if form == "gather":
            value = add("Gather", [value, constant(order)], axis=1)
        elif form == "transpose":
            view = constant(np.array([0, GROUPS, channels // GROUPS, side * side]))
            moved = add("Transpose", [add("Reshape", [value, view])], perm=[0, 2, 1, 3])
            value = add("Reshape", [moved, constant(np.array([0, channels, side, side]))])
        elif form == "permuting conv":
            value = conv(value, channels, 1, np.eye(channels)[order][:, :, None, None])
    add("GlobalAveragePool", [value])
    nodes[-1].output[0] = "output"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", channels, side, side])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", channels, 1, 1])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


if __name__ == "__main__":
    main()
