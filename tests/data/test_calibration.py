"""Calibration takes whatever people have: tensors, loaders, generators, dicts, labels of any type."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import groupify
from groupify.data import calibration as module
from groupify.data.batches import calibration_images, iterate_batches
from groupify.data.calibration import calibration_inputs
from groupify.data.calls import model_inputs
from groupify.errors import DataError
from groupify.graph.call import Call

IMAGES = torch.arange(10.0)[:, None, None, None].expand(10, 3, 4, 4).contiguous()


class Pictures:
    """A map-style data set with whatever for a label."""

    def __init__(self, label: Callable[[int], Any]) -> None:
        self.label = label

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return IMAGES[range(10)[index]], self.label(index)


def generator() -> Iterator[Tensor]:
    yield from IMAGES.split(4)


KINDS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: IMAGES,
    "generator": generator,
    "batches": lambda: IMAGES.split(3),
    "pairs": lambda: [(batch, "cat") for batch in IMAGES.split(3)],
    "targets of a detector": lambda: [(batch, [{"boxes": torch.rand(2, 4)}]) for batch in IMAGES.split(3)],
    "values to regress": lambda: DataLoader(TensorDataset(IMAGES, torch.rand(10, 2)), batch_size=4),
    "texts": lambda: DataLoader(Pictures(str), batch_size=4),  # type: ignore[arg-type]
    "a data set": lambda: Pictures(lambda _: {"masks": None}),
    "no labels": lambda: DataLoader(TensorDataset(IMAGES), batch_size=4),
    "hugging face": lambda: [{"labels": ["a"] * 5, "pixel_values": batch} for batch in IMAGES.split(5)],
    "one tensor of floats": lambda: ({"ids": [3], "photo": batch} for batch in IMAGES.split(5)),
}


@pytest.mark.parametrize("limit", [2**28, 1000, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_data_of_any_kind(kind: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IN_MEMORY_BYTES", limit)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = calibration_inputs(KINDS[kind]())
    assert torch.equal(found, IMAGES)
    found += 1  # an ordinary tensor
    IMAGES.copy_(torch.arange(10.0)[:, None, None, None].expand(10, 3, 4, 4))
    del found
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_conversion_takes_what_can_be_read_only_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3))
    plan = groupify.plan(net, (3, 4, 4), groups=2, rules=groupify.Rules(min_group_width=1))
    images = torch.randn(96, 3, 4, 4)
    whole = groupify.convert(net, plan, images)
    once = groupify.convert(net, plan, ({"x": batch, "y": "unused"} for batch in images.split(10)))
    assert torch.equal(once.model[2].weight, whole.model[2].weight)  # type: ignore[index]
    again = groupify.Calibration(DataLoader(TensorDataset(images), batch_size=7))
    assert torch.equal(again.images, images)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (3, "calibration data of type int: expected a tensor"),
        ({"images": IMAGES}, "calibration data of type dict"),
        ([], "empty"),
        ([IMAGES, IMAGES[:, :, :2]], r"shapes \(3, 4, 4\) and \(3, 2, 4\): resize or crop"),
        ([IMAGES.byte()], "images are torch.uint8: expected floats"),
        ([IMAGES / 0], "NaN or infinite"),
        ([{"a": IMAGES, "b": IMAGES}], "has the keys 'a', 'b': expected the image under 'images'"),
    ],
)
def test_data_that_cannot_be_calibrated_with(data: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        calibration_inputs(data)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(DataError, match=r"no room for the calibration inputs in .*: No space left on device"):
        calibration_inputs([IMAGES])


def test_images_drawn_for_calibration_need_no_class_numbers() -> None:
    for kind in ("texts", "targets of a detector", "a data set", "hugging face"):
        drawn = calibration_images(KINDS[kind](), 10, seed=0)
        assert torch.equal(drawn[:, 0, 0, 0].sort().values, torch.arange(10.0))


def test_labelled_dicts_can_be_evaluated_with() -> None:
    data = [{"pixel_values": IMAGES, "labels": torch.arange(10)}]
    ((images, labels),) = iterate_batches(data, 10)
    assert torch.equal(images, IMAGES)
    assert labels.tolist() == list(range(10))


def test_what_of_a_batch_goes_to_the_model() -> None:
    batch = (IMAGES, torch.arange(10))
    assert model_inputs(batch).args[0] is IMAGES
    assert model_inputs(batch).kwargs == {}
    two = model_inputs(batch, lambda both: ((both[0],), {"scale": both[1]}))
    assert two == Call((IMAGES,), {"scale": batch[1]})
    wrongs: list[Any] = [lambda both: both[0], lambda _: ((), 3), lambda _: ([IMAGES], {})]
    for wrong in wrongs:
        with pytest.raises(DataError, match="expected a tuple of arguments and a dict of keyword arguments"):
            model_inputs(batch, wrong)
