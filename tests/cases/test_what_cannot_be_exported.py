"""What export says of operators and batches that PyTorch's exporter or ONNX does not take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from tests.cases.nets import lively, refusal

SHAPE = (3, 8, 8)


class Through(nn.Module):
    """A conv, and an operation on its output."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.operation = nn.Conv2d(3, 4, 3, padding=1), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(torch.relu(self.conv(x)))


def deform(y: Tensor) -> Tensor:
    offsets = 0.1 * torch.cat([y, y, y, y, y], 1)[:, :18]
    deformed: Tensor = torchvision.ops.deform_conv2d(y, offsets, torch.ones(2, 4, 3, 3), padding=1)
    return deformed


def test_an_operator_of_a_newer_opset_raises_the_opset(tmp_path: Path) -> None:
    net = lively(Through(deform))
    exported = export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE)
    assert exported.opset == 19
    assert [entry.version for entry in onnx.load(str(exported.path)).opset_import] == [19]
    check_parity(net, exported.path, input_shape=SHAPE)


def test_an_opset_that_is_asked_for_is_kept_or_refused(tmp_path: Path) -> None:
    net = lively(Through(deform))
    text = refusal(lambda: export_onnx(net, tmp_path / "old.onnx", input_shape=SHAPE, opset=18))
    assert "opset 18 has no DeformConv: give opset=19" in text


def test_an_operator_without_an_onnx_form_is_named(tmp_path: Path) -> None:
    net = lively(Through(lambda y: F.adaptive_max_pool2d(y, (5, 3))))
    text = refusal(lambda: export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE))
    assert "no ONNX form of the operator aten.adaptive_max_pool2d;" in text
    assert "control flow" not in text
    assert "batch" not in text


def conditional(y: Tensor) -> Tensor:
    """Weights of one's own for each image, as conditional convs have, by as many groups as images."""
    batch, channels, height, width = y.shape
    weight = y.mean((2, 3)).reshape(batch * channels, 1, 1, 1).expand(-1, channels, 3, 3)
    folded = F.conv2d(y.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
    return folded.reshape(batch, channels, height, width)


def only_one(y: Tensor) -> Tensor:
    assert len(y) == 1, "one image at a time"
    return y


@pytest.mark.parametrize("operation", [conditional, only_one])
def test_a_batch_that_cannot_be_dynamic_is_said_to_be_the_cause(
    operation: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    net = lively(Through(operation))
    text = refusal(lambda: export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE))
    assert "for batches of any size" in text
    assert "give static_batch=1 (--static-batch 1)" in text
    assert not list(tmp_path.iterdir())
    exported = export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE, static_batch=1)
    check_parity(net, exported.path, input_shape=SHAPE)


def test_as_many_outputs_as_images(tmp_path: Path) -> None:
    net = lively(Through(lambda y: list(y)))  # type: ignore[arg-type,return-value]
    text = refusal(lambda: export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE))
    assert "2 outputs for 2 images, 1 for another batch" in text
    exported = export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE, static_batch=3)
    assert len(exported.output_names) == 3


def test_control_flow_is_named_and_nothing_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    net = lively(Through(lambda y: y if float(y.sum()) > 0 else -y))
    text = refusal(lambda: export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE))
    assert "control flow that depends on the values of its input" in text
    assert capfd.readouterr() == ("", "")


def test_what_the_exporter_writes_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("no such thing\nmore")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    net = lively(Through(torch.relu))
    text = refusal(lambda: export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE))
    assert "no valid ONNX: no such thing;" in text
