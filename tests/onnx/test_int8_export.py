from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.errors import ArtefactError, ConversionError, DataError
from tests.onnx.nets import INPUT_SHAPE, randomise

IMAGES = torch.randn(32, *INPUT_SHAPE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("static_batch", [None, 3])
def test_a_converted_model_becomes_one_checked_int8_file(static_batch: int | None, tmp_path: Path) -> None:
    net = randomise(
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1))
    ).eval()
    plan = groupify.plan(net, INPUT_SHAPE, groups=2)
    converted = groupify.convert(net, plan, IMAGES).model
    before = {name: value.clone() for name, value in converted.state_dict().items()}
    exported = groupify.export_int8(
        converted, tmp_path / "net.int8.onnx", IMAGES, static_batch=static_batch, metadata={"origin": "test"}
    )
    assert [file.name for file in tmp_path.iterdir()] == ["net.int8.onnx"]
    assert exported.file.file_bytes == (tmp_path / "net.int8.onnx").stat().st_size
    assert exported.file.left_in_float == ()
    assert exported.file.ranges == "least squared error"
    assert exported.file.error is not None
    assert exported.file.error < 0.01
    assert exported.parity.max_rel_diff < 1e-4
    assert exported.agreement.images == 8  # a quarter, which set nothing
    assert exported.agreement.max_rel_diff < 0.1
    entries = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.int8.onnx").metadata_props}
    assert entries["origin"] == "test"
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor, factor: Tensor) -> Tensor:
        result: Tensor = self.conv(image) * factor
        return result


def test_refusals(tmp_path: Path, net: nn.Module) -> None:
    with pytest.raises(DataError, match=r"calibration images of shape \(0, 3, 12, 12\), expected"):
        groupify.export_int8(net, tmp_path / "net.onnx", IMAGES[:0])
    with pytest.raises(ConversionError, match="factor"):
        groupify.export_int8(Scaled(), tmp_path / "net.onnx", IMAGES)
    with pytest.raises(ArtefactError, match="cannot write"):
        groupify.export_int8(net, tmp_path / "missing" / "net.onnx", IMAGES)
    assert list(tmp_path.iterdir()) == []
