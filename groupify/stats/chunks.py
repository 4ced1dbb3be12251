"""Work in parts that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def chunks(items: Iterable[Item], size_of: Callable[[Item], float], limit: float) -> Iterator[list[Item]]:
    """Cut a sequence into parts whose sizes add up to at most a limit; what is larger alone is a part alone.

    Args:
        items: what to cut, in its order.
        size_of: the size of one item.
        limit: the most that a part may have.
    """
    chunk: list[Item] = []
    used = 0.0
    for item in items:
        size = size_of(item)
        if chunk and used + size > limit:
            yield chunk
            chunk, used = [], 0.0
        chunk.append(item)
        used += size
    if chunk:
        yield chunk
