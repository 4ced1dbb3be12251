"""Errors of whole families before any conversion."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupify.decomposition.decompose import Decomposer
from groupify.decomposition.families import Cost, Family, families
from groupify.decomposition.ladder import RATIOS, ladder, ladders
from groupify.structures import ConvShape, Structure
from tests.decomposition.problems import problem

SQUARE = Cost(ConvShape(16, 16, (3, 3)), 1, 1)
POINTWISE = Cost(ConvShape(32, 16, (1, 1)), 1, 1)


def by_name(cost: Cost, block: int) -> dict[str, Family]:
    return {str(family): family for family in families(cost, block)}


def test_families_of_a_spatial_conv() -> None:
    conv = ConvShape(64, 64, (3, 3))
    found = by_name(Cost(conv, 49, 49), 16)
    assert list(found) == ["one group", "groups of 16 → 32", "groups of 4 → 8", "depthwise", "4 groups"]
    assert found["groups of 16 → 32"].member(3) == Structure(48, 3, 96)
    assert found["depthwise"].member(5) == Structure(40, 40, 40)
    assert found["4 groups"].member(2) == Structure(None, 4, 32)
    strided = by_name(Cost(conv, 4 * 49, 49), 16)
    assert "groups of 16 → 64" in strided  # reading costs four times what writing costs


def test_families_of_a_pointwise_conv() -> None:
    found = by_name(Cost(ConvShape(128, 32, (1, 1)), 49, 49), 16)
    assert list(found) == ["one group", "2 groups", "4 groups", "8 groups"]
    assert found["8 groups"].unit == Structure(None, 8, 128)
    assert found["one group"].member(3) == Structure(12, 1, None)


@given(
    inputs=st.integers(1, 40), outputs=st.integers(1, 40), own=st.integers(1, 3),
    block=st.sampled_from([1, 8, 16]),
    kernel=st.sampled_from([(1, 1), (3, 3), (5,)]), stride=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_members_suit_the_conv_and_cost_less(
    inputs: int, outputs: int, own: int, block: int, kernel: tuple[int, ...], stride: int
) -> None:
    cost = Cost(ConvShape(inputs * own, outputs * own, kernel, own), stride**2, 1)
    for family in families(cost, block):
        members = family.members(cost, RATIOS)
        for member in members:
            member.check(cost.conv)
        macs = [cost.macs(member) for member in members]
        assert macs == sorted(set(macs), reverse=True)
        assert all(each < cost.dense for each in macs)


@pytest.mark.parametrize("cost", [SQUARE, POINTWISE], ids=["3×3", "1×1"])
def test_errors_are_near_those_of_fits(cost: Cost) -> None:
    decomposer = Decomposer(problem(cost.conv)[0], cost.conv)
    found = ladders(decomposer, cost, 4, ratios=(2, 3, 4, 6, 8))
    assert any(found.values())
    for rungs in found.values():
        for rung in rungs:
            assert rung.macs == cost.macs(rung.structure)
            assert rung.error == pytest.approx(decomposer.fit(rung.structure).error, rel=0.4)
        errors = [rung.error for rung in rungs]
        assert errors == sorted(errors)


def test_low_rank_is_exact() -> None:
    decomposer = Decomposer(problem(POINTWISE.conv)[0], POINTWISE.conv)
    rungs = ladder(decomposer, Family(Structure(1, 1, None), grows=False), POINTWISE, (2, 3, 4, 5))
    assert len(rungs) == 4
    for rung in rungs:
        assert rung.error == pytest.approx(decomposer.fit(rung.structure).error, rel=1e-6)
