"""Gradients are those of the error, and the iteration only goes down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from groupify.decomposition.minimise import Evaluation, minimise
from groupify.decomposition.objectives import Mixing, Separate
from groupify.decomposition.whitening import ByChannel, ByGroup
from groupify.structures import ConvShape
from tests.decomposition.problems import problem, random


def objectives() -> list[Mixing | Separate]:
    moments, _ = problem(ConvShape(6, 8, (3,)))
    cross = moments.cross[0] / moments.energy.sum().sqrt()
    mixed, own = ByChannel.of(moments.covariance[0], 6), ByGroup.of(moments.covariance[0], 3)
    return [Mixing(mixed, mixed.inputs(cross), 2, 3, 2), Separate(own, own.inputs(cross))]


@pytest.mark.parametrize("objective", objectives(), ids=lambda objective: type(objective).__name__)
def test_gradient(objective: Mixing | Separate) -> None:
    count = 2 * 3 * 6 + 2 * 2 * 3 * 3 if isinstance(objective, Mixing) else 3 * 2 * 6
    point, step = random(count, seed=0), random(count, seed=1)
    slope = float(objective.evaluate(point).gradient @ step)
    high, low = (objective.evaluate(point + sign * 1e-6 * step).value for sign in (1, -1))
    assert slope == pytest.approx((high - low) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("objective", objectives(), ids=lambda objective: type(objective).__name__)
def test_preconditioner_is_symmetric_and_positive(objective: Mixing | Separate) -> None:
    count = 2 * 3 * 6 + 2 * 2 * 3 * 3 if isinstance(objective, Mixing) else 3 * 2 * 6
    apply = objective.evaluate(random(count, seed=0)).precondition
    one, two = random(count, seed=1), random(count, seed=2)
    assert float(one @ apply(two)) == pytest.approx(float(two @ apply(one)))
    assert float(one @ apply(one)) > 0


def test_whitened_inputs_are_nearly_white() -> None:
    moments, _ = problem(ConvShape(6, 8, (3,)))
    values = torch.linalg.eigvalsh(ByChannel.of(moments.covariance[0], 6).covariance)
    assert float(values.mean()) == pytest.approx(1, abs=1e-3)
    own = ByGroup.of(moments.covariance[0], 3).covariance
    blocks = torch.stack([own[group, :, group * 6 : group * 6 + 6] for group in range(3)])
    torch.testing.assert_close(blocks, torch.eye(6, dtype=torch.float64).expand(3, 6, 6), rtol=0, atol=1e-4)


def rosenbrock(point: Tensor) -> Evaluation:
    point = point.detach().requires_grad_()
    value = (100 * (point[1] - point[0] ** 2) ** 2 + (1 - point[0]) ** 2).sum()
    (gradient,) = torch.autograd.grad(value, point)
    return Evaluation(point.detach(), value.item(), gradient, lambda vector: 0.01 * vector)


def test_minimise_a_curved_valley() -> None:
    best, values = minimise(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64), 120, tolerance=0)
    assert best.value < 1e-8
    assert len(values) <= 120
    few, values = minimise(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64), 3)
    assert len(values) == 3
    assert few.value <= values[0]


def test_minimise_stops_where_nothing_is_gained() -> None:
    def flat(point: Tensor) -> Evaluation:
        return Evaluation(point, 1.0, torch.zeros_like(point), lambda vector: vector)

    assert minimise(flat, torch.ones(3), 50)[1] == [1.0]
