from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupify.planning.allocation import Allocation, Option, allocate, least, nearest, total

QUANTITIES = ("macs", "params")
options = st.builds(
    lambda loss, macs, params: Option(loss, {"macs": float(macs), "params": float(params)}),
    st.integers(0, 1000).map(lambda n: n / 64),
    st.integers(0, 40),
    st.integers(0, 40),
)
convs = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)
limits = st.fixed_dictionaries({"macs": st.integers(1, 120), "params": st.integers(1, 120)})


def every(problem: list[list[Option]]) -> list[Allocation]:
    choices = itertools.product(*(range(len(conv)) for conv in problem))
    return [total(problem, chosen, QUANTITIES) for chosen in choices]


def excess(found: Allocation, limit: dict[str, int]) -> float:
    return max(found.uses[name] / amount for name, amount in limit.items())


@given(convs, limits)
@settings(max_examples=60, deadline=None)
def test_no_other_choice_is_better(problem: list[list[Option]], limit: dict[str, int]) -> None:
    holding = [a for a in every(problem) if all(a.uses[name] <= limit[name] for name in limit)]
    found = allocate(problem, limit)
    if not holding:
        assert found is None
        closest = nearest(problem, limit)
        assert excess(closest, limit) == pytest.approx(min(excess(a, limit) for a in every(problem)))
    else:
        assert found is not None
        assert all(found.uses[name] <= limit[name] for name in limit)
        assert found.loss == pytest.approx(min(a.loss for a in holding), abs=1e-9)
        assert found == total(problem, found.chosen, QUANTITIES)


def test_without_limits_every_conv_takes_its_best() -> None:
    problem = [[Option(2.0, {}), Option(1.0, {})], [Option(0.0, {}), Option(3.0, {})]]
    found = allocate(problem, {})
    assert found is not None
    assert found.chosen == (1, 0)


def test_the_least_of_one_quantity() -> None:
    problem = [[Option(0, {"macs": 5.0}), Option(9, {"macs": 2.0})], [Option(0, {"macs": 1.0})]]
    assert least(problem, "macs") == 3.0


def test_a_limit_is_held_to_the_last_mac() -> None:
    """HiGHS lets a row be broken by 1e-6 of its scale, which is a thousand MACs in a billion."""
    problem = [[Option(0.0, {"macs": 1e9 + 100}), Option(1.0, {"macs": 1e9 - 1})]]
    found = allocate(problem, {"macs": 1e9})
    assert found is not None
    assert found.chosen == (1,)


def test_a_network_of_150_convs_takes_seconds() -> None:
    generator = np.random.default_rng(0)
    problem = []
    for _ in range(150):
        size, weight = generator.lognormal(17, 0.7), generator.lognormal()
        conv = [Option(0.0, {"macs": size, "latency": size})]
        for groups in (2, 4, 8, 16, 32):
            conv.append(
                Option(
                    weight * (1 - 1 / groups) ** 2,
                    {"macs": size / groups, "latency": size / groups * generator.uniform(1, 1.2)},
                )
            )
        problem.append(conv)
    dense = sum(conv[0].uses["macs"] for conv in problem)
    start = time.process_time()
    found = allocate(problem, {"macs": dense / 3, "latency": dense / 2.8})
    assert found is not None
    assert found.uses["macs"] <= dense / 3
    assert time.process_time() - start < 20
