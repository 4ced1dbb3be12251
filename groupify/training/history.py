"""What a fine-tune tells on the way: validations on held-out images, the weights that are best by them, logs.

The logs are JSON lines, and TensorBoard where it is installed.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from groupify.documents import Measured
from groupify.errors import ArtefactError, SpecError
from groupify.training.settings import FinetuneSettings
from groupify.training.validation import Gain


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
            ``labels=False``, is the teacher's. None without classes.
        validation_loss: cross-entropy on the held-out images, against the same; or the user's loss; or the
            relative error of the outputs against the teacher's.
        gain: how much less that is than at step 0; None at step 0.
    """

    step: int
    epoch: float
    loss: Measured | None
    learning_rate: float | None
    images_per_second: float | None
    validation_top1: float | None
    validation_loss: Measured
    gain: Gain | None = None


class History:
    """The rows of all validations so far, and the weights of the best one.

    Args:
        rows: at least that of the given weights.
        best_step: which of the rows is the best.
        best_state: its weights.
    """

    def __init__(self, rows: Sequence[FinetuneRow], best_step: int, best_state: dict[str, Tensor]) -> None:
        self.rows = list(rows)
        self.best = next(row for row in rows if row.step == best_step)
        self.best_state = best_state

    def add(self, row: FinetuneRow, model: nn.Module) -> None:
        """Note a validation; ``model``'s weights are kept if they are the best.

        The least loss decides, since the accuracy is too coarse; the given weights, which come first, if it
        is the same. No more is asked of the trained ones: what error the comparison has goes both ways, and
        images that the dense model has seen favour the given weights, which are the nearer to it.
        """
        self.rows.append(row)
        if row.validation_loss < self.best.validation_loss:  # never with NaN
            self.best = row
            self.best_state = copy.deepcopy(model.state_dict())


def validation_points(steps: int, steps_per_epoch: int, settings: FinetuneSettings) -> set[int]:
    """Return the steps behind which to validate: evenly spread, the last one among them."""
    count = min(steps, math.ceil(steps * settings.validations_per_epoch / steps_per_epoch))
    return {(index + 1) * steps // count for index in range(count)}


@dataclass(frozen=True)
class LogSettings:
    """Where to log.

    Attributes:
        file: JSON lines: every ``interval`` steps ``step``, ``epoch``, ``loss``, ``accuracy`` (of the
            training images, a fraction), ``learning_rate`` and ``images_per_second``, and for each
            validation ``step``, ``epoch``, ``validation_top1`` and ``validation_loss``; None = no file.
        tensorboard: folder for TensorBoard, which is then to be installed; None = none.
        interval: steps.

    Raises:
        SpecError: an interval below 1, or TensorBoard is asked for and not installed.
    """

    file: Path | None = None
    tensorboard: Path | None = None
    interval: int = 50

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise SpecError(f"the log interval is {self.interval}; expected a number of steps from 1")
        if self.tensorboard is not None:
            _summary_writer()  # not at the first step only, after an evaluation of all test images


class TrainingLog:
    """An open log.

    Args:
        settings: None = nothing is logged.
        first_step: a resumed run's step; what was logged behind it is taken back. 0 = a new log.

    Raises:
        ArtefactError: the file cannot be written.
    """

    def __init__(self, settings: LogSettings | None, first_step: int = 0) -> None:
        self.settings = settings or LogSettings()
        self._file: Any = None
        self._board: Any = None
        if self.settings.file is not None:
            self._file = _open_lines(self.settings.file, first_step)
        if self.settings.tensorboard is not None:
            self._board = _open_board(self.settings.tensorboard, first_step)

    def write(self, step: int, epoch: float, values: dict[str, float | None]) -> None:
        """Log some values of one step."""
        if self._file is not None:
            line = json.dumps({"step": step, "epoch": round(epoch, 6), **_finite(values)}, allow_nan=False)
            self._file.write(line + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        for part in (self._file, self._board):
            if part is not None:
                part.close()


def _finite(values: dict[str, float | None]) -> dict[str, float | None]:
    """JSON has no NaN and no infinity."""
    return {
        name: value if value is not None and abs(value) < float("inf") else None
        for name, value in values.items()
    }


def _open_lines(path: Path, first_step: int) -> Any:
    try:
        kept = []
        if first_step and path.exists():
            for line in path.read_text("utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= first_step:
                        kept.append(line)
                except (ValueError, TypeError, KeyError):
                    continue  # the line that the run was killed in
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text("".join(line + "\n" for line in kept), "utf-8")
        os.replace(aside, path)
        return path.open("a", encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"cannot write the log {path}: {error}; choose another file") from error


def _open_board(folder: Path, first_step: int) -> Any:
    return _summary_writer()(str(folder), purge_step=first_step + 1 if first_step else None)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SpecError(
            "TensorBoard is not installed: pip install tensorboard, or log to a file alone"
        ) from error
    return SummaryWriter
