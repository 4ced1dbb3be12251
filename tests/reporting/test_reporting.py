from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from groupify.conversion.site_fit import SiteFit
from groupify.machine import Machine
from groupify.measure.folder import BenchResult, BenchRow, bench_document
from groupify.models.specs import WeightsOrigin
from groupify.onnx.parity import Parity
from groupify.onnx.runtime import BlockedConvs
from groupify.reporting.document import clean
from groupify.reporting.formatting import count, points, ratio, shape, size
from groupify.reporting.results import AccuracyChange, LatencyChange, Report
from groupify.reporting.sites import print_plan
from groupify.reporting.tables import stdout_console
from groupify.reporting.text import print_bench, print_report
from groupify.structures import Change, Plan, SitePlan, Structure

MACHINE = Machine("Abacus 3", "avx2", 1, "Linux x86_64", "3.11", "2.6", "1.20", "1.17")
STEM = SitePlan(
    "stem", 1, Structure(), False, "first conv: too few input channels (3)", 3, 64, (7, 7), (2, 2),
    (112, 112), Change(9408, 9408), Change(118013952, 118013952),
)  # fmt: skip
CONV = SitePlan(
    "layer.conv", 1, Structure(groups=4), True, None, 64, 128, (3, 1), (1, 2), (56, 28),
    Change(24576, 6144), Change(38535168, 9633792),
)  # fmt: skip
POINTWISE = SitePlan(
    "last", 1, Structure(4, 2, 6), False, "clamped: 4 groups do not divide 6 → 6 channels",
    6, 6, (3, 3), (1, 1), (), Change(324, 198), Change(0, 0),
)  # fmt: skip
REPORT = Report(
    cpu="avx2",
    model="resnet18",
    weights=WeightsOrigin("random", 0),
    input_shape=(3, 224, 224),
    sites=(STEM, CONV, POINTWISE),
    params=Change(34308, 15750),
    macs=Change(156549120, 127647744),
    weight_bytes=Change(137232, 63000),
    activation_bytes=Change(4816896, 4816896),
    calibration="least squares in order, 1000 unlabelled images",
    accuracy=AccuracyChange(0.9365, 0.91, 0.925, 2000),
    onnx_bytes=Change(140000, 70000),
    parity=Parity(9.5e-6, 1e-6, 1.0, (1, 3), 4),
    latency_ms=LatencyChange(145.78, 47.17, 3.1, threads=2, batch_size=8),
    machine=MACHINE,
    files={"onnx": "out/model.onnx", "report": "out/report.json"},
    notes=("the weights are random",),
)
BENCH = BenchResult(
    folder="out",
    macs=Change(400, 100),
    mac_ratio=4.0,
    rows=(
        BenchRow("ONNX Runtime", 1, 8, "dense", "float32", 8.0, (7.9, 8.25), 1000.0, 1.0, 1.0, 1.0),
        BenchRow("ONNX Runtime", 1, 8, "grouped", "float32", 2.5, (2.4, 2.6), 3200.0, 3.2, 3.2, 3.2),
    ),
    blocked_convs={"dense": BlockedConvs(5, 5), "grouped": BlockedConvs(3, 5)},
    peak_memory_bytes={"dense float32": 3 * 2**20, "grouped float32": 2 * 2**20},
    machine=MACHINE,
)


def piped() -> Console:
    return Console(file=io.StringIO(), width=400, no_color=True)


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True, highlight=False)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in console.file.getvalue().splitlines()]


def test_a_report_in_text() -> None:
    console = piped()
    print_report(REPORT, console)
    assert lines(console) == [
        "site        shape                       groups                     params           MACs  reason",
        "stem        3 → 64, 7×7 / 2, 112×112    1                           9.41k           118M  first conv: too few input channels (3)",  # noqa: E501
        "layer.conv  64 → 128, 3×1 / 1×2, 56×28  1 → 4 + shuffle     24.6k → 6.14k  38.5M → 9.63M",
        "last        6 → 6, 3×3                  1 → 2 in (4, 2, 6)      324 → 198          0 → 0  clamped: 4 groups do not divide 6 → 6 channels",  # noqa: E501
        "",
        "                                  dense   grouped  ratio",
        "params                            34.3k     15.8k  2.18×",
        "MACs                               157M      128M  1.23×",
        "weight bytes                  134.0 KiB  61.5 KiB  2.18×",
        "peak activation bytes           4.6 MiB   4.6 MiB  1.00×",
        "ONNX file                     136.7 KiB  68.4 KiB  2.00×",
        "latency (2 threads, batch 8)  145.78 ms  47.17 ms  3.10×",
        "top-1 on 2000 test images: dense 93.65% → converted 91.00% → recovered 92.50%",
        "weights: random, seed 0; least squares in order, 1000 unlabelled images",
        "ONNX Runtime against PyTorch: largest difference 9.5e-06",
        "planned for avx2",
        "machine: Abacus 3 (avx2, 1 core), Linux x86_64, Python 3.11, torch 2.6, onnxruntime 1.20",
        "note: the weights are random",
        "wrote out/model.onnx, out/report.json",
    ]


def test_a_busy_machine_is_named() -> None:
    assert REPORT.latency_ms is not None
    console = piped()
    print_report(replace(REPORT, latency_ms=replace(REPORT.latency_ms, steady=False)), console)
    assert any("the machine was busy" in line for line in lines(console))


def test_what_was_not_measured_is_not_shown() -> None:
    console = piped()
    print_report(
        replace(
            REPORT,
            accuracy=AccuracyChange(),
            latency_ms=None,
            onnx_bytes=None,
            parity=None,
            machine=None,
            files={},
        ),
        console,
    )
    text = "\n".join(lines(console))
    for word in ("top-1", "latency", "ONNX", "machine", "wrote", "None"):
        assert word not in text


@pytest.mark.parametrize("width", [80, 139])
def test_a_narrow_terminal_gets_packed_cells_and_numbered_reasons(width: int) -> None:
    console = terminal(width)
    print_plan(Plan((STEM, CONV, POINTWISE, replace(STEM, name="stem2")), (3, 224, 224), 4, "avx2"), console)
    shown = lines(console)
    assert all(len(line) <= width for line in shown)
    assert "3→64 7×7/2 112×112" in shown[1]
    assert shown[1].split()[-1] == "1"
    assert "64→128 3×1/1×2 56×28" in shown[2]
    assert shown[3].split()[-1] == "2"
    assert shown[4].split()[-1] == "1"
    assert shown[5:7] == [
        "1: first conv: too few input channels (3)",
        "2: clamped: 4 groups do not divide 6 → 6 channels",
    ]


def test_a_wide_terminal_shows_the_reasons_in_place() -> None:
    console = terminal(160)
    print_plan(Plan((STEM, CONV), (3, 224, 224), 4, "avx2"), console)
    assert lines(console)[1].endswith("first conv: too few input channels (3)")
    assert "1: first conv" not in "\n".join(lines(console))
    assert lines(console)[-1] == "1 of 2 convs are converted, planned for avx2"


def test_piped_output_has_no_trailing_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(REPORT, stdout_console())
    out = capsys.readouterr().out
    assert "layer.conv" in out
    assert not any(line.endswith(" ") for line in out.splitlines())
    assert "\x1b" not in out


def test_a_benchmark_in_text() -> None:
    console = piped()
    print_bench(BENCH, console)
    assert lines(console) == [
        "engine        threads  batch  model                          ms  speed-up  efficiency  images/s",
        "ONNX Runtime        1      8  dense float32    8.00 (7.90–8.25)     1.00×                  1000",
        "ONNX Runtime        1      8  grouped float32  2.50 (2.40–2.60)     3.20×        0.80      3200",
        "speed-up over dense float32; MAC ratio 4.00×; efficiency = speed-up ÷ MAC ratio; "
        + "milliseconds as median (10–90%)",
        "convs in ONNX Runtime's blocked kernel (float32): dense 5 of 5, grouped 3 of 5",
        "peak memory of a fresh process: dense float32 3.0 MiB, grouped float32 2.0 MiB",
        "machine: Abacus 3 (avx2, 1 core), Linux x86_64, Python 3.11, torch 2.6, onnxruntime 1.20",
    ]


def test_a_benchmark_in_both_precisions() -> None:
    int8 = (
        BenchRow("ONNX Runtime", 1, 8, "dense", "int8", 2.0, (1.9, 2.1), 4000.0, 1.0, 4.0, 1.0),
        BenchRow("ONNX Runtime", 1, 8, "grouped", "int8", 1.0, (0.9, 1.1), 8000.0, 2.0, 8.0, 2.0),
    )
    console = piped()
    print_bench(replace(BENCH, rows=(*BENCH.rows, *int8)), console)
    shown = lines(console)
    assert shown[0].endswith("speed-up  over the best dense  images/s")
    assert shown[3].split() == [
        "ONNX",
        "Runtime",
        "1",
        "8",
        "dense",
        "int8",
        "2.00",
        "(1.90–2.10)",
        "4.00×",
        "1.00×",
        "4000",
    ]
    assert shown[5] == "grouped int8 is 2.00× faster than dense int8 (ONNX Runtime, threads 1, batch 8)"
    slow = replace(int8[1], median_ms=3.0, speed_up_over_best=0.67)
    best = replace(BENCH.rows[1], speed_up_over_best=0.8)
    console = piped()
    print_bench(replace(BENCH, rows=(BENCH.rows[0], int8[0], best, slow)), console)
    assert "grouped float32 is 1.25× slower than dense int8" in "\n".join(lines(console))


def test_a_benchmark_on_a_narrow_terminal() -> None:
    console = terminal(80)
    print_bench(BENCH, console)
    assert "8.00 (7.90–8.25)" in lines(console)[1]
    assert "images/s" not in lines(console)[0]
    assert len(lines(console)[1]) <= 80


def test_the_documents_are_json() -> None:
    document = replace(REPORT, fits=(SiteFit("last", 0.5, 1, 1),), machine=None).values()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["latency_ms"] == {
        "dense": 145.78, "grouped": 47.17, "speed_up": 3.1, "threads": 2, "batch_size": 8, "steady": True,
        "speed_up_range": None,
    }  # fmt: skip
    accuracy = {"dense": 0.9365, "converted": 0.91, "recovered": 0.925, "images": 2000, "changed": None}
    assert document["accuracy"] == accuracy
    assert document["parity"]["max_abs_diff"] == 9.5e-6
    assert document["machine"] is None
    assert [site["structure"] for site in document["sites"]] == [
        {"reduce": None, "groups": 1, "expand": None},
        {"reduce": None, "groups": 4, "expand": None},
        {"reduce": 4, "groups": 2, "expand": 6},
    ]
    bench = bench_document(BENCH)
    assert bench["mac_ratio"] == 4
    assert bench["blocked_convs"]["grouped"] == {"blocked": 3, "total": 5}
    json.dumps(bench, allow_nan=False)


def test_nulls_for_what_was_not_measured() -> None:
    report = replace(REPORT, accuracy=AccuracyChange(), latency_ms=None, onnx_bytes=None, parity=None)
    document = report.values()
    assert set(document["accuracy"].values()) == {None}
    assert document["latency_ms"] is None
    assert document["onnx_bytes"] is None
    assert document["parity"] is None
    values = {"a": (float("nan"), float("inf"), 1.5), "b": {"c": -float("inf")}}
    assert clean(values) == {"a": [None, None, 1.5], "b": {"c": None}}


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (36864, "36.9k"), (1814073344, "1.81G"), (2.5e6, "2.5M")],
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(512, "512 B"), (2048, "2.0 KiB"), (46796608, "44.6 MiB"), (2**31, "2.0 GiB")]
)
def test_size(number: float, text: str) -> None:
    assert size(number) == text


def test_no_minus_in_front_of_nothing() -> None:
    assert [points(value) for value in (-0.0, -0.001, 0.004, -0.75)] == ["+0.00", "+0.00", "+0.00", "−0.75"]


def test_ratio_and_shape() -> None:
    assert ratio(3.344) == "3.34×"
    assert ratio(float("nan")) == "–"
    assert shape(replace(CONV, stride=(2, 2), output_size=())) == "64 → 128, 3×1 / 2"
