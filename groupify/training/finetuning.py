"""Fine-tuning with distillation from the dense model, and never a worse model than before."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groupify.data.batches import Data
from groupify.data.calls import Inputs, iterate_calls
from groupify.data.ranks import ALONE, current_ranks
from groupify.data.splits import DataSplits
from groupify.errors import DataError, GroupifyWarning, SpecError
from groupify.graph.copying import copy_of
from groupify.machine import bfloat16_is_slow
from groupify.models.wrappers import unwrapped
from groupify.training.history import FinetuneRow, LogSettings
from groupify.training.holdout import generators_of, hold_out
from groupify.training.learner import Learner
from groupify.training.loop import Training
from groupify.training.settings import FinetuneSettings
from groupify.training.state import Checkpointing, own_random_states, seed_all


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tune gave.

    Attributes:
        model: a new model with the best weights of all validations, in eval mode.
        last_model: the same with the weights of the last step.
        given_model: the same with the weights as they were given.
        history: one row per validation, the first before any step.
        best_step: the step of ``model``'s weights; 0 = the given weights.
        steps: steps done.
        validation_images: number of held-out images.
        seconds: duration, validation included.
        settings: as given, with what followed from what the model had lost.
    """

    model: nn.Module
    last_model: nn.Module
    given_model: nn.Module
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
        return self.best.validation_top1

    @property
    def best(self) -> FinetuneRow:
        """The validation of the returned weights."""
        return next(row for row in self.history if row.step == self.best_step)


def finetune(
    student: nn.Module,
    data: DataSplits,
    *,
    teacher: nn.Module | None = None,
    settings: FinetuneSettings | None = None,
    validation: Data | None = None,
    inputs: Inputs | None = None,
    checkpointing: Checkpointing | None = None,
    log: LogSettings | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> FinetuneResult:
    """Train a converted model further: cross-entropy and distillation from the dense model.

    Part of the training data is held out, and the weights with the least loss on it are returned; the given
    ones unless the loss falls by more than its standard error. The loss is that of augmented views where the
    data have an augmentation, since the teacher was trained on the images. ``data.test`` is never read. The
    same call gives the same weights, bit for bit on a CPU with the same number of threads, also when it was
    killed in between and resumed. Works on the student's device.

    In a process group (``distributed``) each step's batch is divided among the processes, batch norms
    use the statistics of the whole batch, and every process returns the same result, which is that of
    one process but for rounding. Augmentation and dropout draw other numbers, though.

    Args:
        student: the converted classifier; it is left untouched.
        data: the training data, in ``data.train``, and its augmentation.
        teacher: the dense model; None = cross-entropy only.
        settings: None = the defaults.
        validation: held-out images of the caller's; None = a part of ``data.train``.
        inputs: for a model that takes more than images, a batch, as the data gives it, → positional and
            keyword arguments. Labels are then the last entry of a batch, or under ``labels`` in a dict.
        checkpointing: store the state on the way, and go on from it; None = neither.
        log: where to log; None = nowhere.
        distributed: every process of the initialised process group makes this call, with the same
            arguments; a state and its resuming need a folder that all of them see.
        progress: show a progress bar on stderr.

    Raises:
        SpecError: neither labels nor a teacher, labels asked of data that has none, or a state of
            another run.
        DataError: no training data, too little of it, or bad images or labels; or data that is not what
            the interrupted run read.
        ArtefactError: a state or log that cannot be read or written.

    Warns:
        GroupifyWarning: a gradient is not finite; training stopped before that step. Or an augmentation is
            asked of data that has none, or bfloat16 of a CPU that is slow in it.
    """
    settings = settings or FinetuneSettings()
    start = time.perf_counter()
    train = _checked(data, teacher, settings, inputs)
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    _warn(data, settings, device)
    ranks = current_ranks() if distributed else ALONE
    # Dropout and the caller's loaders draw from the global generators, or from one of their own.
    with own_random_states(device, generators_of(train)):
        seed_all(settings.seed)
        part, held_out = hold_out(train, validation, settings, inputs)
        learner = Learner(
            copy_of(unwrapped(student)),
            None if teacher is None else copy_of(unwrapped(teacher)).eval(),
            settings,
            example=next(iterate_calls(held_out, 2, inputs))[0].head(2),
            augment=data.augment if settings.augment else None,
            ranks=ranks,
        )
        views = data.augment if validation is None and inputs is None else None
        training = Training(learner, part, held_out, data=data.spec, checkpointing=checkpointing, views=views)
        training.run(log, progress=progress and ranks.first)
    return FinetuneResult(
        model=_with_state(student, training.history.best_state),
        last_model=_with_state(student, learner.evaluated.state_dict()),
        given_model=_with_state(student, unwrapped(student).state_dict()),
        history=tuple(training.history.rows),
        best_step=training.history.best.step,
        steps=training.step,
        validation_images=training.validation.images,
        seconds=time.perf_counter() - start,
        settings=training.settings,
    )


def _checked(
    data: DataSplits, teacher: nn.Module | None, settings: FinetuneSettings, inputs: Inputs | None
) -> Data:
    """Return the training data, if there is something to learn from it."""
    if data.train is None:
        raise DataError(f"data {data.spec!r} has no training part: fine-tuning needs one")
    if settings.labels and not data.labelled:
        raise SpecError(f"data {data.spec!r} has no labels: distil only (labels=False)")
    if not settings.labels and (teacher is None or settings.distill == "none"):
        raise SpecError("neither labels nor a teacher: fine-tuning needs one of them")
    if inputs is not None and settings.augment and data.augment is not None:
        raise SpecError(
            "the augmentation is of images alone and the model takes more (inputs): set augment=False and "
            "let the data set augment"
        )
    return data.train


def _warn(data: DataSplits, settings: FinetuneSettings, device: torch.device) -> None:
    """Warn the caller of ``finetune`` of settings that do nothing, or harm."""
    if settings.augment and data.augment is None:
        warnings.warn(
            f"data {data.spec!r} has no standard augmentation, so its images are trained on as they are",
            GroupifyWarning,
            stacklevel=3,
        )
    if settings.amp is not None and device.type == "cpu" and bfloat16_is_slow():
        warnings.warn(
            f"this CPU has no fast instructions for {settings.amp}: training with it takes many times longer "
            "than in float32; leave mixed precision out",
            GroupifyWarning,
            stacklevel=3,
        )


def _with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    copied = copy_of(unwrapped(model))
    copied.load_state_dict(state)
    return copied.eval()
