from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from groupify.stats.moments import GroupedMoments

GROUPS, WIDTH, ROWS, COUNT = 2, 6, 4, 300


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(COUNT, GROUPS, WIDTH, generator=generator) + 2
    weight = torch.randn(GROUPS, ROWS, WIDTH, generator=generator)
    noise = torch.randn(COUNT, GROUPS, ROWS, generator=generator)
    return inputs, torch.einsum("god,ngd->ngo", weight, inputs) + noise - 3


def streamed(inputs: Tensor, outputs: Tensor, batches: list[int], centred: bool) -> GroupedMoments:
    moments = GroupedMoments(centred=centred)
    for x, y in zip(inputs.split(batches), outputs.split(batches), strict=True):
        moments.update(x, y)
    return moments


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("with_prior", [False, True])
def test_streamed_fit_equals_ridge_regression_in_one_go(
    centred: bool, ridge: float, with_prior: bool
) -> None:
    inputs, outputs = data()
    prior = torch.ones(GROUPS, ROWS, WIDTH) if with_prior else None
    fit = streamed(inputs, outputs, [100, 150, 50], centred).fit(ridge=ridge, prior=prior)
    for group in range(GROUPS):
        x, y = inputs[:, group].double().numpy(), outputs[:, group].double().numpy()
        x_mean, y_mean = (x.mean(0), y.mean(0)) if centred else (np.zeros(WIDTH), np.zeros(ROWS))
        x, y = x - x_mean, y - y_mean
        # Ridge regression is least squares with rows √λ·I that draw to the prior.
        strength = np.sqrt(ridge * (x**2).mean() * COUNT)
        towards = np.zeros((ROWS, WIDTH)) if prior is None else prior[group].double().numpy()
        rows = np.vstack([x, strength * np.eye(WIDTH)])
        targets = np.vstack([y, strength * towards.T])
        weight = np.linalg.lstsq(rows, targets, rcond=None)[0].T
        np.testing.assert_allclose(fit.weight[group].numpy(), weight, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(fit.bias[group].numpy(), y_mean - weight @ x_mean, rtol=1e-4, atol=1e-4)
        error = ((y - x @ weight.T) ** 2).mean(0) / (y**2).mean(0)
        np.testing.assert_allclose(fit.error[group].numpy(), error, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("width", [127, 128, 129, 300, 700])
def test_moments_of_wide_inputs(width: int) -> None:
    inputs = torch.randn(50, 2, width, generator=torch.Generator().manual_seed(0))
    moments = GroupedMoments(centred=False)
    for batch in inputs.split(20):
        moments.update(batch, batch[:, :, :3])
    wanted = torch.einsum("ngi,ngj->gij", inputs.double(), inputs.double()) / 50
    torch.testing.assert_close(moments.input_covariance(), wanted, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_batches_does_not_matter() -> None:
    inputs, outputs = data()
    forward = streamed(inputs, outputs, [100, 200], True).fit(ridge=0.01)
    backward = streamed(inputs.flip(0), outputs.flip(0), [50, 50, 200], True).fit(ridge=0.01)
    torch.testing.assert_close(forward.weight, backward.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(forward.bias, backward.bias, rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero_costs_no_precision() -> None:
    inputs, outputs = data()
    near = streamed(inputs, outputs, [100, 200], True).fit(ridge=0.01)
    far = streamed(inputs + 1000, outputs - 500, [100, 200], True).fit(ridge=0.01)
    torch.testing.assert_close(near.weight, far.weight, rtol=1e-2, atol=1e-3)


def test_other_outputs_for_the_same_inputs() -> None:
    inputs, outputs = data()
    _, others = data(seed=1)
    moments = streamed(inputs, outputs, [100, 200], True)
    moments.fit(ridge=0.01)
    moments.replace_outputs(zip(inputs.split(100), others.split(100), strict=True))
    expected = streamed(inputs, others, [300], True).fit(ridge=0.01)
    actual = moments.fit(ridge=0.01)
    torch.testing.assert_close(actual.weight, expected.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.bias, expected.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_few_samples_and_dead_inputs_never_crash(ridge: float) -> None:
    inputs, outputs = data()
    inputs, outputs = inputs[:3].clone(), outputs[:3]
    inputs[:, 0] = 0
    inputs[:, 1, 1] = inputs[:, 1, 0]
    fit = streamed(inputs, outputs, [3], True).fit(ridge=ridge)
    assert bool(torch.isfinite(fit.weight).all())
    assert float(fit.weight[0].abs().max()) == 0.0
    one = streamed(inputs[:1], outputs[:1], [1], True).fit(ridge=ridge)
    torch.testing.assert_close(one.bias.float(), outputs[0])
