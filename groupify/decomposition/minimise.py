"""L-BFGS with a preconditioner: few evaluations, no randomness, never worse than the start."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MEMORY = 8
_SUFFICIENT = 1e-4
_SMALLEST_STEP = 1e-4
# Progress is judged over so many steps: a single one may be short.
_PATIENCE = 5
# What is less is rounding, on which further steps lose their way.
_EPSILONS = 8


@dataclass(frozen=True)
class Evaluation:
    """A function at one point.

    Attributes:
        point: shape (n,).
        value: of the function.
        gradient: shape (n,).
        precondition: multiplies a vector by roughly the inverse Hessian, symmetric and positive.
    """

    point: Tensor
    value: float
    gradient: Tensor
    precondition: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Pair:
    step: Tensor
    change: Tensor
    curvature: float


def minimise(
    function: Callable[[Tensor], Evaluation], start: Tensor, evaluations: int, tolerance: float = 1e-3
) -> tuple[Evaluation, list[float]]:
    """Minimise a smooth sum of squares by L-BFGS (Nocedal 1980) and a preconditioner that changes on the way.

    Args:
        function: what to minimise; a part of 1, of which rounding leaves no less than some epsilons.
        start: the first point.
        evaluations: how many at most.
        tolerance: stop when five steps together improve the value by less than this part of it.

    Returns:
        The last point, which is the best, and the values on the way, one for each evaluation.
    """
    at = function(start)
    values = [at.value]
    noise = _EPSILONS * torch.finfo(start.dtype).eps
    pairs: deque[_Pair] = deque(maxlen=_MEMORY)
    while len(values) < evaluations and at.value > noise and not _settled(values, tolerance):
        found, used = _search(function, at, _direction(at, pairs), evaluations - len(values))
        values += [at.value if found is None else found.value] * used
        if found is None:
            if not pairs:
                break
            pairs.clear()  # from steepest descent again
            continue
        step, change = found.point - at.point, found.gradient - at.gradient
        curvature = float(step @ change)
        if curvature > 1e-10 * float(step.norm() * change.norm()):
            pairs.append(_Pair(step, change, curvature))
        at = found
    return at, values


def _settled(values: list[float], tolerance: float) -> bool:
    if len(values) <= _PATIENCE:
        return False
    return values[-1 - _PATIENCE] - values[-1] <= tolerance * values[-1]


def _direction(at: Evaluation, pairs: deque[_Pair]) -> Tensor:
    """The two-loop recursion; in its middle the preconditioner, scaled to the last step's curvature."""
    vector, weights = at.gradient.clone(), []
    for pair in reversed(pairs):
        weights.append(float(pair.step @ vector) / pair.curvature)
        vector -= weights[-1] * pair.change
    vector = at.precondition(vector)
    if pairs:
        last = pairs[-1]
        vector *= last.curvature / float(last.change @ at.precondition(last.change))
    for pair, weight in zip(pairs, reversed(weights), strict=True):
        vector += (weight - float(pair.change @ vector) / pair.curvature) * pair.step
    return -vector


def _search(
    function: Callable[[Tensor], Evaluation], at: Evaluation, direction: Tensor, most: int
) -> tuple[Evaluation | None, int]:
    """Backtrack along a direction until the value falls enough; also how many evaluations that took."""
    slope = float(at.gradient @ direction)
    if not slope < 0:
        return None, 0
    length = 1.0
    for used in range(1, most + 1):
        found = function(at.point + length * direction)
        if found.value <= at.value + _SUFFICIENT * length * slope:
            return found, used
        excess = found.value - at.value - length * slope
        parabola = -slope * length**2 / (2 * excess) if excess > 0 else 0.5 * length
        length = min(max(parabola, 0.1 * length), 0.5 * length)
        if length < _SMALLEST_STEP:
            break
    return None, used
