"""Fine-tuning with distillation from the dense model, and never a worse model than before."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from groupify.data.batches import Data
from groupify.data.calls import Inputs, iterate_calls
from groupify.data.ranks import ALONE, Ranks, current_ranks
from groupify.data.splits import DataSplits
from groupify.errors import DataError, GroupifyWarning, SpecError
from groupify.graph.copying import copy_of
from groupify.graph.forward import run_once
from groupify.machine import bfloat16_is_slow
from groupify.models.wrappers import unwrapped
from groupify.tasks import AUTO, OUTPUTS
from groupify.training.goal import make_goal
from groupify.training.history import FinetuneRow, LogSettings
from groupify.training.holdout import generators_of, hold_out
from groupify.training.learner import Learner
from groupify.training.loop import Training
from groupify.training.objective import as_input
from groupify.training.own_loss import Loss
from groupify.training.processes import LEAST_STEPS, Speeds, measure_speeds
from groupify.training.settings import FinetuneSettings
from groupify.training.state import Checkpointing, own_random_states, seed_all
from groupify.training.validation import variances_of


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
        settings: as given, with what followed from the data and from what the model had lost.
        loss: name of the user's loss; None = none was given.
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
    loss: str | None = None

    @property
    def initial_validation_top1(self) -> float | None:
        """Accuracy of the given weights on the held-out images, a fraction; None without classes."""
        return self.history[0].validation_top1

    @property
    def best_validation_top1(self) -> float | None:
        """Accuracy of the returned weights on the held-out images, a fraction; None without classes."""
        return self.best.validation_top1

    @property
    def recovery(self) -> dict[str, Any]:
        """What a recipe keeps of it, as JSON values."""
        own = {} if self.loss is None else {"loss": self.loss}
        return {**self.settings.as_recipe(), **own}

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
    loss: Loss | None = None,
    task: str = AUTO,
    validation: Data | None = None,
    inputs: Inputs | None = None,
    checkpointing: Checkpointing | None = None,
    log: LogSettings | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> FinetuneResult:
    """Train a converted model further: a loss by labels, and distillation from the dense model.

    For class scores the loss is cross-entropy, and what is distilled their softmax; for other outputs the
    loss is the caller's, and what is distilled all outputs, by their relative error.

    Part of the training data is held out, and the weights with the least loss on it are returned; the given
    ones unless it falls. The loss is that of augmented views where the data have an augmentation, since the
    teacher was trained on the images. ``data.test`` is never read. The
    same call gives the same weights, bit for bit on a CPU with the same number of threads, also when it was
    killed in between and resumed. Works on the student's device.

    In a process group (``distributed``) each step's batch is divided among the processes, batch norms
    use the statistics of the whole batch, and every process returns the same result, which is that of
    one process but for rounding. Augmentation and dropout draw other numbers, though. On CPUs a few steps are
    timed before a training of 100 steps or more, with all processes and with one.

    Args:
        student: the converted model; it is left untouched.
        data: the training data, in ``data.train``, and its augmentation.
        teacher: the dense model; None = labels only.
        settings: None = the defaults.
        loss: a loss for labels of any form, see ``Loss``; None = the cross-entropy of class numbers.
        task: what the outputs are taken for, see ``groupify.tasks``.
        validation: held-out images of the caller's; None = a part of ``data.train``.
        inputs: for a model that takes more than images, a batch, as the data gives it, → positional and
            keyword arguments. Labels are then the last entry of a batch, or under ``labels`` in a dict.
        checkpointing: store the state on the way, and go on from it; None = neither.
        log: where to log; None = nowhere.
        distributed: every process of the initialised process group makes this call, with the same
            arguments; a state and its resuming need a folder that all of them see.
        progress: show a progress bar on stderr.

    Raises:
        SpecError: neither labels nor a teacher, labels asked of data that has none or for outputs without a
            loss, a loss that fails or is no number, or a state of another run.
        DataError: no training data, too little of it, or bad images or labels; or data that is not what
            the interrupted run read.
        ArtefactError: a state or log that cannot be read or written.

    Warns:
        GroupifyWarning: a gradient is not finite; training stopped before that step. Or an augmentation is
            asked of data that has none, or bfloat16 of a CPU that is slow in it. Or several processes are
            slower than one with all cores of its machine.
    """
    settings = settings or FinetuneSettings()
    start = time.perf_counter()
    train = _training_part(data, settings, inputs)
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    _warn(data, settings, device)
    ranks = current_ranks() if distributed else ALONE
    # Dropout and the caller's loaders draw from the global generators, or from one of their own.
    with own_random_states(device, generators_of(train)):
        goal = make_goal(
            _outputs_of(student, train, inputs),
            data,
            settings,
            task=task,
            loss=loss,
            taught=teacher is not None,
        )
        settings = replace(settings, labels=goal.labels)
        seed_all(settings.seed)
        part, held_out = hold_out(train, validation, settings, inputs, goal.reads)
        if goal.task == OUTPUTS and teacher is not None:
            theirs = copy_of(unwrapped(teacher)).eval()
            goal = replace(goal, variances=variances_of(theirs, held_out, settings, ranks, inputs))
        example = next(iterate_calls(held_out, 2, inputs, labelled=False))[0].head(2)

        def make_learner(ranks: Ranks, settings: FinetuneSettings) -> Learner:
            return Learner(
                copy_of(unwrapped(student)), None if teacher is None else copy_of(unwrapped(teacher)).eval(),
                settings, example, data.augment if settings.augment else None, ranks, goal,
            )  # fmt: skip

        learner = make_learner(ranks, settings)
        plain = validation is not None or inputs is not None or goal.task == OUTPUTS or loss is not None
        views = None if plain else data.augment
        training = Training(learner, part, held_out, data=data.spec, checkpointing=checkpointing, views=views)
        if ranks.world > 1 and device.type == "cpu" and training.steps >= LEAST_STEPS:
            with own_random_states(device, []):
                batch = next(iterate_calls(held_out, settings.batch_size, inputs, labelled=goal.reads))
                if len(batch[1]) >= 2 * ranks.world:  # batch norms want two images
                    make = functools.partial(make_learner, settings=training.settings)
                    _warn_of_processes(measure_speeds(make, *batch, ranks), ranks)
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
        loss=goal.loss_name,
    )


def _training_part(data: DataSplits, settings: FinetuneSettings, inputs: Inputs | None) -> Data:
    """Return the training data, if it can be trained on."""
    if data.train is None:
        raise DataError(f"data {data.spec!r} has no training part: fine-tuning needs one")
    if inputs is not None and settings.augment and data.augment is not None:
        raise SpecError(
            "the augmentation is of images alone and the model takes more (inputs): set augment=False and "
            "let the data set augment"
        )
    return data.train


def _outputs_of(model: nn.Module, data: Data, inputs: Inputs | None) -> Any:
    """Return what a model gives for one or two examples of its data."""
    call, _ = next(iterate_calls(data, 2, inputs, limit=2, labelled=False))
    return run_once(model, as_input(call, model))


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


def _warn_of_processes(speeds: Speeds, ranks: Ranks) -> None:
    """Warn the caller of ``finetune`` of processes that are slower than one."""
    if ranks.first and not speeds.pays:
        warnings.warn(f"{speeds}: train without torchrun, which is faster", GroupifyWarning, stacklevel=3)


def _with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    copied = copy_of(unwrapped(model))
    copied.load_state_dict(state)
    return copied.eval()
