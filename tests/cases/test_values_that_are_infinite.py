"""Infinity on purpose (masks, the bounds of observers) is no unsound weight; a diverged one is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupify.errors import CheckpointError
from groupify.models.weights import load_state
from tests.cases.nets import assert_exact, converted, grouped_already, noise, refusal

SHAPE = (3, 8, 8)
PIXELS = 64
CAUSAL = torch.full((PIXELS, PIXELS), float("-inf")).triu(1)
INFINITE, NAN = float("inf"), float("nan")


class Attending(nn.Module):
    """Convs, attention over the pixels with a mask, and a norm whose statistics may be unsound."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.c1 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.register_buffer("mask", torch.zeros(PIXELS, PIXELS))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.c1(torch.relu(self.stem(x))))).flatten(2).transpose(1, 2)
        weights = (x @ x.transpose(1, 2) / 16 + self.mask).softmax(-1)
        result: Tensor = self.head((weights @ x).mean(1))
        return result


def masked(net: Any) -> None:
    net.mask.copy_(CAUSAL)


def masked_by_a_frozen_parameter(net: Any) -> None:
    del net.mask
    net.mask = nn.Parameter(CAUSAL.clone(), requires_grad=False)


def observed(net: Any) -> None:
    net.register_buffer("low", torch.tensor(INFINITE))
    net.register_buffer("high", torch.tensor(-INFINITE))


def unused(net: Any) -> None:
    net.register_buffer("last", torch.full((3,), NAN))


MEANT = [masked, masked_by_a_frozen_parameter, observed, unused]


@pytest.mark.parametrize("change", MEANT)
def test_what_is_infinite_on_purpose_is_sound(change: Callable[[Any], None]) -> None:
    net = grouped_already(Attending())
    change(net)
    assert_exact(converted(net, noise(64, SHAPE)).model, net, noise(8, SHAPE, 9))


@pytest.mark.parametrize("change", MEANT)
def test_a_checkpoint_may_hold_it(change: Callable[[Any], None]) -> None:
    saved, fresh = Attending(), Attending()
    change(saved)
    change(fresh)
    load_state(fresh, saved.state_dict(), "the file")


def diverged(net: Any) -> None:
    net.c1.weight.data[0, 0, 0, 0] = NAN


def overflown(net: Any) -> None:
    net.head.bias.data[0] = INFINITE


def frozen_and_overflown(net: Any) -> None:
    net.requires_grad_(False)
    net.stem.weight.data[0] = INFINITE


def without_statistics(net: Any) -> None:
    net.norm.running_var.fill_(INFINITE)


def nan_in_a_mask(net: Any) -> None:
    masked_by_a_frozen_parameter(net)
    net.mask[0, 0] = NAN


UNSOUND = {
    diverged: "c1.weight",
    overflown: "head.bias",
    frozen_and_overflown: "stem.weight",
    without_statistics: "norm.running_var",
    nan_in_a_mask: "mask",
}


@pytest.mark.parametrize(("change", "name"), UNSOUND.items())
def test_what_no_training_gives_is_refused_by_name(
    change: Callable[[Any], None], name: str, tmp_path: Path
) -> None:
    net = grouped_already(Attending())
    change(net)
    assert f"{name!r} holds NaN or infinity" in refusal(lambda: converted(net, noise(8, SHAPE)))
    fresh = Attending()
    if change is nan_in_a_mask:
        masked_by_a_frozen_parameter(fresh)
    with pytest.raises(CheckpointError, match=f"the file: '{name}' holds NaN or infinite"):
        load_state(fresh, net.state_dict(), "the file")


@pytest.mark.parametrize("value", [INFINITE, NAN])
def test_a_mask_that_spoils_the_outputs_is_noticed_all_the_same(value: float) -> None:
    net = grouped_already(Attending())

    def scaled(module: Any, inputs: Any, output: Tensor) -> Tensor:
        gain: Tensor = module.gain
        return output * gain[:, None, None]

    net.stem.register_buffer("gain", torch.full((16,), value))
    net.stem.register_forward_hook(scaled)
    assert "NaN or infin" in refusal(lambda: converted(net, noise(8, SHAPE)))
