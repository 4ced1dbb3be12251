"""What a fine-tune tells on the way: JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupify.errors import ArtefactError, SpecError


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
