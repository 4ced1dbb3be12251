"""Sequences of calls that are made ready when they are read: moved to a device, or fetched from a shelf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import Tensor
from torch.utils import _pytree as pytree

from groupify.graph.call import Call
from groupify.kept import Kept, Shelf


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


class KeptCalls(Sequence[Call]):
    """Calls whose tensors wait on a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._calls: list[tuple[Any, Any]] = []
        self.sizes: list[int] = []

    def append(self, call: Call) -> None:
        """Keep one more."""
        arguments = (tuple(call.args), dict(call.kwargs))
        self._calls.append(pytree.tree_map_only(Tensor, self._shelf.keep, arguments))
        self.sizes.append(call.batch_size)

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> list[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | list[Call]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return Call(*pytree.tree_map_only(Kept, Kept.tensor, self._calls[index]))


def batch_sizes(calls: Sequence[Call]) -> list[int]:
    """Return the number of examples in each of some calls, without making any ready."""
    if isinstance(calls, PreparedCalls | KeptCalls):
        return calls.sizes
    return [call.batch_size for call in calls]
