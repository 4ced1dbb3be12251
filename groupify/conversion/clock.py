"""Where the time of a conversion goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up durations by name.

    Attributes:
        seconds: duration of each step; parts are named ``"step: part"`` and are in its duration too.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a step."""
        now = time.perf_counter()
        self._add(name, now - self._last)
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a part of a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - start)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
