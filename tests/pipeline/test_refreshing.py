"""A report timed again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from groupify.errors import ArtefactError, SpecError
from groupify.measure.folder import BenchResult, BenchRow
from groupify.pipeline.refreshing import refreshed, update_report
from groupify.reporting.read import read_report
from tests.reporting.test_report_page import FULL
from tests.reporting.test_reporting import BENCH

DENSE = BenchRow("ONNX Runtime", 2, 1, "dense", "float32", 8.0, (7.9, 8.2), 125.0, 1.0, 1.0, 0.25)
OWN = replace(
    DENSE, model="grouped", median_ms=4.0, spread_ms=(3.9, 4.1), speed_up=2.0, speed_up_over_float32=2.0
)
OWN = replace(OWN, speed_up_range=(1.9, 2.1), speed_up_over_float32_range=(1.9, 2.1))
INT8 = (
    replace(DENSE, precision="int8", median_ms=2.0, spread_ms=(1.9, 2.1), speed_up_over_float32=4.0),
    replace(
        OWN, precision="int8", median_ms=2.5, spread_ms=(2.4, 2.6), speed_up=0.8, speed_up_over_float32=3.2,
        speed_up_range=(0.7, 0.9), speed_up_over_float32_range=(3.1, 3.3),
    ),
)  # fmt: skip
LATER = replace(DENSE, batch_size=8, median_ms=99.0)
ALL: BenchResult = replace(BENCH, rows=(DENSE, OWN, *INT8, LATER))


def test_every_time_of_a_report_is_of_the_new_run() -> None:
    slow = "slower than the dense model on this machine: speed-up 0.90 in ONNX Runtime; give fewer groups"
    with pytest.warns(match="dense int8 wins on this machine"):
        report = refreshed(replace(FULL, notes=("stays", slow)), ALL)
    assert report.latency_ms is not None
    assert report.int8 is not None
    assert report.dense_int8 is not None
    assert FULL.int8 is not None
    assert (report.latency_ms.dense, report.latency_ms.grouped, report.latency_ms.threads) == (8.0, 4.0, 2)
    assert (report.latency_ms.speed_up, report.latency_ms.speed_up_range) == (2.0, (1.9, 2.1))
    assert (report.int8.milliseconds, report.int8.speed_up, report.int8.speed_up_over_float) == (
        2.5,
        3.2,
        1.6,
    )
    assert (report.int8.speed_up_over_dense_int8, report.int8.speed_up_range) == (0.8, (3.1, 3.3))
    assert report.dense_int8.milliseconds == 2.0
    assert report.int8.top1 == FULL.int8.top1
    assert report.machine == BENCH.machine
    # Nothing of the old run is beside it.
    assert report.site_milliseconds == {}
    assert {run.milliseconds for run in report.uniform} == {None}
    assert [note[:11] for note in report.notes] == ["stays", "dense int8 "]


def test_what_was_not_timed_is_asked_for() -> None:
    with pytest.raises(SpecError, match=r"dense int8 was not timed: .* --precision both"):
        refreshed(FULL, replace(ALL, rows=(DENSE, OWN)))


def test_the_files_of_a_folder_are_written(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no report\.json"):
        update_report(tmp_path, ALL)
    (tmp_path / "report.json").write_text(replace(FULL, int8=None, dense_int8=None).dumps(), "utf-8")
    update_report(tmp_path, ALL)
    latency = read_report(tmp_path).report.latency_ms
    assert latency is not None
    assert latency.grouped == 4.0
    assert "2.00× (1.90–2.10)" in (tmp_path / "report.html").read_text("utf-8")
