"""Fewer images than a wide layer has inputs: it must not learn them by heart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.conversion import held_out
from groupify.conversion.conversion import Conversion
from groupify.conversion.held_out import HeldOutImages, best_ridge
from groupify.conversion.relaxed_fit import GroupedSamples, RelaxedFit
from groupify.conversion.site_fit import FitOptions
from groupify.stats.moments import GroupedMoments
from groupify.stats.positions import Positions
from tests.cases.nets import lively, noise, planned, relative_error

WIDE = (3, 2, 2)  # four positions an image, and 288 inputs a group


def wide_net() -> nn.Sequential:
    return lively(
        nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1))
    )


def convert(net: nn.Module, images: Tensor, **fit: float) -> Conversion:
    plan = planned(net, tuple(images.shape[1:]))
    return groupify.convert(net, plan, groupify.Calibration(images, fit=FitOptions(**fit)))  # type: ignore[arg-type]


class ByValue(nn.Module):
    """Cannot be traced whole, so that it is converted by its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = wide_net()
        self.last = nn.Conv2d(128, 128, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.body(x)))
        return y if bool(y.abs().sum() > 0) else -y


@pytest.mark.filterwarnings("ignore::groupify.errors.GroupifyWarning")  # fewer samples than inputs
@pytest.mark.parametrize("kind", [wide_net, ByValue])
def test_a_wide_layer_and_32_images(kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    net = lively(kind())
    images, fresh = noise(32, WIDE), noise(128, WIDE, seed=9)
    result = convert(net, images)
    check = result.fits[0].held_out
    assert check is not None
    assert check.overfitted
    assert check.held_out > 10 * check.in_sample
    assert check.ridge > FitOptions().ridge
    assert check.gain < 1
    assert any("too few calibration images" in note for note in result.notes)
    monkeypatch.setattr(held_out, "_LADDER", ())
    without = convert(net, images)
    errors = [relative_error(found.model, net, fresh) for found in (result, without)]
    assert errors[0] < 0.97 * errors[1]


def test_with_enough_images_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = lively(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    )
    images = noise(64, (3, 12, 12))
    result = convert(net, images)
    check = result.fits[0].held_out
    assert check is not None
    assert not check.overfitted
    assert (check.ridge, check.gain) == (FitOptions().ridge, 1)
    assert check.held_out < 2 * check.in_sample
    assert not any("too few" in note for note in result.notes)
    monkeypatch.setattr(HeldOutImages, "rows", lambda self, positions, batch: positions.image < 0)
    without = convert(net, images)
    assert without.fits[0].held_out is None
    torch.testing.assert_close(result.model(images), without.model(images), rtol=1e-3, atol=1e-3)


def test_every_eighth_of_16_images_or_more_is_held_out() -> None:
    positions = Positions(torch.arange(10).repeat_interleave(2), ())
    assert not HeldOutImages([10, 5]).rows(positions, 0).any()
    images = HeldOutImages([10, 10])
    assert positions.image[images.rows(positions, 0)].tolist() == [7, 7]
    assert positions.image[images.rows(positions, 1)].tolist() == [5, 5]


@pytest.mark.parametrize("relu", [False, True])
def test_the_ridge_is_chosen_by_the_error_behind_the_relu(relu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 1, 40, generator=generator)
    outputs = inputs[:, :, :2] + torch.randn(60, 1, 2, generator=generator)
    thresholds = torch.zeros_like(outputs) if relu else None
    seen = GroupedSamples(inputs[:48], outputs[:48], None if thresholds is None else thresholds[:48])
    others = GroupedSamples(inputs[48:], outputs[48:], None if thresholds is None else thresholds[48:])
    fitting = RelaxedFit(GroupedMoments(), None, 3 if relu else 0)
    fitting.add([seen])
    check = best_ridge(fitting, others, 0.01)
    assert check.overfitted
    errors = [others.squared_error(fitting.fit(ridge), relaxed=True) for ridge in (0.01, check.ridge)]
    assert check.gain == pytest.approx(errors[1] / errors[0], rel=1e-3)
    assert check.gain < 1


def test_what_is_exact_is_no_overfitting() -> None:
    inputs = torch.randn(200, 1, 4, generator=torch.Generator().manual_seed(0))
    outputs = inputs @ torch.tensor([[1.0], [2.0], [0.5], [0.0]])
    fitting = RelaxedFit(GroupedMoments(), None, 0)
    fitting.add([GroupedSamples(inputs[:150], outputs[:150])])
    check = best_ridge(fitting, GroupedSamples(inputs[150:], outputs[150:]), 1e-12)
    assert not check.overfitted
    assert check.ridge == 1e-12
