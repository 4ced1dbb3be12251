"""Folding and lowering change neither the outputs nor the interface of a graph."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from groupify.conversion.surgery import channel_shuffle
from groupify.onnx.exporting import export_onnx
from groupify.onnx.graph_edits import constant
from groupify.onnx.lowering import fold_permutations, optimise, recognise_shuffles
from groupify.onnx.parity import check_parity
from tests.onnx.nets import INPUT_SHAPE, SmallNet, randomise, shuffled

SIDE = 4

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class GraphBuilder:
    """Grows an ONNX graph of float tensors (N, C, H, W) step by step."""

    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)  # channels, side

    def constant(self, array: Array) -> str:
        name = f"c{len(self.constants)}.weight"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def weights(self, *shape: int) -> str:
        array = self.random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return self.constant(array.astype(np.float32))

    def add(self, kind: str, inputs: list[str], channels: int, side: int, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [name], name=f"n{len(self.nodes)}/{kind}", **attributes)
        self.nodes.append(node)
        self.shapes[name] = (channels, side)
        return name

    def conv(self, value: str, outputs: int, kernel: int, groups: int, bias: bool) -> str:
        channels, side = self.shapes[value]
        inputs = [value, self.weights(outputs, channels // groups, kernel, kernel)]
        if bias:
            inputs.append(self.weights(outputs))
        pads = [kernel // 2] * 4
        return self.add("Conv", inputs, outputs, side, group=groups, kernel_shape=[kernel, kernel], pads=pads)

    def norm(self, value: str) -> str:
        channels, side = self.shapes[value]
        scale, shift, mean = (self.weights(channels) for _ in range(3))
        variance = self.constant((self.random.random(channels) + 0.5).astype(np.float32))
        return self.add("BatchNormalization", [value, scale, shift, mean, variance], channels, side)

    def shuffle(self, value: str, groups: int) -> str:
        channels, side = self.shapes[value]
        view = self.constant(np.array([-1, groups, channels // groups, side, side]))
        back = self.constant(np.array([-1, channels, side, side]))
        split = self.add("Reshape", [value, view], channels, side)
        moved = self.add("Transpose", [split], channels, side, perm=[0, 2, 1, 3, 4])
        return self.add("Reshape", [moved, back], channels, side)

    def gather(self, value: str) -> str:
        channels, side = self.shapes[value]
        order = self.constant(self.random.permutation(channels))
        return self.add("Gather", [value, order], channels, side, axis=1)

    def model(self, output: str) -> onnx.ModelProto:
        channels, side = self.shapes[output]
        first = next(iter(self.shapes.values()))
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", first[0], SIDE, SIDE])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", channels, side, side])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


@st.composite
def random_models(draw: st.DrawFn) -> onnx.ModelProto:
    builder = GraphBuilder(np.random.default_rng(draw(st.integers(0, 2**16))))
    widths = (8, 16, 32)
    builder.shapes["input"] = (draw(st.sampled_from(widths)), SIDE)
    live = ["input"]
    for _ in range(draw(st.integers(2, 12))):
        value = draw(st.sampled_from(live[-3:]))
        channels, side = builder.shapes[value]
        steps: dict[str, Callable[[], str]] = {
            "conv": lambda v=value: builder.conv(  # type: ignore[misc]
                v,
                draw(st.sampled_from(widths)),
                draw(st.sampled_from((1, 3))),
                draw(st.sampled_from((1, 2, 4))),
                draw(st.booleans()),
            ),
            "depthwise": lambda v=value, c=channels: builder.conv(v, c, 3, c, bias=True),  # type: ignore[misc]
            "norm": lambda v=value: builder.norm(v),  # type: ignore[misc]
            "relu": lambda v=value, c=channels, s=side: builder.add("Relu", [v], c, s),  # type: ignore[misc]
            "scale": lambda v=value, c=channels, s=side: builder.add(  # type: ignore[misc]
                "Mul", [v, builder.weights(1, c, 1, 1)], c, s
            ),
            "shift": lambda v=value, c=channels, s=side: builder.add(  # type: ignore[misc]
                "Add", [v, builder.constant(np.array(0.5, np.float32))], c, s
            ),
            "shuffle": lambda v=value: builder.shuffle(v, draw(st.sampled_from((2, 4)))),  # type: ignore[misc]
            "gather": lambda v=value: builder.gather(v),  # type: ignore[misc]
            "reverse": lambda v=value, c=channels, s=side: builder.add(  # type: ignore[misc]
                "Softmax", [v], c, s, axis=1
            ),
            "excite": lambda v=value, c=channels, s=side: builder.add(  # type: ignore[misc]
                "Mul", [v, builder.add("GlobalAveragePool", [v], c, 1)], c, s
            ),
        }
        partners = [other for other in live if builder.shapes[other] == (channels, side) and other != value]
        if partners:
            partner = draw(st.sampled_from(partners))
            steps["add"] = lambda v=value, p=partner, c=channels, s=side: builder.add(  # type: ignore[misc]
                "Add", [v, p], c, s
            )
            if channels <= 32:
                steps["concat"] = lambda v=value, p=partner, c=channels, s=side: builder.add(  # type: ignore[misc]
                    "Concat", [v, p], 2 * c, s, axis=1
                )
        live.append(steps[draw(st.sampled_from(sorted(steps)))]())
    return builder.model(live[-1])


def run(model: onnx.ModelProto, batch: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[Array] = session.run(None, {"input": batch})
    return outputs


def moved_elements(model: onnx.ModelProto) -> int:
    return sum(node.op_type in ("Gather", "Transpose") for node in model.graph.node)


@settings(max_examples=150, deadline=None)
@given(random_models(), st.booleans())
def test_random_graphs_compute_the_same_and_move_no_more(model: onnx.ModelProto, lower: bool) -> None:
    first = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    batch = np.random.default_rng(0).standard_normal((2, first, SIDE, SIDE)).astype(np.float32)
    expected = run(model, batch)
    changed = ir.from_proto(model)
    if lower:
        optimise(changed.graph)
    else:
        fold_permutations(changed.graph)
    result = ir.to_proto(changed)
    onnx.checker.check_model(result, full_check=True)
    assert [output.name for output in result.graph.output] == [output.name for output in model.graph.output]
    # Every shuffle may need a gather at each of its readers in the worst case, never more.
    assert not any(node.op_type == "Transpose" for node in result.graph.node)
    for before, after in zip(expected, run(result, batch), strict=True):
        scale = max(1.0, float(np.abs(before).max()))
        np.testing.assert_allclose(after / scale, before / scale, atol=1e-5)


def kinds(path: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def export(net: nn.Module, path: Path) -> collections.Counter[str]:
    """Export, check against PyTorch, and count the operators."""
    exported = export_onnx(net.eval(), path, input_shape=INPUT_SHAPE)
    assert check_parity(net, exported.path, input_shape=INPUT_SHAPE).max_rel_diff < 1e-5
    assert exported.shuffles_left == kinds(exported.path)["Gather"]
    return kinds(exported.path)


@pytest.mark.parametrize("reader", ["conv", "linear", "flattened"])
def test_a_shuffle_in_front_of_a_dense_layer_is_gone(tmp_path: Path, reader: str) -> None:
    stem = nn.Conv2d(3, 16, 3, padding=1)
    body = [stem, shuffled(16, 16), nn.BatchNorm2d(16), nn.Hardswish(), nn.MaxPool2d(2)]
    tails: dict[str, list[nn.Module]] = {
        "conv": [nn.Conv2d(16, 4, 3)],
        "linear": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)],
        "flattened": [nn.Flatten(), nn.ReLU(), nn.Linear(16 * 36, 5)],
    }
    counted = export(randomise(nn.Sequential(*body, *tails[reader])), tmp_path / "net.onnx")
    assert counted["Gather"] == counted["Transpose"] == counted["BatchNormalization"] == 0


class DenselyConnected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = shuffled(16, 8), shuffled(24, 8)
        self.norm = nn.BatchNorm2d(32)
        self.last = nn.Conv2d(32, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.one(x)], 1)
        x = torch.cat([x, self.two(x)], 1)
        result: Tensor = self.last(self.norm(x).relu())
        return result


def test_shuffles_go_through_concatenations(tmp_path: Path) -> None:
    """The last shuffle folds into the dense conv; the first has a grouped reader behind the concatenation."""
    assert export(randomise(DenselyConnected()), tmp_path / "net.onnx")["Gather"] == 1


def test_a_shuffle_that_must_stay_is_one_gather_behind_the_activation(tmp_path: Path) -> None:
    net = randomise(SmallNet())
    path = tmp_path / "net.onnx"
    counted = export(net, path)
    assert counted["Gather"] == 1
    assert counted["Transpose"] == counted["BatchNormalization"] == 0
    nodes = {node.output[0]: node for node in onnx.load(str(path)).graph.node}
    gather = next(node for node in nodes.values() if node.op_type == "Gather")
    assert nodes[gather.input[0]].op_type == "Relu"


def test_shuffles_of_the_users_own_are_recognised() -> None:
    builder = GraphBuilder(np.random.default_rng(0))
    builder.shapes["input"] = (8, SIDE)
    graph = ir.from_proto(builder.model(builder.shuffle("input", 4))).graph
    assert recognise_shuffles(graph) == 1
    gather = next(node for node in graph if node.op_type == "Gather")
    order = constant(gather.inputs[1])
    assert order is not None
    numbers = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert order.tolist() == channel_shuffle(numbers, 4).flatten().tolist()


def test_a_graph_with_branches_is_left_alone() -> None:
    """A branch reads values of the outer graph that are not among its inputs."""
    builder = GraphBuilder(np.random.default_rng(0))
    builder.shapes["input"] = (8, SIDE)
    value = builder.add("Relu", [builder.gather(builder.conv("input", 8, 1, 1, bias=True))], 8, SIDE)
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = helper.make_node("Identity", [value], [name], name=name)
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([node], name, [], [output])
    chosen = builder.add("If", [builder.constant(np.array(True))], 8, SIDE, **branches)
    model = builder.model(builder.conv(chosen, 8, 1, 1, bias=True))
    changed = ir.from_proto(model)
    optimise(changed.graph)
    batch = np.random.default_rng(1).standard_normal((1, 8, SIDE, SIDE)).astype(np.float32)
    np.testing.assert_array_equal(run(ir.to_proto(changed), batch)[0], run(model, batch)[0])


def test_an_opaque_reader_gets_its_channels_in_their_own_order() -> None:
    builder = GraphBuilder(np.random.default_rng(0))
    builder.shapes["input"] = (8, SIDE)
    value = builder.gather(builder.conv("input", 8, 1, 1, bias=True))
    model = builder.model(builder.add("Softmax", [value], 8, SIDE, axis=1))
    changed = ir.from_proto(model)
    folding = fold_permutations(changed.graph)
    assert (folding.found, folding.kept) == (1, 0)
    batch = np.random.default_rng(1).standard_normal((1, 8, SIDE, SIDE)).astype(np.float32)
    np.testing.assert_allclose(run(ir.to_proto(changed), batch)[0], run(model, batch)[0], atol=1e-6)
