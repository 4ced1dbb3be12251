from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxruntime import quantization
from torch import nn

from groupify.errors import ArtefactError, ConversionError, DataError, GroupifyError
from groupify.onnx.comparison import compare_files
from groupify.onnx.exporting import export_onnx
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.onnx.runtime import OnnxModule
from tests.onnx.nets import INPUT_SHAPE, randomise

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
    agreement = compare_files(path, quantized.path, images=IMAGES)
    assert 0 < agreement.max_rel_diff < 0.1
    assert agreement.max_abs_diff > 0
    assert agreement.top1_agreement is not None
    assert 0.9 <= agreement.top1_agreement <= 1
    assert agreement.images == 40
    assert capfd.readouterr() == ("", "")


def test_a_file_of_fixed_batch_is_calibrated_at_that_batch(net: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(net, tmp_path / "net.onnx", input_shape=INPUT_SHAPE, static_batch=3).path
    quantized = quantize_onnx(path, tmp_path / "net.int8.onnx", images=IMAGES)
    # 40 images are no multiple of 3: the last batch is filled up, and what fills it is dropped.
    assert compare_files(path, quantized.path, images=IMAGES).max_rel_diff < 0.1
    outputs = OnnxModule(path)(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(outputs, net(IMAGES), atol=1e-5, rtol=1e-5)


def test_a_batch_of_minus_one_is_any_batch(net: nn.Module, tmp_path: Path) -> None:
    """PaddlePaddle's exporter writes what is open so."""
    path = export_onnx(net, tmp_path / "net.onnx", input_shape=INPUT_SHAPE).path
    model = onnx.load(str(path))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    onnx.save(model, str(path))
    quantized = quantize_onnx(path, tmp_path / "net.int8.onnx", images=IMAGES)
    assert compare_files(path, quantized.path, images=IMAGES).max_rel_diff < 0.1


def test_a_file_is_called_like_a_module(net: nn.Module, exported: Path) -> None:
    with torch.no_grad():
        torch.testing.assert_close(OnnxModule(exported)(IMAGES), net(IMAGES), atol=1e-5, rtol=1e-5)
    with pytest.raises(GroupifyError, match="cannot run"):
        OnnxModule(exported)(IMAGES[:, :1])


def test_a_file_agrees_with_itself_and_a_broken_one_with_nothing(
    net: nn.Module, exported: Path, tmp_path: Path
) -> None:
    same = compare_files(exported, exported, images=IMAGES[:20])
    assert (same.max_abs_diff, same.max_rel_diff, same.top1_agreement, same.images) == (0, 0, 1, 20)
    model = onnx.load(str(exported))
    weights = model.graph.initializer[0]
    broken = onnx.numpy_helper.to_array(weights) * float("nan")
    weights.CopyFrom(onnx.numpy_helper.from_array(broken, weights.name))
    onnx.save(model, str(tmp_path / "broken.onnx"))
    assert math.isnan(compare_files(exported, tmp_path / "broken.onnx", images=IMAGES[:20]).max_abs_diff)


def test_files_of_two_models_are_not_compared(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(str(exported))
    model.graph.node[-1].output[0] = model.graph.output[0].name = "other"
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(GroupifyError, match="outputs other, expected output"):
        compare_files(exported, tmp_path / "other.onnx", images=IMAGES)


def upsampling(**options: Any) -> nn.Module:
    """As in keypoint detectors: a transposed conv behind a plain one."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 4, 2, 1, **options), nn.Conv2d(8, 4, 1)
    )
    return randomise(net).eval()


@pytest.mark.parametrize("options", [{"groups": 2}, {"groups": 8}, {"groups": 4, "bias": False}])
def test_transposed_convs_in_groups_stay_float32(options: dict[str, Any], tmp_path: Path) -> None:
    path = export_onnx(upsampling(**options), tmp_path / "net.onnx", input_shape=INPUT_SHAPE).path
    quantized = quantize_onnx(path, tmp_path / "int8.onnx", images=IMAGES)
    assert [node.name for node in quantized.left_in_float] == ["2/ConvTranspose"]
    assert "transposed conv in groups" in quantized.left_in_float[0].reason
    weights = {entry.name for entry in onnx.load(str(quantized.path)).graph.initializer}
    assert "2.weight" in weights
    assert "3.weight_quantized" in weights
    # A rare value may be clipped, and few of a normal distribution's are near its largest.
    assert compare_files(path, quantized.path, images=IMAGES).max_rel_diff < 0.25
    assert quantized.error is not None
    assert quantized.error < 1e-3


def test_other_transposed_convs_are_quantised(tmp_path: Path) -> None:
    path = export_onnx(upsampling(), tmp_path / "net.onnx", input_shape=INPUT_SHAPE).path
    quantized = quantize_onnx(path, tmp_path / "int8.onnx", images=IMAGES)
    assert quantized.left_in_float == ()
    weights = {entry.name for entry in onnx.load(str(quantized.path)).graph.initializer}
    assert "2.weight_quantized" in weights


def test_whatever_else_the_quantiser_fails_on_is_found_and_stays_float32(
    net: nn.Module, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise = quantization.quantize_static
    bad = [node.name for node in onnx.load(str(exported)).graph.node if node.op_type == "Conv"][1]

    def brittle(*args: Any, nodes_to_quantize: list[str], nodes_to_exclude: list[str], **more: Any) -> None:
        if bad not in nodes_to_exclude and (not nodes_to_quantize or bad in nodes_to_quantize):
            raise ValueError("shapes (16,)\n(8,)")
        more |= {"nodes_to_quantize": nodes_to_quantize, "nodes_to_exclude": nodes_to_exclude}
        quantise(*args, **more)

    monkeypatch.setattr(quantization, "quantize_static", brittle)
    quantized = quantize_onnx(exported, tmp_path / "int8.onnx", images=IMAGES)
    assert [(node.name, node.reason) for node in quantized.left_in_float] == [
        (bad, "ValueError: shapes (16,) (8,)")
    ]
    assert compare_files(exported, quantized.path, images=IMAGES).max_rel_diff < 0.1

    def broken(*_: Any, **__: Any) -> None:
        raise IndexError

    monkeypatch.setattr(quantization, "quantize_static", broken)
    with pytest.raises(ConversionError, match=r"quantiser fails on .*: IndexError; deploy the float file"):
        quantize_onnx(exported, tmp_path / "other.onnx", images=IMAGES)
    assert not (tmp_path / "other.onnx").exists()


def test_bad_input(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        quantize_onnx(exported, tmp_path / "net.onnx", images=IMAGES[:0])
    with pytest.raises(DataError, match="no images"):
        compare_files(exported, exported, images=IMAGES[:0])
    with pytest.raises(ArtefactError, match="cannot write"):
        quantize_onnx(exported, tmp_path / "missing" / "net.onnx", images=IMAGES)
