"""Balanced assignment: items to cells of fixed capacity, with the largest total value.

Our own, for speed: scipy's solver takes an assignment to places, each cell repeated to its capacity, and at
512 items and 4 cells it is 500 times slower. The clustering solves thousands of these.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

_PRICE_SWEEPS = 20

# With fewer items per cell than this, a general assignment solver is as fast.
_MIN_ITEMS_PER_CELL = 8


def balanced_assignment(
    value: NDArray[np.float64], capacities: NDArray[np.int64], start: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Assign items to cells of fixed capacity with the largest total value.

    Args:
        value: value of each item in each cell, shape (items, cells).
        capacities: places of each cell, shape (cells,), summing to the number of items.
        start: present cell of each item, shape (items,); kept where it is as good.

    Returns:
        Cell of each item, shape (items,).
    """
    items, cells = value.shape
    if cells == 1:
        return start.copy()
    # A hair's breadth for staying: ties would otherwise shuffle channels for nothing.
    value = value.copy()
    value[np.arange(items), start] += 1e-9 * (1 + np.abs(value).max())
    if items < _MIN_ITEMS_PER_CELL * cells:
        return _by_places(value, capacities)
    # Each item takes the cell that is worth the most to it at these prices: the best assignment
    # for the number of items that each cell then has.
    assigned = np.asarray(np.argmax(value - _prices(value, capacities), axis=1))
    _move_surplus(value, capacities, assigned)
    return assigned


def _by_places(value: NDArray[np.float64], capacities: NDArray[np.int64]) -> NDArray[np.int64]:
    """Solve as an assignment to places, each cell repeated to its capacity."""
    repeated = np.repeat(np.arange(len(capacities)), capacities)
    rows, places = linear_sum_assignment(value[:, repeated], maximize=True)
    assigned = np.empty(len(rows), dtype=np.int64)
    assigned[rows] = repeated[places]
    return assigned


def _prices(value: NDArray[np.float64], capacities: NDArray[np.int64]) -> NDArray[np.float64]:
    """Prices at which the demand for each cell is near its capacity, one cell after the other."""
    items, cells = value.shape
    prices = np.zeros(cells)
    for _ in range(_PRICE_SWEEPS):
        demand = np.bincount(np.argmax(value - prices, axis=1), minlength=cells)
        if np.array_equal(demand, capacities):
            break
        for cell in range(cells):
            net = value - prices
            net[:, cell] = -np.inf
            margins = value[:, cell] - net.max(axis=1)
            # Between the last item that gets in and the first that does not.
            border = items - int(capacities[cell])
            parts = np.partition(margins, (border - 1, border))
            prices[cell] = (parts[border - 1] + parts[border]) / 2
    return prices


def _move_surplus(
    value: NDArray[np.float64], capacities: NDArray[np.int64], assigned: NDArray[np.int64]
) -> None:
    """Move items from cells that are too full to others, in place, by successive shortest paths.

    A step moves one item along each edge of the cheapest path; with few cells the paths are short.
    """
    cells = len(capacities)
    surplus = np.bincount(assigned, minlength=cells) - capacities
    loss = np.full((cells, cells), np.inf)  # of moving the cheapest item from cell to cell
    mover = np.zeros((cells, cells), dtype=np.int64)
    tolerance = 1e-12 * (1 + float(np.abs(value).max()))

    def refresh(cell: int) -> None:
        members = np.flatnonzero(assigned == cell)
        if not len(members):
            loss[cell] = np.inf
            return
        differences = value[members, cell][:, None] - value[members]
        cheapest = differences.argmin(axis=0)
        loss[cell] = differences[cheapest, np.arange(cells)]
        mover[cell] = members[cheapest]
        loss[cell, cell] = np.inf

    for cell in range(cells):
        refresh(cell)
    while surplus.any():
        distance = np.where(surplus > 0, 0.0, np.inf)
        previous = np.full(cells, -1)
        for _ in range(cells):
            through = distance[:, None] + loss
            nearest = through.argmin(axis=0)
            better = through[nearest, np.arange(cells)] < distance - tolerance
            if not better.any():
                break
            distance[better] = through[nearest, np.arange(cells)][better]
            previous[better] = nearest[better]
        cell = int(np.where(surplus < 0, distance, np.inf).argmin())
        surplus[cell] += 1
        path = [cell]
        while previous[path[-1]] >= 0:
            path.append(int(previous[path[-1]]))
        for target, source in pairwise(path):
            assigned[mover[source, target]] = target
        surplus[path[-1]] -= 1
        for visited in path:
            refresh(visited)
