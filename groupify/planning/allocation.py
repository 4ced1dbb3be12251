"""The multiple-choice knapsack: one candidate for each conv, the least loss, all limits held.

Solved exactly by the branch-and-bound of HiGHS (``scipy.optimize.milp``), which takes several limits at once
where dynamic programming over a bucketed budget takes one and rounds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

_Array = NDArray[np.float64]
# HiGHS lets a limit be broken by 1e-6 of itself. So many choices that do so are ruled out one by one; then
# the limits are taken a little tighter.
_EXCLUSIONS = 20
_TIGHTER = 1.0 - 2e-6


@dataclass(frozen=True)
class Option:
    """One candidate of one conv: what it loses, and what it uses of each limited quantity."""

    loss: float
    uses: Mapping[str, float]


@dataclass(frozen=True)
class Allocation:
    """The chosen candidates.

    Attributes:
        chosen: index of the candidate of each conv.
        loss: the sum of their losses.
        uses: the sum of what they use.
    """

    chosen: tuple[int, ...]
    loss: float
    uses: Mapping[str, float]


def total(convs: Sequence[Sequence[Option]], chosen: Sequence[int], quantities: Sequence[str]) -> Allocation:
    """Add up what given candidates lose and use."""
    options = [options[index] for options, index in zip(convs, chosen, strict=True)]
    uses = {quantity: sum(option.uses[quantity] for option in options) for quantity in quantities}
    return Allocation(tuple(chosen), sum(option.loss for option in options), uses)


def allocate(convs: Sequence[Sequence[Option]], limits: Mapping[str, float]) -> Allocation | None:
    """Choose one candidate of each conv so that the losses add up to the least within all limits.

    Args:
        convs: the candidates of each conv, at least one.
        limits: the most that all together may use of each quantity; every option names them.

    Returns:
        The best allocation; None where no allocation holds all limits.
    """
    problem = _Problem(convs, limits)
    excluded: list[list[int]] = []
    for attempt in range(_EXCLUSIONS + 1):
        chosen = problem.solve(1.0 if attempt < _EXCLUSIONS else _TIGHTER, excluded)
        if chosen is None:
            return None
        found = total(convs, chosen, tuple(limits))
        if all(found.uses[quantity] <= limit for quantity, limit in limits.items()):
            return found
        excluded.append(chosen)
    return None


def nearest(convs: Sequence[Sequence[Option]], limits: Mapping[str, float]) -> Allocation:
    """Choose the candidates that come nearest to limits that cannot all be held.

    The largest excess over any limit, relative to that limit, is made as small as can be.
    """
    return total(convs, _Problem(convs, limits).least_excess(), tuple(limits))


def least(convs: Sequence[Sequence[Option]], quantity: str) -> float:
    """Return the least that the convs can use of one quantity."""
    return sum(min(option.uses[quantity] for option in options) for options in convs)


class _Problem:
    """The 0/1 program: one variable for each option, one equation for each conv, one row for each limit."""

    def __init__(self, convs: Sequence[Sequence[Option]], limits: Mapping[str, float]) -> None:
        self._sizes = [len(options) for options in convs]
        every = [option for options in convs for option in options]
        conv_of = np.repeat(np.arange(len(convs)), self._sizes)
        count = len(every)
        losses = np.array([option.loss for option in every])
        # In parts of the largest loss: the solver's tolerances are absolute.
        self._losses = 1e4 * losses / max(float(losses.max(initial=0.0)), 1e-300)
        self._one_each = csr_array((np.ones(count), (conv_of, np.arange(count))), shape=(len(convs), count))
        self._rows: _Array = np.array(
            [[option.uses[quantity] / limit for option in every] for quantity, limit in limits.items()]
        ).reshape(len(limits), count)

    def solve(self, scale: float, excluded: Sequence[Sequence[int]]) -> list[int] | None:
        """The best choice that stays within ``scale`` times the limits and is none of the excluded ones."""
        count = len(self._losses)
        constraints = [LinearConstraint(self._one_each, 1, 1)]
        if len(self._rows):
            constraints.append(LinearConstraint(self._rows, -np.inf, scale))
        starts = np.cumsum([0, *self._sizes[:-1]])
        for choice in excluded:
            row = np.zeros(count)
            row[starts + np.array(choice)] = 1
            constraints.append(LinearConstraint(row, -np.inf, len(choice) - 1))
        result = milp(
            self._losses,
            integrality=np.ones(count, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        return None if result.x is None else self._indices(result.x)

    def least_excess(self) -> list[int]:
        """The choice with the smallest largest excess; one more variable, the excess, is minimised."""
        count = len(self._losses)
        one_each = csr_array(np.hstack([self._one_each.toarray(), np.zeros((len(self._sizes), 1))]))
        rows = np.hstack([self._rows, -np.ones((len(self._rows), 1))])
        result = milp(
            np.append(np.zeros(count), 1.0),
            integrality=np.append(np.ones(count, dtype=np.int64), 0),
            bounds=Bounds(0, np.append(np.ones(count), np.inf)),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(rows, -np.inf, 0)],
        )
        assert result.x is not None, result.message  # any excess is allowed, so there is a solution
        return self._indices(result.x[:count])

    def _indices(self, values: _Array) -> list[int]:
        edges = np.cumsum([0, *self._sizes])
        return [int(np.argmax(values[start:end])) for start, end in itertools.pairwise(edges)]
