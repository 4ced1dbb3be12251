from __future__ import annotations

import collections
import math
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from groupify.deployment.export import export_onnx
from groupify.deployment.parity import check_parity
from groupify.deployment.quantize import OnnxModule, quantize_onnx
from groupify.errors import ArtefactError, DataError
from tests.deployment.nets import INPUT_SHAPE

IMAGES = torch.randn(40, *INPUT_SHAPE, generator=torch.Generator().manual_seed(7))


def test_int8_is_per_channel_close_and_says_what_it_came_from(
    net: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = export_onnx(net, tmp_path / "net.onnx", input_shape=INPUT_SHAPE, metadata={"origin": "test"}).path
    quantized = quantize_onnx(path, tmp_path / "net.int8.onnx", images=IMAGES)
    assert quantized.calibration_images == 40
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.int8.onnx", "net.onnx"]
    model = onnx.load(str(quantized.path))
    counted = collections.Counter(node.op_type for node in model.graph.node)
    assert counted["QuantizeLinear"] > 0
    assert {entry.key: entry.value for entry in model.metadata_props}["origin"] == "test"
    weights = {entry.name: entry for entry in model.graph.initializer}
    assert list(weights["conv2.weight_scale"].dims) == [16]
    assert weights["conv2.weight_quantized"].data_type == onnx.TensorProto.INT8
    parity = check_parity(
        net, quantized.path, input_shape=INPUT_SHAPE, images=IMAGES, batch_sizes=(40,), tolerance=math.inf
    )
    assert 0 < parity.max_rel_diff < 0.1
    assert parity.top1_agreement is not None
    assert parity.top1_agreement >= 0.9
    assert capfd.readouterr() == ("", "")


def test_a_file_of_fixed_batch_is_calibrated_at_that_batch(net: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(net, tmp_path / "net.onnx", input_shape=INPUT_SHAPE, static_batch=3).path
    quantized = quantize_onnx(path, tmp_path / "net.int8.onnx", images=IMAGES)
    parity = check_parity(net, quantized.path, input_shape=INPUT_SHAPE, tolerance=math.inf)
    assert parity.batch_sizes == (3,)
    assert parity.max_rel_diff < 0.1


def test_a_file_is_called_like_a_module(net: nn.Module, exported: Path) -> None:
    with torch.no_grad():
        torch.testing.assert_close(OnnxModule(exported)(IMAGES), net(IMAGES), atol=1e-5, rtol=1e-5)


def test_bad_input(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        quantize_onnx(exported, tmp_path / "net.onnx", images=IMAGES[:0])
    with pytest.raises(ArtefactError, match="cannot write"):
        quantize_onnx(exported, tmp_path / "missing" / "net.onnx", images=IMAGES)
