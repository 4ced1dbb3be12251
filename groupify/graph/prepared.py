"""Calls that are made ready when they are read: images go to a device batch by batch, not all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from groupify.graph.call import Call


class PreparedCalls(Sequence[Call]):
    """A sequence of calls, each prepared anew whenever it is read.

    Args:
        calls: as they are kept.
        prepare: what is done to one that is read; it keeps the number of examples.
    """

    def __init__(self, calls: Sequence[Call], prepare: Callable[[Call], Call]) -> None:
        self._calls = calls
        self._prepare = prepare

    @property
    def sizes(self) -> list[int]:
        """Number of examples in each."""
        return batch_sizes(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> PreparedCalls: ...
    def __getitem__(self, index: int | slice) -> Call | PreparedCalls:
        if isinstance(index, slice):
            return PreparedCalls(self._calls[index], self._prepare)
        return self._prepare(self._calls[index])


def batch_sizes(calls: Sequence[Call]) -> list[int]:
    """Return the number of examples in each of some calls, without preparing any."""
    return calls.sizes if isinstance(calls, PreparedCalls) else [call.batch_size for call in calls]
