from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groupify.data.splits import load_data
from groupify.errors import DataError, GroupifyWarning
from groupify.models.preprocessing import PreprocessingOptions
from groupify.models.sources import load_model
from groupify.models.specs import ModelSpec
from groupify.pipeline.inputs import with_data
from groupify.scores import Accuracy, evaluate

IMAGES = torch.eye(4).view(4, 4, 1, 1).repeat(5, 1, 1, 1)
# The model says 0, 1, 2, 3 over and over: right on the first 12 images, wrong on the last 8.
LABELS = torch.tensor([0, 1, 2, 3] * 3 + [1, 2, 3, 0] * 2)
DATA = TensorDataset(IMAGES, LABELS)


class Named(NamedTuple):
    aux: Tensor
    logits: Tensor


class Argmax(nn.Module):
    """Its logits are the image; the output is wrapped by ``wrap``."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9)
        self.norm = nn.BatchNorm1d(4)
        self.wrap = wrap

    def forward(self, images: Tensor) -> Any:
        assert torch.is_inference_mode_enabled()
        return self.wrap(self.norm(self.dropout(images.flatten(1))))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_top1_worked_out_by_hand(batch_size: int) -> None:
    assert evaluate(Argmax(), DATA, batch_size=batch_size) == Accuracy(top1=12 / 20, images=20)
    assert evaluate(Argmax(), DATA, batch_size=batch_size, limit=13) == Accuracy(top1=12 / 13, images=13)
    loader = DataLoader(DATA, batch_size=batch_size)
    assert evaluate(Argmax(), loader, limit=13, progress=True) == Accuracy(top1=12 / 13, images=13)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"aux": -logits, "logits": logits},
        lambda logits: {"aux": -logits, "out": logits},
        lambda logits: Named(-logits, logits),
        lambda logits: (logits, -logits),
    ],
)
def test_outputs_with_names(wrap: Callable[[Tensor], Any]) -> None:
    assert evaluate(Argmax(wrap), DATA).top1 == 12 / 20


@pytest.mark.parametrize(
    ("wrap", "match"),
    [
        (lambda logits: logits[:, :, None, None], r"shape \(20, 4, 1, 1\)"),
        (lambda logits: [{"boxes": logits}], "type dict"),
        (lambda logits: {"boxes": logits}, "type dict"),
        (lambda logits: (), "type tuple"),
    ],
)
def test_outputs_that_are_no_logits(wrap: Callable[[Tensor], Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        evaluate(Argmax(wrap), DATA)


def test_every_module_gets_its_mode_back() -> None:
    model = Argmax().train()
    model.norm.eval()
    running_mean = model.norm.running_mean
    assert running_mean is not None
    before = running_mean.clone()
    evaluate(model, DATA)
    assert model.training
    assert model.dropout.training
    assert not model.norm.training
    assert torch.equal(running_mean, before)
    with pytest.raises(DataError):
        evaluate(model, TensorDataset(IMAGES, LABELS + 9))
    assert model.training
    assert not model.norm.training


@pytest.mark.parametrize("label", [4, -7])
def test_label_out_of_range(label: int) -> None:
    data = TensorDataset(IMAGES[:3], torch.tensor([0, label, 1]))
    with pytest.raises(DataError, match=f"label {label} is out of range: the model has 4 classes"):
        evaluate(Argmax(), data)


def test_unlabelled_data() -> None:
    splits = load_data("synthetic", ModelSpec("x", {}, (4, 1, 1), None))
    assert splits.test is not None
    with pytest.raises(DataError, match="images have no labels"):
        evaluate(Argmax(), splits.test)


def test_images_that_are_not_finite_and_empty_data() -> None:
    with pytest.raises(DataError, match="NaN"):
        evaluate(Argmax(), TensorDataset(IMAGES * torch.nan, LABELS))
    with pytest.raises(DataError, match="empty"):
        evaluate(Argmax(), TensorDataset(IMAGES[:0], LABELS[:0]))


def test_labels_are_not_used_for_a_model_that_is_no_classifier() -> None:
    source = load_model("tests.cli_nets:segmenter", input_shape=(3, 8, 8))
    with pytest.warns(
        GroupifyWarning, match=r"segmenter gives no logits .*; the labels of tests.cli_nets:data are not used"
    ):
        _, data = with_data(source, "tests.cli_nets:data", PreprocessingOptions(), seed=0)
    assert data is not None
    assert not data.labelled
    classifier = load_model("tests.cli_nets:net", input_shape=(3, 8, 8))
    _, data = with_data(classifier, "tests.cli_nets:data", PreprocessingOptions(), seed=0)
    assert data is not None
    assert data.labelled
