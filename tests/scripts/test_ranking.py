from __future__ import annotations

from itertools import pairwise

import pytest
from torch import nn

from groupify.planning.candidates import candidates
from groupify.planning.costing import Costing
from groupify.planning.rules import Rules
from groupify.planning.sensitivity import Sensitivity
from groupify.scores import ModelCost
from groupify.structures import GROUPED
from scripts.benchmarks.ranking import RATIO, TOLERANCE, Measured, random_plans, row

CONVS = 12


@pytest.fixture(scope="module")
def costing() -> Costing:
    net = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(CONVS)))
    choices = candidates(net, (32, 4, 4), Rules(min_group_width=1, structures=(GROUPED,)))
    losses = {
        option.key: (place + 1) * ((option.site.macs.dense / option.site.macs.grouped) - 1)
        for place, options in enumerate(choices.sites)
        for option in options
    }
    macs = sum(options[0].site.macs.dense for options in choices.sites)
    return Costing(choices, Sensitivity(losses, "made up"), ModelCost(1, macs, 1, 1))


def test_random_plans_differ_and_cost_the_same(costing: Costing) -> None:
    plans = random_plans(costing, 8, 2.0, seed=0)
    assert len(set(plans)) == 8
    wanted = costing.dense_costs["macs"] / RATIO
    assert all((1 - TOLERANCE) * wanted <= costing.costs(plan)["macs"] <= wanted for plan in plans)
    assert plans == random_plans(costing, 8, 2.0, seed=0)
    assert plans != random_plans(costing, 8, 2.0, seed=1)


def test_plans_that_do_not_differ_are_refused(costing: Costing) -> None:
    with pytest.raises(SystemExit, match="give a larger --spread"):
        random_plans(costing, 8, 0.0, seed=0)


def test_a_rank_correlation_is_that_of_predicted_and_measured(costing: Costing) -> None:
    plans = sorted(random_plans(costing, 6, 2.0, seed=0), key=costing.loss)
    assert all(costing.loss(one) < costing.loss(other) for one, other in pairwise(plans))
    measured = [
        Measured(plan, divergence=float(place), drop=-float(place)) for place, plan in enumerate(plans)
    ]
    found = row("net", "fisher", 1.0, costing, measured)
    assert found.divergence_correlation == pytest.approx(1)
    assert found.drop_correlation == pytest.approx(-1)
    assert (found.plans, found.least, found.most) == (6, 0, 5)
