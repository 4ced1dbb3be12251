"""What was asked for beside what came out, and several runs compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from groupify.models.preprocessing import Preprocessing
from groupify.paired import Paired
from groupify.reporting.asked import asked_lines
from groupify.reporting.html import comparison_page, report_page
from groupify.reporting.results import AccuracyChange, LatencyChange
from groupify.reporting.summary import comparison_sentence, fastest, verdict
from groupify.reporting.text import markdown, report_lines
from tests.reporting.test_report_page import FULL, float32_run, run_of

CHANGED = Paired(40, 25, 2000)  # a drop of 0.75 points
IMAGES = Preprocessing((224, 224), 256, "center", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic")


def _timed(speed_up: float, low: float, high: float, *, steady: bool = True) -> LatencyChange:
    return LatencyChange(10.0, 10.0 / speed_up, speed_up, 1, 1, steady, (low, high))


def _asked(budget: str, **changes: Any) -> list[str]:
    return list(asked_lines(replace(FULL, int8=None, dense_int8=None, budget=budget, **changes)))


def test_a_drop_is_shown_with_its_error() -> None:
    accuracy = AccuracyChange(0.93, 0.91, 0.9225, 2000, CHANGED)
    low, high = CHANGED.interval()
    (line,) = _asked("drop=1", accuracy=accuracy)
    assert line == f"asked drop=1: lost 0.75 ± {(high - low) / 2:.2f} points on 2000 test images"
    assert 0.7 < (high - low) / 2 < 0.9  # 1.96 × sqrt(65 / 2000 - 0.0075²) / sqrt(2000) = 0.79 points
    (line,) = _asked("drop=1", accuracy=replace(accuracy, changed=replace(CHANGED, lost=5)))
    assert "gained 1.00 ± " in line
    (line,) = _asked("drop=1", accuracy=AccuracyChange())
    assert line == "asked drop=1: not measured on test images"


def test_costs_and_latency() -> None:
    lines = _asked("macs=90%,params=20k,latency=50%", latency_ms=_timed(2.13, 2.04, 2.2))
    assert lines == [
        "asked macs=90%: got 81.5%, 128M of 157M",
        "asked params=20000: got 15.8k of 34.3k",
        "asked latency=2x: got 2.13× (2.04–2.20) (1 thread, batch 1)",
    ]
    assert _asked("latency=12ms", latency_ms=_timed(2.0, 1.9, 2.1)) == [
        "asked latency=12ms: got 5.00 ms (1 thread, batch 1)"
    ]
    assert _asked("latency=2x", latency_ms=None) == ["asked latency=2x: not timed"]


def test_an_int8_plan_is_told_by_its_int8_file() -> None:
    assert FULL.int8 is not None
    int8 = replace(FULL.int8, changed=Paired(9, 9, 2000), speed_up_over_dense_int8_range=(2.1, 2.3))
    report = replace(FULL, int8=int8, precision="int8", budget="drop=1,latency=2x")
    drop, latency = asked_lines(report)
    assert drop.startswith("asked drop=1: lost 0.00 ± ")
    assert "got 2.20× (2.10–2.30)" in latency
    (line,) = asked_lines(replace(report, budget="latency=2x:float32"))
    assert "got 7.30× (" in line


def test_what_was_asked_and_the_preprocessing_are_in_every_form() -> None:
    run = float32_run(budget="macs=90%", preprocessing=IMAGES)
    text, page = "\n".join(report_lines(run.report)), report_page(run)
    assert "asked macs=90%: got 81.5%" in text
    assert "shorter side to 256, then the middle 224×224, bicubic" in text
    assert "Asked macs=90%: got 81.5%" in page
    assert "<sub>asked macs=90%: got 81.5%" in markdown([run])
    assert "shorter side to 256" in page


# ---- busy machines


@pytest.mark.parametrize(
    ("latency", "says"),
    [
        (_timed(3.1, 3.0, 3.2, steady=False), "3.1× faster, "),
        (_timed(3.1, 2.0, 4.2, steady=False), "2.0 to 4.2× faster, "),
        (_timed(1.1, 0.8, 1.5, steady=False), "about as fast, 1.10× (0.80–1.50), "),
    ],
)
def test_a_busy_machine_gives_bounds(latency: LatencyChange, says: str) -> None:
    assert verdict(float32_run(latency_ms=latency).report).startswith(says)


def test_float_and_int8_are_told_alike_on_a_busy_machine() -> None:
    """Both by their bounds: not "uncertain" beside "19.83×"."""
    assert FULL.int8 is not None
    int8 = replace(FULL.int8, speed_up_range=(7.0, 7.6), speed_up_over_dense_int8_range=(2.1, 2.3))
    page = report_page(run_of(latency_ms=_timed(3.1, 2.9, 3.3, steady=False), int8=int8))
    for cell in ("3.10× (2.90–3.30)", "7.30× (7.00–7.60)", "2.20× (2.10–2.30)"):
        assert cell in page


# ---- several runs


def test_the_first_of_ties_is_not_the_fastest() -> None:
    worse = float32_run("first", latency_ms=_timed(3.1, 3.0, 3.2))
    better = float32_run(
        "second", latency_ms=_timed(3.12, 3.0, 3.2), accuracy=AccuracyChange(0.9365, 0.93, 0.935, 2000)
    )
    slow = float32_run("slow", latency_ms=_timed(2.0, 1.9, 2.1))
    sentence = comparison_sentence([worse, better, slow])
    start = "3 runs: first and second are equally fast as far as measured; of these second loses least: "
    assert sentence.startswith(start + "3.1× faster")
    assert comparison_sentence([worse, slow]).startswith("2 runs: the fastest, first, is 3.1× faster")
    assert sentence in comparison_page([worse, better, slow])
    assert sentence.replace("|", "") in markdown([worse, better, slow])


def test_runs_in_int8_and_float32_are_compared_with_one_dense_model() -> None:
    """7.3× over dense float32 is 2.2× over dense int8: faster than 3.1× over dense float32."""
    found = fastest([float32_run("float32"), run_of("int8")])
    assert found is not None
    assert (found.run.name, len(found.equal)) == ("int8", 1)


def test_runs_that_were_not_timed_have_no_fastest() -> None:
    runs = [float32_run("a", latency_ms=None), float32_run("b", latency_ms=None)]
    assert comparison_sentence(runs) == "2 runs: which is the fastest was not measured"
