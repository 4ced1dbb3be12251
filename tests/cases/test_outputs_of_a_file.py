"""What a model returns, however nested and of whatever type, is what its ONNX file returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from groupify.onnx.exporting import export_onnx
from groupify.onnx.outputs import named_outputs
from groupify.onnx.parity import check_parity
from groupify.onnx.runtime import OnnxModule
from groupify.scores import Judge, evaluate
from groupify.tasks import class_scores
from tests.cases.nets import TORCH_2_9, lively, noise, refusal

SHAPE = (3, 6, 6)


class Ending(nn.Module):
    """A conv, and whatever is made of its image and its output."""

    def __init__(self, end: Callable[[Ending, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.queries = nn.Parameter(torch.ones(5, 2))
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self, x, torch.relu(self.conv(x)))


@dataclass
class Detections:
    scores: Tensor
    boxes: tuple[Tensor, ...]
    note: str = ""
    mask: Tensor | None = None


def test_outputs_of_any_nesting_have_names() -> None:
    a, b, c = (torch.tensor(float(value)) for value in range(3))
    for value, names in (
        (a, ["output"]),
        ((a, {"x": [b, (c,)], "y": None}, 0.5), ["output_0", "output_1.x_0", "output_1.x_1_0"]),
        ((None, a), ["output_1"]),
        (Detections(a, (b, c)), ["scores", "boxes_0", "boxes_1"]),
        (OrderedDict(z=a, a=b), ["z", "a"]),
        ({1: a, "1": b}, ["1", "1_1"]),
    ):
        found = named_outputs(value)
        assert list(found) == names
        assert [float(tensor) for tensor in found.values()] == [0.0, 1.0, 2.0][: len(names)]


def everything(net: Ending, x: Tensor, y: Tensor) -> Any:
    """Outputs of every type, twice the same, without a batch, infinite, and under names that are taken."""
    numbers = {"mask": y > 0.1, "best": y.argmax(1), "order": y.flatten(1).topk(3)[1].int()}
    taken = {"conv.weight": y + 1, "relu": y + 2, "conv2d": y + 3, "queries": net.queries, "input": x}
    loose = (net.queries, None, y, y, torch.arange(5), y.sum(), y.masked_fill(y == 0, -torch.inf))
    return {**numbers, **taken, "loose": loose, "found": Detections(y, (y, x))}


@pytest.mark.parametrize("static_batch", [None, 1])
def test_outputs_of_every_kind_are_right(static_batch: int | None, tmp_path: Path) -> None:
    net = lively(Ending(everything))
    images = noise(1 if static_batch else 2, SHAPE)
    wanted = named_outputs(net(images))
    exported = export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE, static_batch=static_batch)
    # torch 2.9 calls the one input "inputs", which meets no output of this name.
    names = ["output.input" if name == "input" and not TORCH_2_9 else name for name in wanted]
    assert list(exported.output_names) == names
    assert [output.name for output in onnx.load(str(exported.path)).graph.output] == names
    assert check_parity(net, exported.path, input_shape=SHAPE).max_rel_diff < 1e-5
    results = OnnxModule(exported.path).outputs(images)
    for actual, value in zip(results.values(), wanted.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), value.detach())


def test_class_scores_behind_other_outputs_are_those_that_are_measured(tmp_path: Path) -> None:
    net = lively(Ending(lambda net, x, y: {"features": x.flatten(1), "logits": y.mean((2, 3))}))
    images = noise(9, SHAPE)
    file = OnnxModule(export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE).path)
    labels = class_scores(net(images)).argmax(1)
    assert evaluate(file, TensorDataset(images, labels)).top1 == 1.0
    assert Judge(net, images).judge(file).divergence < 1e-6


def test_all_outputs_of_a_file_are_judged(tmp_path: Path) -> None:
    net = lively(Ending(lambda net, x, y: (y, x * 2)))
    file = OnnxModule(export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE).path)
    assert Judge(net, noise(6, SHAPE)).judge(file).divergence < 1e-6


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda net, x, y: {"a": (y, object())}, "returns object in 'a_1'"),
        (lambda net, x, y: (1.5, None), "returns tuple"),
        (lambda net, x, y: torch.fft.rfft2(y), "'output' is complex"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(
    end: Callable[[Ending, Tensor, Tensor], Any], words: str, tmp_path: Path
) -> None:
    net = Ending(end).eval()
    assert words in refusal(lambda: export_onnx(net, tmp_path / "net.onnx", input_shape=SHAPE))
