"""A fine-tune under way: the loop, and everything that changes from step to step."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from groupify.data.batches import Batch, Data, check_labels, is_map_style, iterate_batches
from groupify.data.ranks import ALONE, Ranks
from groupify.data.splits import DataSplits
from groupify.errors import DataError, GroupifyWarning
from groupify.training.holdout import TrainingPart, checksum_of, order_seed
from groupify.training.logs import LogSettings, TrainingLog
from groupify.training.parallel import wrapped
from groupify.training.random_states import (
    library_states,
    seed_all,
    set_library_states,
    set_torch_states,
    torch_states,
)
from groupify.training.settings import FinetuneSettings, learning_rate_at
from groupify.training.state import (
    Checkpointing,
    check_same_run,
    hash_of,
    optimizer_tensors,
    read_state,
    set_optimizer_tensors,
    with_prefix,
    without_prefix,
    write_state,
)
from groupify.training.steps import (
    AveragedWeights,
    Objective,
    Validation,
    as_input,
    freeze_batch_norms,
    make_optimizer,
    validate,
)


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


class _Running:
    """Loss, right answers and images since some step, and the time that training took."""

    def __init__(self, device: torch.device) -> None:
        # On the device: a GPU need not wait for the numbers of each step.
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
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
        model: the student; it is trained in place.
        teacher: in eval mode; None = cross-entropy only.
        data: gives the augmentation.
        part: what is trained on.
        held_out: what the best weights are chosen on.
        settings: how to train.
        ranks: the processes that share the work.
        checkpointing: when to store the state, and whether to go on from it.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        data: DataSplits,
        part: TrainingPart,
        held_out: Data,
        settings: FinetuneSettings,
        *,
        ranks: Ranks = ALONE,
        checkpointing: Checkpointing | None = None,
    ) -> None:
        self.settings = settings
        self.ranks = ranks
        self.part = part
        self.held_out = held_out
        self.steps = max(1, round(settings.epochs * part.steps_per_epoch))
        self.checkpointing = checkpointing
        self.identity = {} if checkpointing is None else self._identity(model, data)
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
            teacher = None if teacher is None else teacher.to(memory_format=torch.channels_last)
        self.model = model
        self.teacher = teacher
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.augment = data.augment if settings.augment else None
        self.augmentation = torch.Generator().manual_seed(settings.seed + ranks.rank)
        self.optimizer = make_optimizer(model, settings)
        self.average = AveragedWeights(model, settings.ema_decay) if settings.ema_decay > 0 else None
        example = next(iterate_batches(held_out, 2))[0][:2]
        self.objective = Objective(model, teacher, settings, example)
        self.wrapped = model
        if ranks.world > 1:
            self.wrapped = wrapped(model, as_input(example, model, settings), ranks)

        self.step = 0
        self.epoch = 0
        self.next_batch = 0
        self.checksum = 0
        self.since_row, self.since_line = _Running(self.device), _Running(self.device)
        self._states: tuple[list[Tensor], dict[str, Any]] | None = None
        if checkpointing is not None and checkpointing.resume and checkpointing.file.exists():
            self._restore(checkpointing)
            return
        self.validation = self._validate()
        self.best = self._row(None, None, None)
        self.history = [self.best]
        self.best_state = copy.deepcopy(self.evaluated.state_dict())

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are validated and returned."""
        return self.model if self.average is None else self.average.model

    def run(self, log: LogSettings | None, *, progress: bool) -> None:
        """Do all steps, with a validation after every few and after the last."""
        points = _validation_points(self.steps, self.part.steps_per_epoch, self.settings)
        batches = self._batches()
        journal = TrainingLog(log if self.ranks.first else None, self.step)
        interval = (log or LogSettings()).interval
        try:
            with tqdm(
                total=self.steps,
                initial=self.step,
                desc="fine-tuning",
                unit="step",
                disable=None if progress else True,
            ) as bar:
                while self.step < self.steps:
                    start = time.perf_counter()
                    (images, labels), whole = next(batches)
                    rate = learning_rate_at(self.step, self.steps, self.settings)
                    self._train_step(images, labels, whole, rate)
                    seconds = time.perf_counter() - start
                    self.since_row.seconds += seconds
                    self.since_line.seconds += seconds
                    self.step += 1
                    bar.update()
                    if self.step % interval == 0 or self.step == self.steps:
                        self._log_line(journal, bar, rate)
                    if self.step in points and not self._validation_point(journal, rate):
                        return
                    self._save_if_due()
        finally:
            journal.close()

    # one step ----------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[Batch, int]]:
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
        set_torch_states(tensors, self.device, self.augmentation)
        if libraries:
            set_library_states(libraries)
        self._states = None

    def _train_step(self, images: Tensor, labels: Tensor, whole: int, learning_rate: float) -> None:
        if self.augment is not None:
            images = self.augment(images, self.augmentation)
        if self.settings.labels:
            check_labels(labels, self.validation.classes)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.wrapped.train()
        if self.settings.freeze_batch_norms:
            freeze_batch_norms(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        # The same number on all ranks, of two images or more each.
        parts = max(1, min(self.settings.accumulate, whole // self.ranks.world // 2))
        divided = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        for number, (some, targets) in enumerate(divided, start=1):
            inputs = as_input(some, self.model, self.settings)
            wanted = targets.to(inputs.device) if self.settings.labels else None
            with self._synchronising(number == parts):
                loss, correct = self.objective(self.wrapped, inputs, wanted)
                # Gradients are averaged over the ranks, so this gives the mean over the whole batch.
                share = len(some) * self.ranks.world / whole
                (loss * share if share != 1 else loss).backward()
            for running in (self.since_row, self.since_line):
                running.add(loss, correct, len(some))
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, self.step + 1)

    def _synchronising(self, last: bool) -> Any:
        """The gradients of all ranks are put together behind the last part of a batch."""
        if last or self.wrapped is self.model:
            return contextlib.nullcontext()
        return self.wrapped.no_sync()  # type: ignore[operator]

    # validation and logs -----------------------------------------------------------------------

    def _validation_point(self, journal: TrainingLog, rate: float) -> bool:
        """Validate and note it; False = the loss is no longer finite."""
        loss, _, speed = self.since_row.means(self.ranks)
        if not math.isfinite(loss):
            if self.ranks.first:
                warnings.warn(
                    f"the training loss is {loss} at step {self.step}: training stopped, the best weights so "
                    f"far are kept; try a learning rate below {self.settings.peak_learning_rate:g}",
                    GroupifyWarning,
                    stacklevel=4,
                )
            return False
        self.validation = self._validate()
        row = self._row(loss, rate, speed)
        self._keep(row)
        self.since_row = _Running(self.device)
        journal.write(
            row.step,
            row.epoch,
            {"validation_top1": row.validation_top1, "validation_loss": row.validation_loss},
        )
        return True

    def _log_line(self, journal: TrainingLog, bar: tqdm[Any], rate: float) -> None:
        loss, accuracy, speed = self.since_line.means(self.ranks)
        self.since_line = _Running(self.device)
        values: dict[str, float | None] = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": rate,
            "images_per_second": speed,
        }
        journal.write(self.step, self.step / self.part.steps_per_epoch, values)
        bar.set_postfix_str(
            f"loss {loss:.3f}, accuracy {accuracy:.1%}, {speed:.0f} images/s, rate {rate:.2g}, "
            f"validation {self.validation.top1:.2%}",
            refresh=False,
        )

    def _validate(self) -> Validation:
        return validate(self.evaluated, self.held_out, self.settings, self.teacher, self.ranks)

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
        """Note a validation; its weights are kept if they are the best. The loss decides between equals.

        The given weights have an advantage: the dense model was trained on the held-out images, and the fit
        may have seen some. They win only by more than one standard error of their own accuracy.
        """
        self.history.append(row)
        bar = self.best.validation_top1
        if self.best.step == 0:
            bar -= math.sqrt(bar * (1 - bar) / self.validation.images)
            better = row.validation_top1 >= bar
        else:
            better = (row.validation_top1, -row.validation_loss) > (bar, -self.best.validation_loss)
        if better and math.isfinite(row.validation_loss):
            self.best = row
            self.best_state = copy.deepcopy(self.evaluated.state_dict())

    # state -------------------------------------------------------------------------------------

    def _identity(self, model: nn.Module, data: DataSplits) -> dict[str, Any]:
        """What must be the same for a state to belong to this run."""
        return {
            "settings": _json_values(dataclasses.asdict(self.settings)),
            "data": data.spec,
            "number_of_steps": self.steps,
            "steps_per_epoch": self.part.steps_per_epoch,
            "number_of_processes": self.ranks.world,
            "hash_of_the_weights_before": hash_of(model),
        }

    def _save_if_due(self) -> None:
        if self.checkpointing is None or not (
            self.step % self.checkpointing.interval == 0 or self.step == self.steps
        ):
            return
        states = [
            self.ranks.gather(state.to(self.device)) for state in torch_states(self.device, self.augmentation)
        ]
        sums = [self.ranks.gather(running.sums) for running in (self.since_row, self.since_line)]
        if not self.ranks.first:
            return
        tensors = {
            **with_prefix("model", self.model.state_dict()),
            **with_prefix("best", self.best_state),
            **with_prefix("optimizer", optimizer_tensors(self.optimizer)),
            **({} if self.average is None else with_prefix("average", self.average.model.state_dict())),
            **{f"random.{index}": state for index, state in enumerate(states)},
            **{f"sums.{index}": value for index, value in enumerate(sums)},
        }
        document = {
            "run": self.identity,
            "step": self.step,
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "checksum": self.checksum,
            "seconds": [self.since_row.seconds, self.since_line.seconds],
            "history": [dataclasses.asdict(row) for row in self.history],
            "best_step": self.best.step,
            "validation": dataclasses.asdict(self.validation),
            # Other ranks' are not at hand; their libraries are seeded anew.
            "libraries": library_states() if self.ranks.world == 1 else {},
        }
        write_state(self.checkpointing.file, tensors, document)

    def _restore(self, checkpointing: Checkpointing) -> None:
        tensors, document = read_state(checkpointing.file)
        check_same_run(checkpointing.file, document["run"], self.identity)
        self.model.load_state_dict(without_prefix("model", tensors))
        set_optimizer_tensors(self.optimizer, without_prefix("optimizer", tensors))
        if self.average is not None:
            self.average.model.load_state_dict(without_prefix("average", tensors))
        self.best_state = without_prefix("best", tensors)
        self.step, self.epoch = document["step"], document["epoch"]
        self.next_batch, self.checksum = document["next_batch"], document["checksum"]
        self.history = [FinetuneRow(**row) for row in document["history"]]
        self.best = next(row for row in self.history if row.step == document["best_step"])
        self.validation = Validation(**document["validation"])
        for index, running in enumerate((self.since_row, self.since_line)):
            running.sums.copy_(tensors[f"sums.{index}"][self.ranks.rank])
            running.seconds = document["seconds"][index]
        rank = self.ranks.rank
        states = without_prefix("random", tensors)
        self._states = (
            [states[str(index)][rank].cpu() for index in range(len(states))],
            document["libraries"],
        )


def _json_values(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _validation_points(steps: int, steps_per_epoch: int, settings: FinetuneSettings) -> set[int]:
    """Return the steps behind which to validate: evenly spread, the last one among them."""
    count = min(steps, math.ceil(steps * settings.validations_per_epoch / steps_per_epoch))
    return {(index + 1) * steps // count for index in range(count)}
