"""Convs that have groups of several channels already: a budget gives each group a structure of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.errors import PlanError
from groupify.planning.candidates import candidates
from groupify.planning.rules import Rules
from groupify.planning.search import SearchOptions, plan_for_budget
from groupify.planning.sensitivity import measure_sensitivity, weight_sensitivity

SHAPE = (3, 8, 8)
ANY = Rules(min_group_width=1, structures="block-term")


def net(middle: nn.Conv2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, middle.in_channels, 3, padding=1),
        nn.ReLU(),
        middle,
        nn.BatchNorm2d(middle.out_channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(middle.out_channels, 5),
    ).eval()


def images(count: int = 200) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.Conv2d(32, 48, 1, groups=4)],
    ids=["3×3", "1×1"],
)
def test_a_budget_gives_every_group_factors_of_its_own(conv: nn.Conv2d) -> None:
    model = net(conv)
    options = candidates(model, SHAPE, ANY).sites[1]
    assert len(options) >= 4
    for option in options[1:]:
        assert option.site.structure.groups % conv.groups == 0
        option.site.structure.check(option.site.conv)
        assert option.site.macs.ratio > 1
    found = plan_for_budget(model, SHAPE, "macs=80%", images(), rules=ANY)
    made = found.plan.site("2")
    assert made.converted
    assert made.groups_before == conv.groups
    assert found.winner.costs["macs"] <= 0.8 * found.dense_costs["macs"]
    result = groupify.convert(model, found.plan, images())
    (fit,) = result.fits
    with torch.no_grad():
        x = images(20)
        wanted = model(x)
        error = (result.model(x) - wanted).square().mean() / wanted.var(0).mean()
    assert fit.error < 0.8
    assert float(error) < 0.8


def test_the_losses_grow_as_the_structures_shrink_and_are_those_of_the_fits() -> None:
    model = net(nn.Conv2d(32, 32, 3, padding=1, groups=2))
    choices = candidates(model, SHAPE, ANY)
    of_data = measure_sensitivity(model, choices, images())
    of_weights = weight_sensitivity(model, choices)
    for sensitivity in (of_data, of_weights):
        tucker = [c for c in choices.sites[1][1:] if c.site.groups == 2 and c.site.structure.reduce]
        tucker.sort(key=lambda c: -c.site.macs.grouped)
        losses = [sensitivity.loss(c) for c in tucker]
        assert losses == sorted(losses)
        assert losses[0] < losses[-1]
    assert max(of_weights.loss(c) for c in choices.sites[1]) <= 1 + 1e-6


def test_wide_groups_get_what_is_fast_and_narrow_ones_nothing() -> None:
    rules = Rules(cpu="avx512", structures="block-term")
    options = candidates(net(nn.Conv2d(128, 128, 3, padding=1, groups=2)), SHAPE, rules).sites[1]
    assert len(options) > 3
    for option in options[1:]:
        structure = option.site.structure
        for channels in filter(None, (structure.reduce, structure.expand)):
            assert channels // 2 % 16 == 0
    with pytest.raises(PlanError, match="grouped already"):
        candidates(net(nn.Conv2d(64, 64, 3, padding=1, groups=8)), SHAPE, rules)


def test_depthwise_convs_and_plain_groups_stay_as_they_were() -> None:
    with pytest.raises(PlanError, match="depthwise already"):
        candidates(net(nn.Conv2d(32, 64, 3, padding=1, groups=32)), SHAPE, ANY)
    model = net(nn.Conv2d(32, 32, 3, padding=1, groups=2))
    with pytest.raises(PlanError, match="grouped already"):
        groupify.plan(model, SHAPE, groups=4)
    with pytest.raises(PlanError, match="grouped already"):
        candidates(model, SHAPE, Rules(min_group_width=1, structures="grouped"))


def test_patterns_and_first_convs_are_minded() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3, groups=2), nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 32, 3, groups=2)
    )
    shape = (4, 12, 12)
    sites = candidates(model, shape, ANY).sites
    assert [len(options) > 1 for options in sites] == [False, True, True]
    fewer = Rules(min_group_width=1, structures="block-term", exclude="1")
    assert [len(options) > 1 for options in candidates(model, shape, fewer).sites] == [False, False, True]
    options = SearchOptions(verify=False)
    found = plan_for_budget(model, shape, "macs=70%", rules=ANY, options=options)
    assert found.plan.converted
