"""Models and data sets that the command line tests name as ``tests.cli_nets:...``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset, TensorDataset

from groupify.data.images import ImageArrays
from groupify.data.splits import DataSplits, load_data
from groupify.models.demo import INPUT_SHAPE
from groupify.models.specs import ModelSpec

INPUT_SIZE = "3,8,8"


def net(channels: int = 32) -> nn.Module:
    """A tiny classifier of 3×8×8 images."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.Conv2d(2 * channels, 2 * channels, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 10),
    )


def noisy() -> nn.Module:
    """The same; building it prints as native code does, past Python's own standard output."""
    os.write(1, b"noise")
    return net()


def segmenter() -> nn.Module:
    """Scores for each pixel."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 5, 1)
    )


def _images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return images, torch.arange(count) % 10


def data() -> tuple[TensorDataset, TensorDataset]:
    """Labelled images, training and test part."""
    return TensorDataset(*_images(96, 1)), TensorDataset(*_images(40, 2))


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Images without a length; where there is a file ``interrupt``, Ctrl-C comes in the second long pass."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.long_passes = count, seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, item in enumerate(zip(*_images(self.count, self.seed), strict=True)):
            if number == 150:
                self.long_passes += 1
                if self.long_passes == 2 and Path("interrupt").exists():
                    raise KeyboardInterrupt
            yield item


def stream() -> dict[str, Stream]:
    """The same as ``data``, and more of it, as streams."""
    return {"train": Stream(192, 1), "test": Stream(40, 2)}


def bad_labels() -> tuple[TensorDataset, TensorDataset]:
    """The model has 10 classes; one label says 10."""
    images, labels = _images(40, 3)
    labels[7] = 10
    return TensorDataset(images, labels), TensorDataset(images, labels)


def part_of_the_demo() -> DataSplits:
    """A few of the demo's images, where all of them would only take longer."""
    splits = load_data("demo", ModelSpec("demo", {}, INPUT_SHAPE, None))
    assert isinstance(splits.train, ImageArrays)
    assert isinstance(splits.test, ImageArrays)
    train, test = Subset(splits.train, range(300)), Subset(splits.test, range(200))
    return replace(splits, train=train, test=test)


def no_data() -> None:
    """What a data set's code may do."""
    raise RuntimeError("no such bucket\nretry later")
