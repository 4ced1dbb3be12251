"""Structures chosen at the MACs of plain groups, which is the default: no groups, no budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import groupify
from groupify.conversion.surgery import restructure
from groupify.errors import GroupifyError, PlanError, SpecError
from groupify.graph.call import example_input
from groupify.planning.group_counts import GroupCounts
from groupify.planning.like_groups import budget_like_groups
from groupify.planning.race import BudgetPlan
from groupify.scores import measure_cost
from tests.cases.nets import refusal

SHAPE = (3, 8, 8)
RULES = groupify.Rules(cpu="avx512")


def chain(widths: list[int], kernels: list[int], groups: Mapping[str, int] | int = 1) -> nn.Sequential:
    """A stem and convs behind it; those whose channels their number of groups divides are grouped so."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
    for reads, writes, kernel in zip(widths, widths[1:], kernels, strict=False):
        name = str(len(layers) + 1)
        count = groups if isinstance(groups, int) else groups.get(name, 1)
        count = count if reads % count == writes % count == 0 else 1
        layers += [nn.ReLU(), nn.Conv2d(reads, writes, kernel, padding=kernel // 2, groups=count)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5)).eval()


def macs(model: nn.Module) -> int:
    return measure_cost(model, example_input(SHAPE)).macs


def searched(model: nn.Module, groups: Any = None, rules: groupify.Rules = RULES) -> BudgetPlan:
    return groupify.plan_for_budget(model, SHAPE, groups=groups, rules=rules)


NETS = st.tuples(
    st.lists(st.sampled_from([8, 12, 16, 24, 30, 32]), min_size=2, max_size=3),
    st.lists(st.sampled_from([1, 3]), min_size=2, max_size=2),
)


@given(net=NETS, groups=st.sampled_from([2, 3, 4, 8]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_limit_is_what_such_groups_cost(net: tuple[list[int], list[int]], groups: int) -> None:
    dense, grouped = macs(chain(*net)), macs(chain(*net, groups))
    if grouped == dense:
        with pytest.raises(PlanError, match=f"{groups} groups.* divide the channels of no conv"):
            budget_like_groups(chain(*net), SHAPE, GroupCounts.of(groups))
    else:
        (limit,) = budget_like_groups(chain(*net), SHAPE, GroupCounts.of(groups)).limits
        assert (limit.at_most(dense), str(limit)) == (grouped, f"the MACs of {groups} plain groups")
        assert limit.text == f"macs={grouped}"


@given(net=NETS, groups=st.sampled_from([2, 4, 8]))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_the_whole_model_has_no_more_macs_than_with_such_groups(
    net: tuple[list[int], list[int]], groups: int
) -> None:
    model, most = chain(*net), macs(chain(*net, groups))
    assume(most < macs(model))
    found = searched(model, groups)
    assert found.winner.costs["macs"] == macs(restructure(model, found.plan.recipes)) <= most


def test_without_groups_and_budget_four_are_meant() -> None:
    model = chain([16, 32, 32], [3, 1])
    default, four = searched(model), searched(model, 4)
    assert str(default.budget) == "the MACs of 4 plain groups"
    assert (default.budget, default.plan.recipes) == (four.budget, four.plan.recipes)
    assert {site.structure.is_one_conv for site in default.plan.converted} != {True}


def test_numbers_by_name() -> None:
    widths, kernels = [16, 32, 32, 32], [3, 3, 3]
    model = chain(widths, kernels)
    found = searched(model, {"*": 4, "4": 8})
    assert str(found.budget) == "the MACs of plain groups 4,4=8"
    most = macs(chain(widths, kernels, {"2": 4, "4": 8, "6": 4}))
    assert macs(restructure(model, found.plan.recipes)) <= most
    # What gets no groups, or 1, stays as it is, as in a plan of plain groups.
    for groups in ({"4": 4}, {"*": 4, "2": 1, "6": 1}):
        found = searched(model, groups)
        assert [site.name for site in found.plan.converted] == ["4"]
        assert macs(restructure(model, found.plan.recipes)) <= macs(chain(widths, kernels, {"4": 4}))


@pytest.mark.parametrize("groups", [4, {"*": 4, "2": 8}])
def test_plan_does_not_choose_structures(groups: int | dict[str, int]) -> None:
    rules = groupify.Rules(structures=("block-term",))
    said = refusal(lambda: groupify.plan(chain([32, 64], [3]), SHAPE, groups=groups, rules=rules))
    assert "a number of groups takes grouped or grouped-pointwise" in said
    assert "call plan_for_budget" in said


@pytest.mark.parametrize(
    ("make", "groups", "says"),
    [
        (
            lambda: chain([18, 30], [3]),
            None,
            "4 groups, the default, divide the channels of no conv that may",
        ),
        (lambda: chain([18, 30], [3]), None, "; try 2 groups or a budget like macs=50%"),
        (lambda: chain([18, 30], [3]), {"*": 4, "2": 5}, "4,2=5 groups divide the channels of no conv"),
        (lambda: chain([16, 17], [3]), 2, "; try a budget like macs=50%"),
        (nn.Flatten, None, "the model has no conv layer"),
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 3)), None, "first conv: too few input channels (3)"),
        (lambda: chain([32, 64], [3]), {"9": 4}, "'9' matches no conv of the model"),
        (lambda: chain([32, 64], [3]), 1, "groups is 1, which leaves the model dense"),
    ],
)
def test_what_cannot_be_is_said(make: Callable[[], nn.Module], groups: Any, says: str) -> None:
    assert says in refusal(lambda: searched(make(), groups))


def test_a_limit_that_no_plan_holds_is_called_by_what_was_asked() -> None:
    with pytest.raises(GroupifyError, match="the MACs of 16 plain groups cannot be held: the least that"):
        searched(chain([32, 64], [3]), 16, groupify.Rules(min_group_width=16, structures=("grouped",)))


def test_groups_and_a_budget_are_refused() -> None:
    with pytest.raises(SpecError, match="groups and a budget: both say how much smaller"):
        groupify.plan_for_budget(chain([32, 64], [3]), SHAPE, "macs=50%", groups=4)
