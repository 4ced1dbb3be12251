"""The errors of a conv's structures before any conversion: few fits, and a smooth curve through them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from groupify.decomposition.decompose import Decomposer
from groupify.decomposition.families import Cost, Family, families
from groupify.structures import Structure

# From MACs ÷1.5 to ÷20, each a third larger than the next.
RATIOS = tuple(1.5 * (20 / 1.5) ** (step / 9) for step in range(10))
EVALUATIONS = 8
_FITS = 3
_LEAST = 1e-9


@dataclass(frozen=True)
class Rung:
    """One structure that a conv may get.

    Attributes:
        structure: the structure.
        macs: multiply-accumulates for one image.
        error: relative error of its outputs that a fit to the end is expected to leave.
    """

    structure: Structure
    macs: int
    error: float


def ladder(
    decomposer: Decomposer,
    family: Family,
    cost: Cost,
    ratios: Sequence[float] = RATIOS,
    evaluations: int = EVALUATIONS,
) -> tuple[Rung, ...]:
    """Return the members of a family near some MAC ratios, with their errors, the largest member first.

    Three of them are fitted a little and their convergence extrapolated; the others lie on a parabola
    through them in logarithms of MACs and error. The largest, which take longest, are not among the three.
    Of 100 members for four convs of a ResNet-18 the error is off by 7% (median; 20% for one in ten), against
    fits of 40 evaluations.

    Args:
        decomposer: the conv's moments.
        family: the structures to choose from.
        cost: what MACs are counted for.
        ratios: MACs of the conv ÷ MACs of the member.
        evaluations: how many a fit may use.
    """
    members = family.members(cost, ratios)
    if family.low_rank(cost.conv):
        errors = [decomposer.estimate(member, 1) for member in members]
    else:
        sizes = [math.log(cost.macs(member)) for member in members]
        fitted = {
            sizes[at]: math.log(max(decomposer.estimate(members[at], evaluations), _LEAST))
            for at in _spread(len(members))
        }
        errors = [min(1.0, math.exp(_through(fitted, size))) for size in sizes]
    return tuple(
        Rung(member, cost.macs(member), error) for member, error in zip(members, errors, strict=True)
    )


def ladders(
    decomposer: Decomposer, cost: Cost, block: int, narrowest: int = 1, ratios: Sequence[float] = RATIOS
) -> dict[Family, tuple[Rung, ...]]:
    """Return the ladder of every family worth a look; see :func:`families` and :func:`ladder`."""
    return {family: ladder(decomposer, family, cost, ratios) for family in families(cost, block, narrowest)}


def _spread(count: int) -> list[int]:
    """Which of so many members to fit, from large to small."""
    if count <= _FITS:
        return list(range(count))
    first = max(1, count // 5)
    return [round(first + step * (count - 1 - first) / (_FITS - 1)) for step in range(_FITS)]


def _through(points: Mapping[float, float], at: float) -> float:
    """The polynomial through some points (Lagrange)."""
    total = 0.0
    for place, value in points.items():
        total += value * math.prod((at - other) / (place - other) for other in points if other != place)
    return total
