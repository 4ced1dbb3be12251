"""The training that the benchmarks give to every method alike."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from groupify.data import DataSplits
from groupify.recovery.finetune import FinetuneResult, FinetuneSettings, finetune
from scripts.results import ResultFile

FAST = FinetuneSettings(amp="bfloat16", channels_last=True)
RATES = "0.005,0.02,0.1"
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
class Trainer:
    """Trains the methods of one benchmark.

    Attributes:
        teacher: the dense net.
        data: what all train on; part of it is held out.
        results: where the learning rates are kept, under ``learning_rates``: held-out accuracies (%).
        rates: to choose from.
    """

    teacher: RememberingTeacher
    data: DataSplits
    results: ResultFile
    rates: tuple[float, ...]

    def train(
        self, model: nn.Module, epochs: float, rate: float, seed: int, *, labels: bool = True
    ) -> FinetuneResult:
        """Train a model with one learning rate."""
        settings = replace(FAST, epochs=epochs, learning_rate=rate, labels=labels, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return finetune(model, self.data, teacher=self.teacher, settings=settings, progress=True)

    def learning_rate(self, name: str, model: nn.Module, seed: int, *, labels: bool = True) -> float:
        """Return the rate that does best on the held-out images after a tenth of an epoch.

        It is measured once for each ``name``, of a method and its number of groups.
        """
        if len(self.rates) == 1:
            return self.rates[0]
        known: dict[str, float] = self.results.read().get("learning_rates", {}).get(name, {})
        for rate in self.rates:
            if f"{rate:g}" in known:
                continue
            result = self.train(model, CHOOSING_EPOCHS, rate, seed, labels=labels)
            known = {**known, f"{rate:g}": 100 * result.best_validation_top1}
            with self.results.changing() as document:
                document.setdefault("learning_rates", {})[name] = known
            print(f"{name}, learning rate {rate:g}: held-out {known[f'{rate:g}']:.2f}", flush=True)
        return max(self.rates, key=lambda rate: known[f"{rate:g}"])
