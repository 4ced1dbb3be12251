"""What was won and lost, drawn: accuracies step by step on an axis, and accuracy against latency."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupify.reporting.charts import Point, chart, round_ticks
from groupify.reporting.html import comparison_page, report_page
from groupify.reporting.plane import accuracy_steps, off_scale, report_plane
from groupify.reporting.results import AccuracyChange, LatencyChange
from tests.reporting.test_report_page import FULL, float32_run, run_of

PERCENTAGES = st.floats(0, 100, allow_nan=False)
SEEN = [Point(100.0, 93.6, "dense", ""), Point(30.0, 93.0, "converted", "")]


def other(time: float, top1: float) -> Point:
    return Point(time, top1, "other", f"sibling: {time} ms", "sibling")


# Step by step -------------------------------------------------------------------------------------


def test_steps_stand_on_an_axis_with_round_ticks() -> None:
    accuracy = AccuracyChange(dense=0.9364, converted=0.92, recovered=0.9312, images=2000)
    steps = accuracy_steps(replace(FULL, accuracy=accuracy))
    assert steps is not None
    assert [text for text, _ in steps.ticks] == ["92%", "93%", "94%"]
    assert [place for _, place in steps.ticks] == [0, 50, 100]
    assert steps.marks == (
        ("dense", "93.64%", 82.0), ("converted", "92.00%", 0.0), ("recovered", "93.12%", 56.0)
    )  # fmt: skip
    page = report_page(run_of(accuracy=accuracy))
    axis = re.findall(r'<div class="axis".*?</div></div>', page)
    assert len(axis) == 1
    assert '<span style="left:50.0%">93%</span>' in axis[0]


def test_steps_without_accuracy_have_no_axis() -> None:
    nothing = replace(FULL, accuracy=AccuracyChange())
    assert accuracy_steps(nothing) is None
    assert '<div class="axis"' not in report_page(run_of(accuracy=nothing.accuracy))


@given(dense=PERCENTAGES, converted=PERCENTAGES)
def test_every_step_is_on_its_axis_at_its_value(dense: float, converted: float) -> None:
    accuracy = AccuracyChange(dense / 100, converted / 100, images=1)
    steps = accuracy_steps(replace(FULL, accuracy=accuracy))
    assert steps is not None
    values = [float(text.removesuffix("%")) for text, _ in steps.ticks]
    assert 2 <= len(values) <= 5
    assert values[0] >= 0
    assert values[-1] <= 100
    for (_, _, place), value in zip(steps.marks, (dense, converted), strict=True):
        read = values[0] + place / 100 * (values[-1] - values[0])
        assert read == pytest.approx(value, abs=0.001 * (values[-1] - values[0]))


@given(low=PERCENTAGES, span=st.floats(0.1, 50))
def test_round_ticks_are_few_and_hold_all(low: float, span: float) -> None:
    ticks = round_ticks(low, low + span)
    assert 2 <= len(ticks) <= 5
    assert ticks[0] <= low + 1e-6
    assert low + span <= ticks[-1] + 1e-6
    steps = [after - before for before, after in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


# The plane ----------------------------------------------------------------------------------------


def test_what_lies_far_away_is_marked_at_the_edge() -> None:
    near, bad, slow, both = off_scale([other(50, 91), other(40, 12), other(900, 93), other(900, 12)], SEEN)
    assert near == other(50, 91)
    # 0.6 points between those that must be seen: 3 points more are shown on either side.
    assert (bad.x, bad.edge, bad.label) == (40, "below", "12.00% sibling")
    assert bad.y == both.y == pytest.approx(90.0)
    assert (slow.x, slow.y, slow.edge, slow.label) == (250, 93, "right", "900.00 ms sibling")
    assert (both.x, both.edge) == (250, "below")
    better = off_scale([Point(1, 99, "other", "", "")], SEEN)[0]
    assert (better.edge, better.label) == ("above", "")


def test_the_scale_grows_with_what_must_be_seen() -> None:
    wide = [*SEEN, Point(30.0, 83.6, "recovered", "")]
    assert off_scale([other(40, 65)], wide)[0].edge == ""
    assert off_scale([other(40, 63)], wide)[0].edge == "below"


@given(
    points=st.lists(st.builds(other, st.floats(0.01, 1e4), PERCENTAGES)),
    seen=st.lists(st.builds(other, st.floats(0.01, 1e4), PERCENTAGES), min_size=1),
)
def test_what_must_be_seen_stays_where_it_is(points: list[Point], seen: list[Point]) -> None:
    marks = off_scale([*seen, *points], seen)
    assert marks[: len(seen)] == seen
    for mark, point in zip(marks[len(seen) :], points, strict=True):
        assert (mark.edge == "") == (mark == point)
        assert mark.title == point.title


def test_a_bad_sibling_does_not_squash_the_plane_of_a_report() -> None:
    def own_places(page: str) -> list[float]:
        own = r'<title>(?:dense|converted|recovered): [^<]*</title><circle cx="[^"]+" cy="([^"]+)'
        return [float(place) for place in re.findall(own, page)]

    bad = float32_run("bad run", accuracy=AccuracyChange(0.9365, 0.12, images=2000))
    alone, beside = report_page(run_of()), report_page(run_of(), [bad])
    assert len(own_places(beside)) == len(own_places(alone)) >= 2
    apart = [max(places) - min(places) for places in (own_places(alone), own_places(beside))]
    assert apart[1] > apart[0] / 3
    assert "Off the scale, marked at the edge: bad run: 47.17 ms, 12.00%." in beside
    assert "Off the scale" not in alone
    assert ">12.00% bad run</text>" in beside
    compared = comparison_page([float32_run("one"), float32_run("two"), bad])
    assert "Off the scale, marked at the edge: bad run: 47.17 ms, 12.00%." in compared


def test_a_mark_at_the_edge_points_outwards() -> None:
    shapes = set()
    for edge in ("", "below", "above", "right"):
        drawn = chart("one", [Point(1, 1, "other", "there", edge=edge)], x_title="", y_title="")
        (path,) = re.findall(r'<title>there</title>.*?<path id="[^"]+" d="([^"]+)"', drawn)
        shapes.add(path)
    assert len(shapes) == 4


def test_dense_int8_is_shown_wherever_it_was_measured() -> None:
    assert "<title>dense int8: 44.00 ms, 93.50%</title>" in report_page(run_of())
    without = float32_run()
    assert "dense int8" not in report_page(without)
    # A sibling measured it: that is the rival here, too.
    plane = report_plane(without.report, [run_of("sibling")])
    assert plane is not None
    assert plane.chart[1].count("<title>dense int8: 44.00 ms, 93.50%</title>") == 1
    both = report_plane(FULL, [run_of("sibling")])
    assert both is not None
    assert both.chart[1].count("<title>dense int8: ") == 1


def test_runs_alone_have_a_plane() -> None:
    untimed = float32_run(latency_ms=None, uniform=())
    assert report_plane(untimed.report) is None
    latency = LatencyChange(100.0, 50.0, 2.0, threads=1, batch_size=1)
    plane = report_plane(untimed.report, [float32_run("sibling", latency_ms=latency)])
    assert plane is not None
    assert plane.off_scale == ()
