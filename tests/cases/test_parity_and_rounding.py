"""Parity where rounding decides what a model returns, and what a failure says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import TOLERANCE, check_parity
from tests.cases.nets import TORCH_2_9, lively, refusal

SHAPE = (3, 8, 8)


class Cancelling(nn.Module):
    """Adds a large number and takes it off again, so that float32 keeps little of what was there before."""

    def __init__(self, large: float, *, end: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.large, self.end = large, end

    def forward(self, x: Tensor) -> Any:
        return self.end((self.conv(x) + self.large) - self.large)


class SinglePrecision(Cancelling):
    """Does not run in float64."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(F.conv2d(x, torch.eye(3, dtype=torch.float32).reshape(3, 3, 1, 1)))


def exported(net: nn.Module, folder: Path, **options: Any) -> Path:
    return export_onnx(net, folder / "net.onnx", input_shape=SHAPE, **options).path


def with_channels_swapped(path: Path) -> Path:
    """The file with two output channels of its conv in each other's place."""
    model = onnx.load(str(path))
    weight = next(entry for entry in model.graph.initializer if entry.name == "conv.weight")
    array = numpy_helper.to_array(weight).copy()
    array[[0, 1]] = array[[1, 0]]
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("kind", [Cancelling, SinglePrecision])
def test_a_file_as_near_to_float64_as_pytorch_passes_and_a_wrong_one_does_not(
    kind: type[Cancelling], tmp_path: Path
) -> None:
    net = lively(kind(20_000.0))
    path = exported(net, tmp_path)
    parity = check_parity(net, path, input_shape=SHAPE)
    assert parity.max_rel_diff <= TOLERANCE or parity.noise is not None
    text = refusal(lambda: check_parity(net, with_channels_swapped(path), input_shape=SHAPE))
    assert "differs from the PyTorch model" in text
    assert "first diverging node 'conv/Conv'" in text
    assert "batch of 3 is right" not in text
    assert next(net.parameters()).dtype == torch.float32


def test_what_rounding_alone_decides_cannot_be_judged(tmp_path: Path) -> None:
    net = lively(Cancelling(1e7))
    path = exported(net, tmp_path)
    text = refusal(lambda: check_parity(net, with_channels_swapped(path), input_shape=SHAPE))
    assert "own float32 outputs are" in text
    assert "check on real images" in text


def test_nan_of_the_model_itself_is_named(tmp_path: Path) -> None:
    net = lively(Cancelling(0.0, end=lambda y: {"y": y, "root": torch.sqrt(y)}))
    text = refusal(lambda: check_parity(net, exported(net, tmp_path), input_shape=SHAPE))
    assert "the model's own 'root' holds NaN" in text


def test_a_decision_on_the_edge_may_go_either_way_but_no_other(tmp_path: Path) -> None:
    net = lively(Cancelling(20_000.0, end=lambda y: {"positive": y > 0, "best": y.argmax(1)}))
    path = exported(net, tmp_path)
    check_parity(net, path, input_shape=SHAPE)
    text = refusal(lambda: check_parity(net, with_channels_swapped(path), input_shape=SHAPE))
    assert "differs from the PyTorch model by" in text


def test_other_shapes_are_said_to_be_such(tmp_path: Path) -> None:
    wide, narrow = (
        lively(Cancelling(0.0, end=channels)) for channels in (lambda y: y[:, :5], lambda y: y[:, :4])
    )
    path = exported(wide, tmp_path)
    text = refusal(lambda: check_parity(narrow, path, input_shape=SHAPE))
    assert "gives output 'output' of shape (1, 5, 8, 8), expected (1, 4, 8, 8) (batch of 1)" in text
    pair = lively(Cancelling(0.0, end=lambda y: (y[:, :5], y)))
    text = refusal(lambda: check_parity(pair, exported(wide, tmp_path), input_shape=SHAPE))
    assert "gives 1 outputs, expected 2" in text


class ByBatch(nn.Module):
    """Treats a single image in another way than several."""

    def __init__(self, single: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.single = nn.Conv2d(3, 4, 3), single

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return self.single(y) if x.shape[0] == 1 else y


def test_a_batch_that_makes_the_difference_is_said_to(tmp_path: Path) -> None:
    net = lively(ByBatch(lambda y: y[0]))
    text = refusal(lambda: check_parity(net, exported(net, tmp_path), input_shape=SHAPE))
    if TORCH_2_9:
        assert "cannot export" in text
    else:
        assert "(batch of 1)" in text
        assert "a batch of 3 is right" in text
    assert "static_batch" in text
    check_parity(net, exported(net, tmp_path, static_batch=1), input_shape=SHAPE)


def test_a_model_that_overwrites_its_input_is_given_a_copy(tmp_path: Path) -> None:
    class Normalising(Cancelling):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.sub_(0.5).div_(0.25))

    net = lively(Normalising(0.0))
    check_parity(net, exported(net, tmp_path), input_shape=SHAPE)
