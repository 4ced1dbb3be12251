"""A tiny net, a task that it learns at once, and the kinds of data that the task may come as."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from groupify.data.splits import DataSplits
from groupify.training.settings import FinetuneSettings

CLASSES = 4
SETTINGS = FinetuneSettings(
    epochs=3, batch_size=16, optimizer="sgd", learning_rate=0.05, augment=False, validation_fraction=0.2
)


class Refusing:
    """The test split: nothing may read it."""

    def __len__(self) -> int:
        pytest.fail("the test split was read")

    def __getitem__(self, index: int) -> object:
        pytest.fail("the test split was read")


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(self.images, self.labels, strict=True)))


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.images)


class ShuffledStream(Stream):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        return iter(list(zip(self.images[order], self.labels[order], strict=True)))


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, CLASSES),
    )


def make_data(count: int = 200) -> tuple[Tensor, Tensor]:
    """Noise on one of four patterns, one per class."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return patterns[labels] + 0.8 * torch.randn(count, 3, 8, 8, generator=generator), labels


def splits(train: Any, **changes: Any) -> DataSplits:
    fields = {"test": Refusing(), "num_classes": CLASSES, "augment": None, "labelled": True}
    return DataSplits(spec="tests", train=train, **{**fields, **changes})


def top1(model: nn.Module) -> float:
    images, labels = make_data(400)
    with torch.no_grad():
        correct: Tensor = model.eval()(images[200:]).argmax(1) == labels[200:]
    return int(correct.sum()) / len(correct)


def distinct(rows: Tensor) -> Tensor:
    """Return the distinct rows, sorted."""
    return torch.tensor(sorted({tuple(row) for row in rows.tolist()}))


def known(value: float | None) -> float:
    """Return what was measured."""
    assert value is not None
    return value


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


SOURCES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "stream": Stream,
    "stream with a length": SizedStream,
    "loader of a stream": lambda images, labels: DataLoader(Stream(images, labels), batch_size=25),
    "loader": lambda images, labels: DataLoader(TensorDataset(images, labels), batch_size=25),
    "shuffled loader": lambda images, labels: DataLoader(
        TensorDataset(images, labels), batch_size=25, shuffle=True
    ),
    "batches": lambda images, labels: [
        (images[start : start + 25], labels[start : start + 25]) for start in range(0, len(images), 25)
    ],
}
