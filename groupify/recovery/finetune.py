"""Fine-tuning with distillation from the dense model, and never a worse model than before."""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from groupify.data import Data, DataSplits, check_labels
from groupify.data.batches import Batch
from groupify.errors import DataError, GroupifyWarning, SpecError
from groupify.recovery.holdout import TrainingPart, hold_out
from groupify.recovery.settings import FinetuneSettings, learning_rate_at
from groupify.recovery.steps import Validation, as_input, make_optimizer, train_step, validate

__all__ = ["FinetuneResult", "FinetuneRow", "FinetuneSettings", "finetune"]


@dataclass(frozen=True)
class FinetuneRow:
    """One line of the history, written at each validation.

    Attributes:
        step: steps done; 0 = the model as given.
        epoch: passes over the training part done.
        loss: mean training loss since the row before; None at step 0.
        learning_rate: of the last step; None at step 0.
        images_per_second: training speed since the row before, validation not counted; None at step 0.
        validation_top1: share of the held-out images whose top class is right, a fraction; with
            ``labels=False``, is the teacher's.
        validation_loss: cross-entropy on the held-out images, against the same.
    """

    step: int
    epoch: float
    loss: float | None
    learning_rate: float | None
    images_per_second: float | None
    validation_top1: float
    validation_loss: float


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tune gave.

    Attributes:
        model: a new model with the best weights of all validations, in eval mode.
        history: one row per validation, the first before any step.
        best_step: the step of ``model``'s weights; 0 = nothing was better than the given weights.
        steps: steps done.
        validation_images: number of held-out images.
        seconds: duration, validation included.
        settings: as given.
    """

    model: nn.Module
    history: tuple[FinetuneRow, ...]
    best_step: int
    steps: int
    validation_images: int
    seconds: float
    settings: FinetuneSettings

    @property
    def initial_validation_top1(self) -> float:
        """Accuracy of the given weights on the held-out images, a fraction."""
        return self.history[0].validation_top1

    @property
    def best_validation_top1(self) -> float:
        """Accuracy of the returned weights on the held-out images, a fraction."""
        return next(row.validation_top1 for row in self.history if row.step == self.best_step)


def finetune(
    student: nn.Module,
    data: DataSplits,
    *,
    teacher: nn.Module | None = None,
    settings: FinetuneSettings | None = None,
    validation: Data | None = None,
    progress: bool = False,
) -> FinetuneResult:
    """Train a converted model further: cross-entropy and distillation from the dense model.

    SGD with Nesterov's momentum. Part of the training data is held out, and the best weights on it
    are returned, the given ones included; ``data.test`` is never read. The same call gives the same
    weights, bit for bit on a CPU with the same number of threads. Works on the student's device.

    Args:
        student: the converted classifier; it is left untouched.
        data: the training data, in ``data.train``, and its augmentation.
        teacher: the dense model; None = cross-entropy only.
        settings: None = the defaults.
        validation: held-out images of the caller's; None = a part of ``data.train``.
        progress: show a progress bar on stderr.

    Raises:
        SpecError: neither labels nor a teacher, or labels asked of data that has none.
        DataError: no training data, too little of it, or bad images or labels.

    Warns:
        GroupifyWarning: the loss is no longer finite; training stopped.
    """
    settings = settings or FinetuneSettings()
    start = time.perf_counter()
    if data.train is None:
        raise DataError(f"data {data.spec!r} has no training part: fine-tuning needs one")
    if settings.labels and not data.labelled:
        raise SpecError(f"data {data.spec!r} has no labels: distil only (labels=False)")
    if teacher is None and not settings.labels:
        raise SpecError("neither labels nor a teacher: fine-tuning needs one of them")

    model = copy.deepcopy(student)
    frozen_teacher = None if teacher is None else copy.deepcopy(teacher).eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    # Dropout and the caller's loaders draw from the global generators.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        part, held_out = hold_out(data.train, validation, settings)
        training = _Training(model, frozen_teacher, data, part, held_out, settings)
        training.run(progress)
    model.load_state_dict(training.best_state)
    return FinetuneResult(
        model=model.eval(),
        history=tuple(training.history),
        best_step=training.best.step,
        steps=training.step,
        validation_images=training.validation.images,
        seconds=time.perf_counter() - start,
        settings=settings,
    )


class _Training:
    """A fine-tune under way: everything that changes from step to step."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        data: DataSplits,
        part: TrainingPart,
        held_out: Data,
        settings: FinetuneSettings,
    ) -> None:
        self.model = model
        self.teacher = teacher
        self.augment = data.augment if settings.augment else None
        self.part = part
        self.held_out = held_out
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer = make_optimizer(model, settings)
        self.steps = max(1, round(settings.epochs * part.steps_per_epoch))
        self.step = 0
        self.validation = self._validate()
        self.best = self._row(None, None, None)
        self.history = [self.best]
        self.best_state = copy.deepcopy(model.state_dict())

    def run(self, progress: bool) -> None:
        """Do all steps, with a validation after every few and after the last."""
        points = _validation_points(self.steps, self.part.steps_per_epoch, self.settings)
        losses: list[Tensor] = []
        images_seen = 0
        start = time.perf_counter()
        self.model.train()
        with tqdm(
            total=self.steps, desc="fine-tuning", unit="step", disable=None if progress else True
        ) as bar:
            for images, labels in itertools.islice(_endless(self.part, self.settings), self.steps):
                rate = learning_rate_at(self.step, self.steps, self.settings)
                losses.append(self._train_step(images, labels, rate))
                images_seen += len(images)
                self.step += 1
                bar.update()
                if self.step not in points:
                    continue
                loss = float(torch.stack(losses).mean())
                speed = images_seen / (time.perf_counter() - start)
                if not math.isfinite(loss):
                    warnings.warn(
                        f"the training loss is {loss} at step {self.step}: training stopped, the best "
                        f"weights so far are kept; try a learning rate below {self.settings.learning_rate:g}",
                        GroupifyWarning,
                        stacklevel=3,
                    )
                    return
                self.validation = self._validate()
                self._keep(self._row(loss, rate, speed))
                bar.set_postfix(loss=f"{loss:.3f}", validation=f"{self.validation.top1:.2%}", refresh=False)
                losses, images_seen, start = [], 0, time.perf_counter()
                self.model.train()

    def _train_step(self, images: Tensor, labels: Tensor, learning_rate: float) -> Tensor:
        if self.augment is not None:
            images = self.augment(images, self.generator)
        targets = None
        if self.settings.labels:
            check_labels(labels, self.validation.classes)
            targets = labels
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        images = as_input(images, self.model)
        targets = None if targets is None else targets.to(images.device)
        return train_step(self.model, self.teacher, self.optimizer, images, targets, self.settings)

    def _validate(self) -> Validation:
        return validate(self.model, self.held_out, self.settings, self.teacher)

    def _row(self, loss: float | None, rate: float | None, speed: float | None) -> FinetuneRow:
        return FinetuneRow(
            step=self.step,
            epoch=self.step / self.part.steps_per_epoch,
            loss=loss,
            learning_rate=rate,
            images_per_second=speed,
            validation_top1=self.validation.top1,
            validation_loss=self.validation.loss,
        )

    def _keep(self, row: FinetuneRow) -> None:
        """Note a validation; its weights are kept if they are the best. The loss decides between equals."""
        self.history.append(row)
        better = (row.validation_top1, -row.validation_loss) > (
            self.best.validation_top1,
            -self.best.validation_loss,
        )
        if better and math.isfinite(row.validation_loss):
            self.best = row
            self.best_state = copy.deepcopy(self.model.state_dict())


def _validation_points(steps: int, steps_per_epoch: int, settings: FinetuneSettings) -> set[int]:
    """Return the steps behind which to validate: evenly spread, the last one among them."""
    count = min(steps, math.ceil(steps * settings.validations_per_epoch / steps_per_epoch))
    return {(index + 1) * steps // count for index in range(count)}


def _endless(part: TrainingPart, settings: FinetuneSettings) -> Iterator[Batch]:
    """Pass after pass over the training part; batches of one image are left out.

    Batch norm has no variance of a single image.
    """
    for epoch in itertools.count():
        usable = 0
        for images, labels in part.batches(settings, epoch):
            if len(images) > 1:
                usable += 1
                yield images, labels
        if usable == 0:
            raise DataError("fewer than two images are left to train on: give more, or a larger batch size")
