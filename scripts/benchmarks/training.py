"""The training that the benchmarks give to every method alike, and how its learning rate is chosen.

The dense nets of the benchmarks were trained on all training images, so none of these can tell which learning
rate is best: what changes the weights little does well on images that they know by heart. Each method's rate
is therefore chosen on a smaller net, the twin: one like the demo's, which ``scripts/train_dense.py --model
demo --without-demo-images`` has trained without the images that the demo embeds. Those are held out.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from groupify.data.batches import Data, calibration_images
from groupify.data.files import read_fashion_mnist
from groupify.data.images import ImageArrays
from groupify.data.splits import DataSplits
from groupify.files import read_tensors
from groupify.machine import bfloat16_is_slow
from groupify.models.demo import DATA_FOLDER, MODEL_FILE
from groupify.models.sources import load_model
from groupify.training.finetuning import FinetuneResult, finetune
from groupify.training.settings import FinetuneSettings
from groupify.training.state import Checkpointing
from scripts.benchmarks.harness import Parser, Results
from scripts.benchmarks.methods import Setting, rules_for
from scripts.train_dense import without

FAST = FinetuneSettings(amp=None if bfloat16_is_slow() else "bfloat16", channels_last=True)
RATES = "0.001,0.003,0.01,0.03"  # relative to the weights, as AdamW has them
CHOOSING_EPOCHS = 0.1  # a whole epoch with each rate would be three times the work


class RememberingTeacher(nn.Module):
    """A frozen teacher that computes each image once: without augmentation it would always say the same."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher.eval()
        self._known: dict[bytes, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RememberingTeacher:
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images (N, C, H, W)."""
        rows = images.contiguous().numpy()
        keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
        new = [index for index, key in enumerate(keys) if key not in self._known]
        if new:
            for index, logits in zip(new, self.teacher(images[new]).float(), strict=True):
                self._known[keys[index]] = logits.clone()
        return torch.stack([self._known[key] for key in keys])


@dataclass(frozen=True)
class Twin:
    """A dense net that has not seen the held-out images.

    Attributes:
        setting: the net, with calibration images out of those that it was trained on.
        teacher: the same net.
        data: the images that it was trained on.
        held_out: the others.
    """

    setting: Setting
    teacher: RememberingTeacher
    data: DataSplits
    held_out: Data

    @classmethod
    def load(cls, checkpoint: Path, data: DataSplits, images: int) -> Twin:
        """Load the twin's weights, and divide the benchmark's training images as its training did.

        Exits if they were trained on the images that are to be held out.
        """
        _, metadata = read_tensors(checkpoint)
        if metadata.get("without_demo_images") != "True":
            sys.exit(
                f"{checkpoint.name} may have been trained on the images that learning rates are chosen by: "
                "give a --twin of scripts.train_dense --model demo --without-demo-images, or one "
                "--learning-rates"
            )
        dense = load_model("groupify.models.demo:demo_model", checkpoint=checkpoint).model
        if not data.spec.startswith("fashion-mnist") or not isinstance(data.train, ImageArrays):
            sys.exit(f"--data {data.spec}: learning rates are chosen on fashion-mnist[:ROOT] alone")
        embedded, labels = read_fashion_mnist(DATA_FOLDER, "train")
        kept = without(data.train, embedded)
        held_out = ImageArrays(embedded, labels, data.train.preprocessing)
        setting = Setting(dense, calibration_images(kept, images, seed=0), 0, rules_for(dense))
        return cls(setting, RememberingTeacher(dense), replace(data, train=kept), held_out)


@dataclass(frozen=True)
class Trainer:
    """Trains the methods of one benchmark.

    Attributes:
        teacher: the dense net.
        data: what all train on; part of it is held out.
        results: where the learning rates are kept, under ``learning_rates``: the twin's cross-entropies.
        rates: to choose from.
        twin: makes the net to choose on; it is called where a loss is missing only.
    """

    teacher: RememberingTeacher
    data: DataSplits
    results: Results[Any]
    rates: tuple[float, ...]
    twin: Callable[[], Twin]

    @classmethod
    def load(
        cls, arguments: argparse.Namespace, dense: nn.Module, data: DataSplits, results: Results[Any],
        images: int,
    ) -> Trainer:  # fmt: skip
        """Make a trainer as the options of ``add_training`` say; ``--quick`` has 2,000 images, two rates.

        Args:
            arguments: the options.
            dense: the net to distil from.
            data: what to train on.
            results: where the learning rates are kept.
            images: calibration images for the twin.
        """
        quick = arguments.quick
        rates = tuple(arguments.learning_rates)[: 2 if quick else None]

        @functools.cache
        def twin() -> Twin:
            whole = Twin.load(arguments.twin, data, images)
            return replace(whole, data=few(whole.data), held_out=_first(whole.held_out)) if quick else whole

        return cls(RememberingTeacher(dense), few(data) if quick else data, results, rates, twin)

    def train(
        self, model: nn.Module, epochs: float, rate: float | None, seed: int,
        checkpointing: Checkpointing | None = None,
    ) -> FinetuneResult:  # fmt: skip
        """Train a model with one learning rate; None = that which follows from what was lost."""
        settings = replace(FAST, epochs=epochs, learning_rate=rate, seed=seed)
        return _finetune(model, self.data, self.teacher, settings, checkpointing=checkpointing)

    def learning_rate(self, name: str, make: Callable[[Setting], nn.Module]) -> float:
        """Return the rate that does best for a method, ``make``, after a tenth of an epoch.

        It is measured once for each ``name``, by the cross-entropy of the twin's held-out images.
        """
        if len(self.rates) == 1:
            return self.rates[0]
        known: dict[str, float] = self.results.read().get("learning_rates", {}).get(name, {})
        missing = [rate for rate in self.rates if f"{rate:g}" not in known]
        if missing:
            twin = self.twin()
            known = {**known, **self._losses(name, make(twin.setting), twin, missing)}
        return min(self.rates, key=lambda rate: known[f"{rate:g}"])

    def _losses(self, name: str, model: nn.Module, twin: Twin, rates: Sequence[float]) -> dict[str, float]:
        losses: dict[str, float] = {}
        for rate in rates:
            settings = replace(FAST, epochs=CHOOSING_EPOCHS, learning_rate=rate)
            tuned = _finetune(model, twin.data, twin.teacher, settings, twin.held_out)
            last = tuned.history[-1]
            losses[f"{rate:g}"] = last.validation_loss
            with self.results.changing() as document:
                document.setdefault("learning_rates", {}).setdefault(name, {}).update(losses)
            print(
                f"{name}, learning rate {rate:g}: twin {100 * (last.validation_top1 or 0.0):.2f}%, "
                f"cross-entropy {last.validation_loss:.4f}",
                flush=True,
            )
        return losses


def add_training(parser: Parser) -> None:
    """Add the options of the training."""
    parser.add_argument(
        "--twin", type=Path, default=MODEL_FILE, metavar="FILE", help="weights of the net to choose learning "
        "rates on, that has not seen the demo's images (default: the demo's own)",
    )  # fmt: skip
    parser.add_numbers("--learning-rates", RATES, "to choose from for each method", float)


def _finetune(
    model: nn.Module,
    data: DataSplits,
    teacher: RememberingTeacher,
    settings: FinetuneSettings,
    validation: Data | None = None,
    checkpointing: Checkpointing | None = None,
) -> FinetuneResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return finetune(
            model, data, teacher=teacher, settings=settings, validation=validation,
            checkpointing=checkpointing, progress=True,
        )  # fmt: skip


def few(data: DataSplits) -> DataSplits:
    """Return data of 2,000 training images."""
    return replace(data, train=_first(data.train))


def _first(images: Any) -> Data:
    return Subset(images, range(2000))
