"""Which candidates are worth timing: those near the convex hull of what they lose over what they would cost.

A plan takes candidates from the hull, but for the one or two that fill a limit up. What a candidate takes on
the processor is only estimated before it is timed, so those that a little less cost would bring to the hull
are kept. In int8 there is no estimate: a MAC of a grouped conv costs far more than one of a dense or of a
depthwise conv, so each of these kinds has a hull of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from groupify.planning.sensitivity import Sensitivity
from groupify.planning.slow_kernels import relative_latency
from groupify.structures import INT8, Candidate, Choices

# How much cheaper a candidate may turn out than it is estimated to be. ResNet-18 at 224×224: 147 convs are
# timed instead of 282, and the best plans for 18 to 60% of the latency lose 0 to 1.8% more.
_SLACK = 0.03

Point = tuple[float, float]  # cost, loss


def worth_timing(choices: Choices, sensitivity: Sensitivity, block: int) -> Choices:
    """Return the choices without the candidates and uniform plans that no limit would make the best.

    Args:
        choices: what may become of each conv, and the precision.
        sensitivity: what each candidate loses.
        block: channels per block of the processor's kernel.
    """

    def predicted(candidate: Candidate) -> float:
        site = candidate.site
        return site.macs.dense * (relative_latency(site, block) if site.converted else 1.0)

    def macs(candidate: Candidate) -> float:
        return candidate.site.macs.grouped

    kind = _kind if choices.precision == INT8 else lambda _: ""
    kept = [_near_hull_of_any(options, sensitivity, (predicted, macs), kind) for options in choices.sites]
    uniform = list(choices.uniform.items())
    totals = [
        (sum(predicted(option) for option in taken), sum(sensitivity.loss(option) for option in taken))
        for taken in (_taken(choices, chosen) for _, chosen in uniform)
    ]
    dense = (sum(predicted(options[0]) for options in choices.sites), 0.0)
    best = [uniform[number] for number in sorted(near_hull([*totals, dense])) if number < len(uniform)]
    for _, chosen in best:
        for indices, index in zip(kept, chosen, strict=True):
            indices.add(index)
    places = [{index: place for place, index in enumerate(sorted(indices))} for indices in kept]
    return replace(
        choices,
        sites=tuple(
            tuple(options[index] for index in sorted(indices))
            for options, indices in zip(choices.sites, kept, strict=True)
        ),
        uniform={
            key: tuple(of[index] for of, index in zip(places, chosen, strict=True)) for key, chosen in best
        },
    )


def near_hull(points: Sequence[Point]) -> set[int]:
    """Return which points would be on the lower convex hull if they cost a little less.

    Args:
        points: cost and loss of each.
    """
    hull = _lower_hull(points)
    return {
        number
        for number, (cost, loss) in enumerate(points)
        if loss <= _height(hull, cost * (1 - _SLACK)) or (cost, loss) in hull
    }


def _near_hull_of_any(
    options: Sequence[Candidate],
    sensitivity: Sensitivity,
    costs: Sequence[Callable[[Candidate], float]],
    kind: Callable[[Candidate], str],
) -> set[int]:
    """Indices of what is near the hull of its kind over one of the costs, and of the conv as it is."""
    kinds: dict[str, list[int]] = {}
    for index, option in enumerate(options):
        kinds.setdefault(kind(option), []).append(index)
    found = {0}
    for alike, cost in itertools.product(kinds.values(), costs):
        points = [(cost(options[index]), sensitivity.loss(options[index])) for index in alike]
        found |= {alike[number] for number in near_hull(points)}
    return found


def _kind(candidate: Candidate) -> str:
    """Which kernel of int8 runs the core: one for dense convs, one for depthwise ones, or the general one."""
    site = candidate.site
    if site.groups == site.groups_before:
        return "dense"
    return "depthwise" if site.core_channels == (site.groups, site.groups) else "grouped"


def _lower_hull(points: Sequence[Point]) -> list[Point]:
    """The falling part of the lower hull (Andrew's monotone chain), the cheapest first."""
    hull: list[Point] = []
    for cost, loss in sorted(set(points)):
        if hull and loss >= hull[-1][1]:
            continue
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], (cost, loss)):
            hull.pop()
        hull.append((cost, loss))
    return hull


def _turns_up(first: Point, middle: Point, last: Point) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    rise = (last[1] - first[1]) * (middle[0] - first[0])
    return (middle[1] - first[1]) * (last[0] - first[0]) >= rise


def _height(hull: Sequence[Point], cost: float) -> float:
    """The hull's loss at a cost; none is too much for what is cheaper than all of it."""
    if cost < hull[0][0]:
        return float("inf")
    for (low, high_loss), (high, low_loss) in itertools.pairwise(hull):
        if cost <= high:
            return high_loss + (low_loss - high_loss) * (cost - low) / (high - low)
    return hull[-1][1]


def _taken(choices: Choices, chosen: Sequence[int]) -> list[Candidate]:
    return [options[index] for options, index in zip(choices.sites, chosen, strict=True)]
