"""``--shuffle auto``: where a shuffle's gain is worth its latency."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from groupify import choose_shuffles, plan
from groupify.errors import PlanError
from groupify.planning.rules import Rules
from groupify.planning.slow_kernels import shuffle_work
from groupify.shuffles import ShuffleChoice, weigh, with_shuffles
from groupify.structures import Plan


class Net(nn.Module):
    """Grouped → grouped inside a residual sum, then a dense conv: the last shuffle would fold away."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.first = nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.third = nn.Conv2d(32, 32, 1)
        self.dense = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        start = self.stem(images).relu()
        inner = self.depthwise(self.first(start).relu())
        total = (start + self.second(inner)).relu()
        outputs: Tensor = self.head(self.dense(self.third(total)).mean((2, 3)))
        return outputs


SHAPE = (3, 12, 12)
IMAGES = torch.randn(48, *SHAPE, generator=torch.Generator().manual_seed(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def planned(model: nn.Module, **options: Any) -> Plan:
    return plan(model, SHAPE, groups=2, rules=Rules(**{"exclude": "dense", "min_group_width": 1, **options}))


def test_choice_is_a_new_plan_with_reasons() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given_plan = planned(model)
    choice = choose_shuffles(model, given_plan, IMAGES, seconds=0.2)
    assert given_plan == planned(model)  # nothing in place
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # The depthwise conv passes the groups on; behind the third, a dense conv makes a shuffle pointless.
    assert [(place.name, place.readers) for place in choice.places] == [
        ("first", ("second",)), ("second", ("third",)),
    ]  # fmt: skip
    assert 0 < choice.error_without < 1
    assert 0 < choice.error_with < 1
    assert choice.milliseconds_without > 0
    assert choice.milliseconds_with > 0
    reasons = {site.name: site.reason or "" for site in choice.plan.converted}
    assert reasons["third"].endswith("no shuffle: no grouped conv reads it")
    for place in choice.places:
        site = next(site for site in choice.plan.sites if site.name == place.name)
        assert site.shuffle == place.chosen
        assert ("no shuffle: " in reasons[place.name]) != place.chosen
        assert f"{-place.gain:+.5f} for {100 * place.cost:.2f}% latency" in reasons[place.name]
    unconverted = [site for site in choice.plan.sites if not site.converted]
    assert unconverted == [site for site in given_plan.sites if not site.converted]


def test_the_exchange_rate_decides() -> None:
    model = net()
    dear = choose_shuffles(model, planned(model), IMAGES, error_per_percent=1e9, seconds=0.1)
    assert [place.chosen for place in dear.places] == [
        place.gain > 0 and place.cost == 0 for place in dear.places
    ]


ERROR = st.floats(0, 1)


@given(
    without=st.tuples(ERROR, ERROR, ERROR),
    with_all=st.tuples(ERROR, ERROR, ERROR),
    slow_down=st.floats(0, 2),
    rate=st.floats(0, 0.1),
)
@settings(max_examples=50, deadline=None)
def test_gains_and_costs_add_up(
    without: tuple[float, ...], with_all: tuple[float, ...], slow_down: float, rate: float
) -> None:
    chosen = planned(NET)
    names = [site.name for site in chosen.converted]
    before, after = dict(zip(names, without, strict=True)), dict(zip(names, with_all, strict=True))
    # Both places are read by the third conv, whose gain they share.
    readers = {"first": ("second", "third"), "second": ("third",)}
    places = weigh(chosen, readers, before, after, slow_down, rate)
    gained = sum(before[name] - after[name] for name in ("second", "third")) / 3
    assert math.isclose(sum(place.gain for place in places), gained, abs_tol=1e-9)
    assert math.isclose(sum(place.cost for place in places), slow_down, abs_tol=1e-9)
    for place in places:
        assert place.chosen == (place.gain > 0 and place.gain >= rate * 100 * place.cost)


NET = net()


def test_a_larger_tensor_carries_more_of_the_cost() -> None:
    sites = planned(NET).converted
    assert shuffle_work(replace(sites[0], output_size=(24, 24))) > shuffle_work(sites[0]) > 0


def test_nothing_to_gain() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 100, 4))
    choice: ShuffleChoice = choose_shuffles(model, planned(model, exclude=()), IMAGES)
    assert choice.places == ()
    assert not any(site.shuffle for site in choice.plan.sites)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.conv(self.stem(images))
        return outputs if outputs.sum() > 0 else -outputs


def test_refused() -> None:
    with pytest.raises(PlanError, match="choose none or all"):
        choose_shuffles(Branching(), planned(Branching(), exclude=()), IMAGES)
    pointwise = planned(net(), structures="grouped-pointwise")
    with pytest.raises(PlanError, match="takes no shuffle; leave it at none"):
        choose_shuffles(net(), pointwise, IMAGES)


def test_shuffles_of_a_plan_are_set_and_unset() -> None:
    every = planned(NET, shuffle="all")
    assert [site.name for site in with_shuffles(every, ("second",)).converted if site.shuffle] == ["second"]
    assert with_shuffles(every, ()).recipes == planned(NET).recipes
