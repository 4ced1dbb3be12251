"""What a run is doing and about how long that takes: numbered lines on stderr, ``[3/6] timing 14 convs``."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm


class Stages:
    """Numbers the stages of one run; a bar of the stage's own may follow each line on a terminal.

    Args:
        count: how many there will be.
        show: False = say nothing.
    """

    def __init__(self, count: int = 0, *, show: bool = False) -> None:
        self._count, self._number = count, 0
        self.show = show

    def begin(self, what: str, seconds: Callable[[], float] | None = None) -> None:
        """Say what begins.

        Args:
            what: for example ``"timing 14 convs"``.
            seconds: estimates how long it takes, where that is shown; None = not known.
        """
        self._number += 1
        if not self.show:
            return
        estimate = "" if seconds is None else f", {about(seconds())}"
        line = f"[{self._number}/{max(self._count, self._number)}] {what}{estimate}"
        tqdm.write(line, file=sys.stderr)  # above a bar that is being shown


SILENT = Stages()


def about(seconds: float) -> str:
    """Return a rough duration.

    >>> about(0.2), about(43.1), about(150), about(4000)
    ('about 1 s', 'about 40 s', 'about 3 min', 'about 1.1 h')
    """
    if seconds < 10:
        return f"about {max(1, round(seconds))} s"
    if seconds < 90:
        return f"about {10 * round(seconds / 10)} s"
    if seconds < 3600:
        return f"about {int(seconds / 60 + 0.5)} min"
    return f"about {seconds / 3600:.1f} h"
