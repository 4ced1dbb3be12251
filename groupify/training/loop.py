"""A fine-tune under way: the loop, and everything that changes from step to step.

The loop is our own and no library's trainer, since a run that was killed has to go on bit for bit, in the
middle of a pass too, over data of any kind. For that, all that a step depends on has to be known and stored:
the weights, the optimizer and the average, the place in the pass, the generators of the order, the
augmentation and dropout, the sums behind the next line of the log. Trainers resume at a pass, or draw
from generators that they do not store.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from groupify.data.batches import Data, check_labels, is_map_style
from groupify.data.ranks import Ranks
from groupify.data.splits import Augment
from groupify.devices import with_float64
from groupify.errors import DataError, GroupifyWarning, SpecError
from groupify.training.goal import Goal
from groupify.training.history import (
    FinetuneRow,
    History,
    LogSettings,
    TrainingLog,
    validation_points,
)
from groupify.training.holdout import CallBatch, TrainingPart, checksum_of, order_seed
from groupify.training.learner import Learner
from groupify.training.settings import learning_rate_at
from groupify.training.state import (
    Checkpointing,
    TrainingState,
    check_same_run,
    hash_of,
    library_states,
    own_random_states,
    read_state,
    seed_all,
    set_library_states,
    set_torch_states,
    torch_states,
    with_prefix,
    without_prefix,
    write_state,
)
from groupify.training.validation import Gain, Validation, distance, gain_of, validate


class _Running:
    """Loss, right answers and images since some step, and the time that training took."""

    def __init__(self, device: torch.device) -> None:
        # On the device: a GPU need not wait for the numbers of each step.
        precise = with_float64(device) == device
        self.sums = torch.zeros(3, dtype=torch.float64 if precise else torch.float32, device=device)
        self.seconds = 0.0

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Take in a part of a batch with its mean loss."""
        self.sums[0] += loss.detach() * images
        self.sums[1] += correct
        self.sums[2] += images

    def means(self, ranks: Ranks) -> tuple[float, float, float]:
        """Return mean loss, accuracy and images per second over all ranks."""
        loss, correct, images = ranks.sum(self.sums.clone()).tolist()
        return loss / images, correct / images, images / max(self.seconds, 1e-9)


class Training:
    """A fine-tune under way.

    Args:
        learner: the student, untrained.
        part: what is trained on.
        held_out: what the best weights are chosen on.
        data: name of the data, which a state has to be of.
        checkpointing: when to store the state, and whether to go on from it.
        views: the augmentation of held-out images that the teacher may have seen; None = none.
    """

    def __init__(
        self,
        learner: Learner,
        part: TrainingPart,
        held_out: Data,
        *,
        data: str,
        checkpointing: Checkpointing | None = None,
        views: Augment | None = None,
    ) -> None:
        self.learner, self.views = learner, views
        self.ranks = learner.ranks
        self.part, self.held_out = part, held_out
        self.inputs = part.inputs
        self.steps = max(1, round(learner.settings.epochs * part.steps_per_epoch))
        self.checkpointing = checkpointing
        self.identity = {} if checkpointing is None else self._identity(data)
        self.step = self.epoch = self.next_batch = self.checksum = 0
        self.since_row, self.since_line = _Running(learner.device), _Running(learner.device)
        self._states: tuple[list[Tensor], Mapping[str, Any]] | None = None
        self.validation, self.first_losses = self._validate()
        _refuse_if_not_finite(self.first_losses, learner.goal)
        learner.settings = self.settings = learner.settings.resolved(self._lost())
        if checkpointing is not None and checkpointing.resume and checkpointing.file.exists():
            self._restore(checkpointing)
        else:
            first = self._row(None, None, None, None)
            self.history = History([first], 0, copy.deepcopy(learner.evaluated.state_dict()))

    def run(self, log: LogSettings | None, *, progress: bool) -> None:
        """Do all steps, with a validation after every few and after the last."""
        points = validation_points(self.steps, self.part.steps_per_epoch, self.settings)
        batches = self._batches()
        interval = (log or LogSettings()).interval  # of all ranks, since they sum up together
        log = log if self.ranks.first else None
        with closing(TrainingLog(log, self.step)) as journal, self._bar(progress) as bar:
            while self.step < self.steps:
                rate = learning_rate_at(self.step, self.steps, self.settings)
                if not self._train_step(batches, rate):
                    self._end_early(journal, rate)
                    return
                bar.update()
                if self.step % interval == 0 or self.step == self.steps:
                    self._log_line(journal, bar, rate)
                if self.step in points:
                    self._validation_point(journal, rate)
                self._save_if_due()

    def _bar(self, progress: bool) -> tqdm[Any]:
        disable = None if progress else True  # None = where stderr is no terminal
        return tqdm(total=self.steps, initial=self.step, desc="fine-tuning", unit="step", disable=disable)

    # one step ----------------------------------------------------------------------------------

    def _train_step(self, batches: Iterator[tuple[CallBatch, int]], rate: float) -> bool:
        """Learn from the next batch; False = that would make weights that are not finite."""
        start = time.perf_counter()
        (call, labels), whole = next(batches)
        if self.learner.goal.labels and self.learner.goal.loss is None:
            check_labels(labels, self.validation.classes)
        if not self.learner.step(self.step + 1, call, labels, whole, rate, self._add):
            return False
        seconds = time.perf_counter() - start
        self.since_row.seconds += seconds
        self.since_line.seconds += seconds
        self.step += 1
        return True

    def _add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        for running in (self.since_row, self.since_line):
            running.add(loss, correct, images)

    def _batches(self) -> Iterator[tuple[CallBatch, int]]:
        """Pass after pass over the training part, from where the run stands.

        Left out are batches of one image, since batch norm has no variance of it, and those that do not
        give each rank an image.
        """
        smallest = max(2, self.ranks.world)
        while True:
            seed = order_seed(self.settings, self.epoch)
            seed_all(seed)
            first, usable = self.next_batch, 0
            for batch, whole in self.part.batches(
                self.settings, self.epoch, first, self.ranks, self._continue
            ):
                if self.next_batch == 0 and self.ranks.world > 1:
                    torch.manual_seed(seed + 1_000_000_007 * self.ranks.rank)  # for dropout
                self.next_batch += 1
                if not is_map_style(self.part.data):
                    self.checksum = checksum_of(batch[1], self.checksum)
                if whole >= smallest:
                    usable += 1
                    yield batch, whole
            if usable == 0 and first == 0:
                raise DataError(
                    "fewer than two images are left to train on: give more, or a larger batch size"
                )
            self.epoch, self.next_batch, self.checksum = self.epoch + 1, 0, 0

    def _continue(self, checksum: int | None) -> None:
        """Take up a resumed pass, behind the batches that were trained on before."""
        if self._states is None:
            return
        if checksum is not None and checksum != self.checksum:
            raise DataError(
                "the training data gives other labels than in the interrupted run: its order must depend on "
                "the random generators or set_epoch(epoch) only; begin anew without resuming"
            )
        tensors, libraries = self._states
        set_torch_states(tensors, self.learner.device, self.learner.augmentation)
        if libraries:
            set_library_states(libraries)
        self._states = None

    # validation and logs -----------------------------------------------------------------------

    def _end_early(self, journal: TrainingLog, rate: float) -> None:
        """Keep what there is when a step cannot be taken: the weights before it are validated, too."""
        if self.ranks.first:
            warnings.warn(
                f"a gradient is not finite at step {self.step + 1}: training stopped before it, and the best "
                f"weights so far are kept; try a learning rate below {self.settings.learning_rate:g}",
                GroupifyWarning,
                stacklevel=4,
            )
        if self.history.rows[-1].step < self.step:
            self._validation_point(journal, rate)

    def _validation_point(self, journal: TrainingLog, rate: float) -> None:
        """Validate and note it."""
        loss, _, speed = self.since_row.means(self.ranks)
        self.validation, losses = self._validate()
        gain = gain_of(self.first_losses, losses, self.ranks)
        row = self._row(loss if math.isfinite(loss) else None, rate, speed, gain)
        self.history.add(row, self.learner.evaluated)
        self.since_row = _Running(self.learner.device)
        values: dict[str, float | None] = {
            "validation_top1": row.validation_top1,
            "validation_loss": row.validation_loss,
            "validation_gain": gain.mean,
        }
        journal.write(row.step, row.epoch, values)

    def _log_line(self, journal: TrainingLog, bar: tqdm[Any], rate: float) -> None:
        loss, accuracy, speed = self.since_line.means(self.ranks)
        self.since_line = _Running(self.learner.device)
        top1 = self.validation.top1
        values: dict[str, float | None] = {
            "loss": loss,
            "accuracy": None if top1 is None else accuracy,
            "learning_rate": rate,
            "images_per_second": speed,
        }
        journal.write(self.step, self.step / self.part.steps_per_epoch, values)
        right = "" if top1 is None else f"accuracy {accuracy:.1%}, "
        validated = f"loss {self.validation.loss:.3g}" if top1 is None else f"{top1:.2%}"
        bar.set_postfix_str(
            f"loss {loss:.3f}, {right}{speed:.0f} images/s, rate {rate:.2g}, validation {validated}",
            refresh=False,
        )

    def _validate(self) -> tuple[Validation, Tensor]:
        learner = self.learner
        # An augmentation may draw from the global generators: views are alike, and the training unmoved.
        with own_random_states(learner.device, []):
            seed_all(learner.settings.seed)
            return validate(
                learner.evaluated, self.held_out, learner.settings, learner.teacher, self.ranks, self.inputs,
                self.views, learner.goal,
            )  # fmt: skip

    def _lost(self) -> float | None:
        """What the student has lost against its teacher, as far as the settings mind."""
        learner = self.learner
        if learner.teacher is None or learner.settings.is_resolved:
            return None
        return distance(
            learner.evaluated, learner.teacher, self.held_out, learner.settings, self.ranks, self.inputs,
            learner.goal,
        )  # fmt: skip

    def _row(
        self, loss: float | None, rate: float | None, speed: float | None, gain: Gain | None
    ) -> FinetuneRow:
        return FinetuneRow(
            step=self.step,
            epoch=self.step / self.part.steps_per_epoch,
            loss=loss,
            learning_rate=rate,
            images_per_second=speed,
            validation_top1=self.validation.top1,
            validation_loss=self.validation.loss,
            gain=gain,
        )

    # state -------------------------------------------------------------------------------------

    def _identity(self, data: str) -> dict[str, Any]:
        """What must be the same for a state to belong to this run."""
        return {
            "settings": _json_values(dataclasses.asdict(self.learner.settings)),
            "task": self.learner.goal.task,
            "loss": self.learner.goal.loss_name,
            "data": data,
            "number_of_steps": self.steps,
            "steps_per_epoch": self.part.steps_per_epoch,
            "number_of_processes": self.ranks.world,
            "hash_of_the_weights_before": hash_of(self.learner.model),
        }

    def _save_if_due(self) -> None:
        if self.checkpointing is None:
            return
        if self.step % self.checkpointing.interval == 0 or self.step == self.steps:
            self._save(self.checkpointing)

    def _save(self, checkpointing: Checkpointing) -> None:
        device, augmentation = self.learner.device, self.learner.augmentation
        states = [self.ranks.gather(state.to(device)) for state in torch_states(device, augmentation)]
        sums = [self.ranks.gather(running.sums) for running in (self.since_row, self.since_line)]
        if not self.ranks.first:
            return
        tensors = {
            **self.learner.tensors(),
            **with_prefix("best", self.history.best_state),
            **{f"random.{index}": state for index, state in enumerate(states)},
            **{f"sums.{index}": value for index, value in enumerate(sums)},
        }
        state = TrainingState(
            run=self.identity,
            step=self.step,
            epoch=self.epoch,
            next_batch=self.next_batch,
            checksum=self.checksum,
            seconds=(self.since_row.seconds, self.since_line.seconds),
            history=tuple(self.history.rows),
            best_step=self.history.best.step,
            validation=self.validation,
            # Other ranks' are not at hand; their libraries are seeded anew.
            libraries=library_states() if self.ranks.world == 1 else {},
        )
        write_state(checkpointing.file, tensors, state)

    def _restore(self, checkpointing: Checkpointing) -> None:
        tensors, state = read_state(checkpointing.file)
        check_same_run(checkpointing.file, state.run, self.identity)
        self.learner.load(tensors)
        self.step, self.epoch = state.step, state.epoch
        self.next_batch, self.checksum = state.next_batch, state.checksum
        self.history = History(state.history, state.best_step, without_prefix("best", tensors))
        self.validation = state.validation
        rank = self.ranks.rank
        for index, running in enumerate((self.since_row, self.since_line)):
            running.sums.copy_(tensors[f"sums.{index}"][rank])
            running.seconds = state.seconds[index]
        states = without_prefix("random", tensors)
        self._states = [states[str(index)][rank].cpu() for index in range(len(states))], state.libraries


def _refuse_if_not_finite(losses: Tensor, goal: Goal) -> None:
    """Refuse a loss of the user's by which images cannot be compared, before any work."""
    bad = int((~losses.isfinite()).sum())
    if bad and goal.loss is not None:
        raise SpecError(
            f"the loss {goal.loss_name!r} is not finite for {bad} of {len(losses)} held-out images, each by "
            "itself, so that weights cannot be compared by it: return one for each image, shape (n,), with 0 "
            "where there is nothing to compare"
        )


def _json_values(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return json.loads(json.dumps(value))
