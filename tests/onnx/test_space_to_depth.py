from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import Tensor, nn

from groupify.onnx.exporting import export_onnx
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.onnx.int8.space_to_depth import unfold_images
from groupify.onnx.runtime import OnnxModule, open_session


def conv_model(conv: nn.Conv2d, size: tuple[int | str, int | str], *, times: int = 1) -> onnx.ModelProto:
    """A file that hands out what a conv makes of its input, ``times`` over."""
    initializers = {
        name: numpy_helper.from_array(value.detach().numpy(), name) for name, value in conv.named_parameters()
    }
    how: dict[str, Any] = {
        "strides": conv.stride,
        "dilations": conv.dilation,
        "group": conv.groups,
        "pads": [*conv.padding, *conv.padding],
    }
    outputs = [f"y{number}" for number in range(times)]
    nodes = [
        helper.make_node("Conv", ["x", *initializers], [output], f"conv {output}", **how)
        for output in outputs
    ]
    kind, shape = onnx.TensorProto.FLOAT, ["n", conv.in_channels, *size]
    result: list[str | int] = ["n", conv.out_channels, "high", "wide"]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(output, kind, result) for output in outputs],
        list(initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, images: Tensor) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model.SerializeToString())
    outputs: list[np.ndarray] = session.run(None, {"x": images.numpy()})
    return outputs


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.integers(2, 4),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    blocks=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    bias=st.booleans(),
)
def test_a_strided_conv_of_an_image_computes_the_same(
    channels: int,
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    blocks: tuple[int, int],
    bias: bool,
) -> None:
    size = blocks[0] * stride, blocks[1] * stride
    if any(kernel[axis] > size[axis] + 2 * padding[axis] for axis in (0, 1)):
        return
    torch.manual_seed(0)
    model = conv_model(nn.Conv2d(channels, 5, kernel, stride, padding, bias=bias), size)
    images = torch.randn(3, channels, *size)
    before = run(model, images)
    found = unfold_images(model)
    assert [node.op_type for node in model.graph.node].count("SpaceToDepth") == found
    np.testing.assert_allclose(run(model, images)[0], before[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv2d(3, 8, 7, 2, 3), (16, 18)),
        (nn.Conv2d(3, 8, 3, 2, 1), (16, 16)),
        (nn.Conv2d(1, 8, 4, 4), (16, 16)),
        (nn.Conv2d(4, 8, (3, 5), 2, (1, 2)), (8, 12)),
    ],
)
def test_usual_first_convs_are_rewritten(conv: nn.Conv2d, size: tuple[int, int]) -> None:
    model = conv_model(conv, size)
    assert unfold_images(model) == 1
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    strides = next(attribute.ints for attribute in node.attribute if attribute.name == "strides")
    assert list(strides) == [1, 1]
    assert len(model.graph.initializer) == 2  # the weights of before are gone


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv2d(3, 8, 3, 1, 1), (16, 16)),  # no stride
        (nn.Conv2d(3, 8, 3, 2, 1), (15, 16)),  # not whole blocks
        (nn.Conv2d(3, 8, 3, 2, 1, dilation=2), (16, 16)),
        (nn.Conv2d(4, 8, 3, 2, 1, groups=2), (16, 16)),
        (nn.Conv2d(8, 8, 3, 2, 1), (16, 16)),  # no image
        (nn.Conv2d(3, 8, 3, (2, 1), 1), (16, 16)),
        (nn.Conv2d(3, 8, 3, 2, 1), ("height", "width")),
    ],
)
def test_what_gains_nothing_or_does_not_fit_stays(conv: nn.Conv2d, size: tuple[int | str, int | str]) -> None:
    model = conv_model(conv, size)
    before = model.SerializeToString()
    assert unfold_images(model) == 0
    assert model.SerializeToString() == before


def test_convs_that_share_their_weights_are_rewritten_alike() -> None:
    torch.manual_seed(0)
    model = conv_model(nn.Conv2d(3, 6, 3, 2, 1), (16, 16), times=2)
    images = torch.randn(2, 3, 16, 16)
    before = run(model, images)
    assert unfold_images(model) == 2
    for ours, wanted in zip(run(model, images), before, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=1e-5)


def test_an_int8_file_reads_blocks_of_its_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, 2, 1)).eval()
    path, images = tmp_path / "net.onnx", torch.randn(32, 3, 32, 32)
    export_onnx(net, path, input_shape=(3, 32, 32))
    for only_for_timing in (False, True):
        int8 = quantize_onnx(path, tmp_path / "int8.onnx", images=images, only_for_timing=only_for_timing)
        kinds = [node.op_type for node in onnx.load(str(int8.path)).graph.node]
        assert kinds.count("SpaceToDepth") == 1
        wanted = net(images).detach()
        error = float((OnnxModule(int8.path)(images) - wanted).square().mean() / wanted.var())
        assert error < 2e-3
