from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupify.errors import SpecError
from groupify.planning.budget import COSTS, DROP, LATENCY, QUANTITIES, Budget, Limit


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("macs=40%", Limit("macs", 0.4, relative=True)),
        ("macs=2.5x", Limit("macs", 0.4, relative=True)),
        ("macs=700M", Limit("macs", 7e8, relative=False)),
        ("params=8M", Limit("params", 8e6, relative=False)),
        (" params = 100k ", Limit("params", 1e5, relative=False)),
        ("bytes=8MB", Limit("bytes", 8e6, relative=False)),
        ("bytes=1MiB", Limit("bytes", 2**20, relative=False)),
        ("latency=2x", Limit("latency", 0.5, relative=True)),
        ("latency=1.5s", Limit("latency", 1500, relative=False)),
        ("latency=2x:float32", Limit("latency", 0.5, relative=True, of_float32=True)),
        ("drop=.5", Limit("drop", 0.5, relative=False)),
    ],
)
def test_budgets_are_read(text: str, limit: Limit) -> None:
    assert Budget.parse(text).limits == (limit,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latency=1.2x", "latency=1.2x"),
        ("macs=3x", "macs=3x"),
        ("macs=2.5x", "macs=40%"),
        ("macs=42.4%", "macs=42.4%"),
    ],
)
def test_a_budget_is_told_in_few_digits(text: str, says: str) -> None:
    assert str(Budget.parse(text)) == says


def test_several_limits_hold_together() -> None:
    budget = Budget.parse("macs=40%,latency=2x", "drop=0.5")
    assert [limit.quantity for limit in budget.limits] == ["macs", "latency", "drop"]
    assert [limit.quantity for limit in budget.costs] == ["macs", "latency"]
    assert budget.drop == 0.5
    assert budget.limits[0].at_most(200) == 80
    assert Budget.parse("latency=12ms").limits[0].at_most(200) == 12
    assert Budget.parse("macs=40%").drop is None


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ((), "no budget"),
        (("mac=40%",), "did you mean 'macs'"),
        (("macs",), "expected one of macs, params"),
        (("macs=",), "macs=40%"),
        (("macs=many",), "expected a value above 0"),
        (("macs=-1",), "expected a value above 0"),
        (("macs=0%",), "expected a value above 0"),
        (("macs=1e3",), "expected"),
        (("macs=140%",), "more than the dense model has"),
        (("macs=0.5x",), "more than the dense model has"),
        (("macs=8MB",), "unknown unit 'MB'"),
        (("latency=12",), "unknown unit ''"),
        (("latency=2x:int8",), "':int8' says nothing; expected a relative latency in front of ':float32'"),
        (("latency=12ms:float32",), "':float32' says nothing; expected a relative latency"),
        (("macs=2x:float32",), "':float32' says nothing"),
        (("latency=2x:",), "':' says nothing"),
        (("drop=1%",), "unknown unit '%'"),
        (("drop=2x",), "unknown unit 'x'"),
        (("macs=40%", "macs=2x"), "two limits for 'macs'"),
        (("macs=40%,",), "budget ''"),
        (("macs=٤%",), "expected a value"),
    ],
)
def test_what_is_no_budget_is_refused(texts: tuple[str, ...], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        Budget.parse(*texts)


shares = st.floats(0.001, 1.0).map(lambda share: round(share, 4)).filter(bool)
amounts = st.floats(0.001, 1e9).map(lambda amount: float(f"{amount:.6g}"))
limits = st.one_of(
    st.builds(Limit, st.sampled_from(COSTS), shares, st.just(True)),
    st.builds(Limit, st.just(LATENCY), shares, st.just(True), st.just(True)),
    st.builds(Limit, st.sampled_from(QUANTITIES), amounts, st.just(False)),
)


@given(st.lists(limits, min_size=1, unique_by=lambda limit: limit.quantity))
def test_a_budget_reads_what_it_prints(several: list[Limit]) -> None:
    budget = Budget(tuple(several))
    again = Budget.parse(str(budget))
    assert [limit.quantity for limit in again.limits] == [limit.quantity for limit in several]
    for before, after in zip(several, again.limits, strict=True):
        assert (after.relative, after.of_float32) == (before.relative, before.of_float32)
        assert after.value == pytest.approx(before.value, rel=1e-9)


@given(st.text(alphabet="macsdrop=%x.0123456789MGkB ,-", max_size=16))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    budget, problem = None, ""
    try:
        budget = Budget.parse(text)
    except SpecError as error:
        problem = str(error)
    assert "\n" not in problem
    for limit in () if budget is None else budget.limits:
        assert 0 < limit.value <= (1 if limit.relative else math.inf)
        assert not (limit.relative and limit.quantity == DROP)
