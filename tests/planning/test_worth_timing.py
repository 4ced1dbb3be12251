"""Candidates that no limit would choose are not timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from groupify.planning.candidates import candidates
from groupify.planning.costing import Costing
from groupify.planning.rules import Rules
from groupify.planning.search import SearchOptions, make_costing
from groupify.planning.sensitivity import weight_sensitivity
from groupify.planning.worth_timing import near_hull, worth_timing
from groupify.scores import measure_cost
from groupify.structures import PRECISIONS

SHAPE = (3, 16, 16)
points = st.lists(st.tuples(st.floats(1, 100), st.floats(0, 1)), min_size=1, max_size=30)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1),
    ).eval()  # fmt: skip


@given(points, st.floats(0, 10))
def test_whatever_loss_is_worth_the_best_point_is_kept(
    found: list[tuple[float, float]], price: float
) -> None:
    kept = near_hull(found)
    assert kept <= set(range(len(found)))
    best = min(loss + price * cost for cost, loss in found)
    assert min(found[at][1] + price * found[at][0] for at in kept) <= best + 1e-9


def test_what_costs_more_and_loses_more_goes() -> None:
    found = [(10, 0.0), (5, 0.5), (1, 1.0), (5, 0.9), (20, 0.2), (4.9, 0.51)]
    assert near_hull(found) == {0, 1, 2, 5}


def test_plans_are_hardly_worse_for_it() -> None:
    model, rules = net(), Rules(cpu="avx512")
    choices = candidates(model, SHAPE, rules)
    sensitivity = weight_sensitivity(model, choices)
    fewer = worth_timing(choices, sensitivity, rules.cpu_block)
    assert sum(map(len, fewer.sites)) < 0.8 * sum(map(len, choices.sites))
    assert [options[0] for options in fewer.sites] == [options[0] for options in choices.sites]
    for key, chosen in fewer.uniform.items():
        assert fewer.plan(chosen) == choices.plan(choices.uniform[key])
    dense = measure_cost(model, torch.zeros(1, *SHAPE))
    every, some = (Costing(each, sensitivity, dense) for each in (choices, fewer))
    for share in (0.7, 0.5, 0.3, 0.2):
        limit = {"macs": share * every.dense_costs["macs"]}
        best, found = every.best(limit), some.best(limit)
        assert best is not None
        assert found is not None
        assert some.loss(found) <= 1.05 * every.loss(best)


def test_in_int8_dense_grouped_and_depthwise_cores_do_not_hide_each_other() -> None:
    """A MAC of a grouped conv takes far longer there, so few MACs prove nothing."""
    model = net()
    kept = {}
    for precision in PRECISIONS:
        rules = Rules(cpu="avx512", precision=precision)
        choices = candidates(model, SHAPE, rules)
        fewer = worth_timing(choices, weight_sensitivity(model, choices), rules.cpu_block)
        kept[precision] = {option.key for options in fewer.sites for option in options}
        every = {option.key for options in choices.sites for option in options}
    assert kept["float32"] < kept["int8"] < every
    one_group = [key for key in kept["int8"] - kept["float32"] if ", 1, " in key]
    assert len({key.partition(":")[0] for key in one_group}) == 3  # of all convs that may be replaced


def test_a_limit_on_the_latency_times_those_alone(tmp_path: Path) -> None:
    model, rules = net(), Rules(cpu="avx512")
    options = SearchOptions(cache=tmp_path, verify=False)
    timed = make_costing(model, SHAPE, None, rules, options, latency=True)
    every = make_costing(model, SHAPE, None, rules, options, latency=False)
    assert sum(map(len, timed.choices.sites)) < sum(map(len, every.choices.sites))
    assert timed.latencies is not None
    assert [len(times) for times in timed.latencies.convs_ms] == [len(o) for o in timed.choices.sites]
    limit = {"latency": 0.7 * timed.dense_costs["latency"]}
    chosen = timed.best(limit)
    assert chosen is not None
    assert timed.costs(chosen)["latency"] <= limit["latency"]
    assert timed.loss(chosen) == pytest.approx(every.loss(every.choices.indices(timed.choices.plan(chosen))))
