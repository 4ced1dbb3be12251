"""report.html, report.json against its schema, and ``groupify report``."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from groupify.conversion.pictures import BlockPicture
from groupify.conversion.site_fit import SiteFit
from groupify.errors import ArtefactError
from groupify.models.specs import WeightsOrigin
from groupify.onnx.comparison import Agreement
from groupify.reporting.charts import Point, chart, place_labels
from groupify.reporting.html import comparison_page, report_page
from groupify.reporting.read import Run, earlier_runs, read_report
from groupify.reporting.results import AccuracyChange, Int8File, LatencyChange, Report, UniformRun
from groupify.reporting.summary import verdict
from groupify.reporting.text import markdown, print_summary
from groupify.structures import Change
from groupify.training.history import FinetuneRow
from tests.chromium import Page, chromium, needs_chromium
from tests.conftest import ROOT
from tests.conftest import Run as Command
from tests.reporting.test_reporting import REPORT
from tests.test_recipe import VALUES, paths_of

PYDANTIC = tuple(map(int, pydantic.VERSION.split(".")[:2]))
SCHEMA_FILE = ROOT / "groupify" / "reporting" / "report.schema.json"
SCHEMA = json.loads(SCHEMA_FILE.read_text("utf-8"))
FULL = replace(
    REPORT,
    weights=WeightsOrigin("demo"),
    fits=(SiteFit("layer.conv", 0.125, 4096, 48), SiteFit("last", 0.5, 4096, 27)),
    history=(
        FinetuneRow(0, 0.0, None, None, None, 0.9, 0.3),
        FinetuneRow(10, 0.5, 0.7, 0.01, 900.0, 0.915, 0.28),
        FinetuneRow(20, 1.0, 0.6, 0.0, 900.0, 0.92, 0.27),
    ),
    pictures=(BlockPicture("layer.conv", 4, 2, 3, bytes(range(6)), bytes(range(6, 12)), 0.25, 0.5),),
    site_milliseconds={"stem": Change(2.0, 2.0), "layer.conv": Change(1.0, 0.25)},
    int8=Int8File(18_000, 256, False, Agreement(0.1, 0.01, 0.99, 256), 0.92, 20.0, 7.3, 2.4, 2.2),
    dense_int8=Int8File(36_000, 256, False, Agreement(0.1, 0.01, 0.99, 256), 0.935, 44.0, 3.3, 3.3, 1.0),
    uniform=(
        UniformRun(2, 6_000_000, 900_000_000, 0.93, 80.0),
        UniformRun(8, 2_000_000, 400_000_000, 0.9, 40.0),
    ),
    command="groupify convert resnet18 --groups 4",
    groupify="0.1.0",
)


BUSY = LatencyChange(145.78, 47.17, 3.1, threads=2, batch_size=8, steady=False)


def run_of(name: str = "out", **changes: Any) -> Run:
    return Run(name, replace(FULL, **changes))


def float32_run(name: str = "out", **changes: Any) -> Run:
    """The same without int8."""
    return run_of(name, int8=None, dense_int8=None, **changes)


def validate(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


def written(folder: Path, document: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(document), "utf-8")
    return folder


# the document ----------------------------------------------------------------------------------


def test_schema_is_sound_and_knows_every_part() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for report in (REPORT, FULL, replace(FULL, latency_ms=None, parity=None, machine=None, onnx_bytes=None)):
        document = report.values()
        validate(document)
        assert set(SCHEMA["required"]) <= set(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("accuracy", "dense"), 93.6),
        (("sites", 0, "structure"), "pruned"),
        (("sites", 0, "structure", "groups"), "4"),
        (("latency_ms", "dense"), 0),
        (("params", "grouped"), -1),
        (("pictures", 0, "before"), None),
        (("schema_version",), 2),
    ],
)
def test_schema_refuses_what_is_wrong(path: tuple[Any, ...], value: object) -> None:
    document = copy.deepcopy(FULL.values())
    part: Any = document
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "3.1× faster, 2.0× smaller, 1.1 points less accurate"),
        ({"latency_ms": None}, "2.0× smaller, 1.1 points less accurate"),
        ({"accuracy": AccuracyChange(0.9, 0.9, None, 9)}, "just as accurate"),
        ({"accuracy": AccuracyChange(0.9, 0.9, 0.91, 9)}, "1.0 point more"),
        ({"accuracy": AccuracyChange()}, "not measured"),
        ({"weights": WeightsOrigin("random", 0)}, "accuracy not measured"),
    ],
)
def test_verdict(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in verdict(float32_run(**changes).report)
    assert "than dense int8" in verdict(run_of().report)


def test_verdict_claims_no_speed_of_a_busy_machine() -> None:
    run = float32_run(latency_ms=BUSY)
    assert verdict(run.report).startswith("speed uncertain, 2.0× smaller, ")
    page = report_page(run, [])
    assert "uncertain" in page
    assert "3.1× faster" not in page


def test_verdict_says_slower_and_larger() -> None:
    latency = LatencyChange(10.0, 20.0, 0.5, threads=1, batch_size=1)
    report = float32_run(onnx_bytes=Change(10, 20), latency_ms=latency).report
    assert verdict(report).startswith("2.0× slower, 2.0× larger, ")


# reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no report.json in"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "levels deep"),
        ("[]", r"report is \[\]; expected an object"),
        ("{}", "it is no report"),
        (
            '{"format": "groupify-report", "schema_version": 7}',
            "is 7, this groupify reads version 5",
        ),
        ('{"format": "groupify-report", "schema_version": 5}', "report has no 'model'"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text, "utf-8")
    with pytest.raises(ArtefactError, match=message):
        read_report(tmp_path)


def mutated(document: Any, data: st.DataObject) -> Any:
    """Replace or remove some parts of a document."""
    document = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths_of(document)[1:]))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        if isinstance(parent, dict) and data.draw(st.booleans()):
            del parent[path[-1]]
        else:
            parent[path[-1]] = data.draw(VALUES)
    return document


@pytest.mark.parametrize(
    ("changes", "shown", "hidden"),
    [
        (
            {"accuracy": replace(FULL.accuracy, dense=None), "int8": None, "dense_int8": None},
            "accuracy not measured",
            ("points", "<dt>dense</dt>", "<title>dense: "),
        ),
        (
            {"accuracy": replace(FULL.accuracy, recovered=None), "int8": None, "dense_int8": None},
            "2.6 points less",
            ("<dt>recovered</dt>",),
        ),
        ({"pictures": (replace(FULL.pictures[0], kept_before=math.nan),)}, "50% in the blocks", ("25% in",)),
        ({"fits": (replace(FULL.fits[0], error=math.nan),)}, "layer.conv", ("outputs missed", "nan")),
    ],
)
def test_what_was_not_measured_is_left_out(
    tmp_path: Path, changes: dict[str, Any], shown: str, hidden: tuple[str, ...]
) -> None:
    document = replace(FULL, **changes).values()
    validate(document)
    page = report_page(read_report(written(tmp_path / "out", document)))
    assert shown in page
    assert [text for text in hidden if text in page.partition("<main>")[2].partition("<script>")[0]] == []


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    read = read_report(written(tmp_path / "out", FULL.values()))
    assert read == Run("out", FULL)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_mutated_reports_are_shown_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    document = mutated(FULL.values(), data)
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "report.json").write_text(json.dumps(document), "utf-8")
    try:
        run = read_report(folder)
    except ArtefactError as error:
        if "\n" in str(error):
            pytest.fail(f"more than one line: {error}")
        return
    report_page(run, [run_of("other")])
    comparison_page([run, run_of("other")])
    markdown([run])
    print_summary([run, run], Console(file=io.StringIO()))


def test_a_note_says_which_run_it_is_of() -> None:
    text = io.StringIO()
    print_summary([run_of("one"), run_of("other")], Console(file=text, width=200))
    notes = [line for line in text.getvalue().splitlines() if "note: " in line]
    assert {line.partition(": ")[0] for line in notes} == {"one", "other"}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_is_read_keeps_to_the_schema(data: st.DataObject) -> None:
    document = json.loads(json.dumps(mutated(FULL.values(), data)))
    with contextlib.suppress(ArtefactError):
        Report.loads(json.dumps(document))
        validate(document)


@pytest.mark.skipif(PYDANTIC < (2, 14), reason="earlier versions of pydantic leave out some of the schema")
def test_the_published_schema_is_that_of_the_reports() -> None:
    """To write it anew: ``python -m tests.reporting.test_report_page``."""
    assert Report.schema() == SCHEMA


def test_a_later_version_may_have_more_to_say(tmp_path: Path) -> None:
    document = FULL.values()
    more = {**document, "new": [1], "sites": [{**site, "new": {}} for site in document["sites"]]}
    validate(more)
    assert read_report(written(tmp_path / "out", more)).report == FULL


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model",), "a\x1b[31mb", "report.model is 'a.*; expected a printable text"),
        (("sites", 0, "structure"), "pruned", r"report.sites\[0\].structure is 'pruned'; expected an object"),
        (("sites", 0, "structure", "groups"), 0, "report: groups is 0; expected 1 or more"),
        (("params",), None, "report.params is None; expected an object"),
        (("latency_ms", "dense"), 0, "report.latency_ms.dense is 0; expected greater than 0"),
        (("pictures", 0, "columns"), 5, r"report.pictures\[0\] is .*; expected 2 by 5 pixels"),
        (("pictures", 0, "after"), "%%", r"report.pictures\[0\].after is '%%'; expected base64"),
        (("accuracy", "dense"), float("nan"), "NaN is not a number"),
    ],
)
def test_what_is_wrong_in_a_report_is_named(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    document = copy.deepcopy(FULL.values())
    parent: Any = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(ArtefactError, match=message):
        read_report(written(tmp_path / "out", document))


def test_earlier_runs_are_those_of_the_same_model_beside_it(tmp_path: Path) -> None:
    document = FULL.values()
    own = written(tmp_path / "own", document)
    written(tmp_path / "second", document)
    written(tmp_path / "other-model", {**document, "model": "vgg16"})
    written(tmp_path / ".hidden.partial", document)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text("?")
    assert [run.name for run in earlier_runs(own, FULL)] == ["second"]


# parts -----------------------------------------------------------------------------------------


def test_picture_holds_the_values_as_opacity() -> None:
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', report_page(run_of()))
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in uris]
    assert [picture.size for picture in pictures] == [(3, 2), (3, 2)]
    assert [picture.getchannel("A").tobytes() for picture in pictures] == [
        bytes(range(6)),
        bytes(range(6, 12)),
    ]


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_chart_keeps_everything_inside_and_labels_apart() -> None:
    points = [
        Point(x, 90 + y, "other", f"point {x}", f"run {x}")
        for x, y in ((1, 0.0), (1.1, 0.01), (1.2, 0.02), (9, 3))
    ]
    drawn = chart("a chart", points, x_title="x", y_title="y", from_zero=True)
    across, down = numbers('cx="([^"]+)', drawn), numbers('cy="([^"]+)', drawn)
    assert len(across) == len(points)
    left, right, top, bottom = 52, 424, 32, 252  # of the axes
    assert all(left <= x <= right for x in across)
    assert all(top <= y <= bottom for y in down)
    labels = place_labels(["a long run"] * 4, list(zip(across, down, strict=True))[::-1])
    rows = sorted(label.y for label in labels if label is not None and label.align == "left")
    assert len(rows) >= 3
    assert all(low + 12 <= high for low, high in pairwise(rows))
    ticks = re.findall(r"middle[^>]*>([^<]+)</text>", drawn)
    assert 3 <= len(ticks) <= 8
    assert ticks[0] == "0"
    assert chart("one point", [Point(1, 1, "dense", "")], x_title="", y_title="").count("<circle") == 1


def test_a_chart_takes_its_colours_and_letters_from_the_page() -> None:
    line = [Point(0, 1, "small", "first"), Point(1, 2, "small", "second")]
    drawn = chart("curve", line, x_title="epoch", y_title="loss", lines=[("curve", line)])
    named = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert named == {"soft", "rule", "accent"}
    style = (ROOT / "groupify" / "reporting" / "templates" / "base.html.j2").read_text("utf-8")
    assert all(f"--{name}:" in style for name in {"page", "ink", "pale", "other"} | named)
    assert not re.search(r"#0\d0\d0\d|font|<style|http", drawn)
    assert drawn == chart("curve", line, x_title="epoch", y_title="loss", lines=[("curve", line)])


def test_labels_are_text_whatever_they_say() -> None:
    names = ["$a^b$", "漢字", "<b>&", "two\nlines", "label-mark-0"]
    points = [Point(x, x, "other", name, name) for x, name in enumerate(names)]
    drawn = chart("names", points, x_title="", y_title="")
    assert re.findall(r"<title>([^<]*)</title>", drawn)[::-1] == [
        "$a^b$", "漢字", "&lt;b&gt;&amp;", "two lines", "label-mark-0"
    ]  # fmt: skip
    assert {"$a^b$", "漢字", "&lt;b&gt;&amp;"} <= set(re.findall(r">([^<]*)</text>", drawn))


def test_names_from_outside_cannot_write_the_page() -> None:
    evil = "<script>alert(1)</script>"
    sites = (replace(FULL.sites[0], name=evil, reason=evil), *FULL.sites[1:])
    run = run_of(evil, model=evil, command=evil, notes=(evil,), sites=sites)
    for page in (report_page(run, [run]), comparison_page([run, run])):
        assert "<script>alert" not in page
        assert "&lt;script&gt;" in page
    text = markdown([run, run])
    assert "<script>" not in text.replace("\\<script\\>", "")


@pytest.mark.parametrize(
    "report", [REPORT, replace(FULL, sites=(), fits=(), pictures=(), latency_ms=None, machine=None)]
)
def test_page_of_a_report_with_little_in_it(report: Any) -> None:
    page = report_page(Run("out", report))
    assert "What clustering did" not in page
    assert "None" not in page


def test_page_has_the_int8_file() -> None:
    page = report_page(run_of())
    assert "17.6 KiB, top-1 92.00%, 20.00 ms, 7.30× faster than the dense float file" in page
    assert "<title>int8: 20.00 ms, 92.00%</title>" in page
    assert "Int8 file" not in report_page(run_of(int8=None))


def test_notes_come_below_the_numbers_and_only_a_busy_machine_above() -> None:
    page = report_page(run_of(notes=("planned for macs=40%",), latency_ms=BUSY))
    busy, tiles, note = (
        page.index(text) for text in ("was busy", '<dl class="tiles">', "Planned for macs=40%.")
    )
    assert busy < tiles < note


def test_plane_has_uniform_groups() -> None:
    page = report_page(run_of())
    assert "<title>uniform g=2, untrained: 80.00 ms, 93.00%</title>" in page
    assert ">uniform g=8</text>" in page
    assert "--uniform 2,4,8" not in page
    alone = report_page(run_of(uniform=()))
    assert "uniform g=" not in alone
    assert "convert with <code>--uniform 2,4,8</code>" in alone


def test_markdown_for_a_pull_request() -> None:
    text = markdown([float32_run()])
    assert text.startswith(
        "**resnet18: 3.1× faster, 2.0× smaller, 1.1 points less accurate**\n\n| | dense |"
    ) or ("|  | dense | grouped | change |" in text)
    assert "| top-1 | 93.65% | 92.50% | −1.15 points |" in text
    assert "| latency (2 threads, batch 8) | 145.78 ms | 47.17 ms | 3.10× |" in text
    assert "<details><summary>2 of 3 convolutions converted</summary>" in text
    assert "| site | groups | params | MACs | reason |\n| --- | ---: | ---: | ---: | --- |" in text
    assert "| layer.conv | 4 + shuffle | 24.6k → 6.14k | 38.5M → 9.63M |  |" in text


# the command -----------------------------------------------------------------------------------


def test_convert_writes_both_and_report_reads_them(run: Command, tmp_path: Path) -> None:
    options = (
        "--input-size",
        "3,8,8",
        "--min-group-width",
        1,
        "--data",
        "tests.cli_nets:data",
        "--epochs",
        1,
    )
    assert run("convert", "tests.cli_nets:net", "--groups", 2, "-o", "first", *options).code == 0
    document = json.loads((tmp_path / "first" / "report.json").read_text("utf-8"))
    validate(document)
    assert document["command"].startswith("groupify convert tests.cli_nets:net --groups 2 -o first")
    assert document["site_milliseconds"].keys() == {"0", "2", "5"}
    assert all(time["grouped"] > 0 for time in document["site_milliseconds"].values())
    page = (tmp_path / "first" / "report.html").read_text("utf-8")
    assert "<h1>" in page

    shown = run("report", "first", "--format", "json")
    assert (shown.code, json.loads(shown.out)) == (0, document)
    (tmp_path / "first" / "report.html").unlink()
    assert run("report", "first").out == f"wrote {Path('first') / 'report.html'}\n"
    assert (tmp_path / "first" / "report.html").read_text("utf-8") == page

    written(tmp_path / "second", document)
    assert run("report", "first", "second").out == "wrote comparison.html\n"
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text("utf-8")
    table = run("report", "first", "second", "--format", "text").out
    assert [line.split()[0] for line in table.splitlines() if line[:3] in ("fir", "sec")].count("first") == 1
    assert "\x1b" not in table
    assert len(json.loads(run("report", "first", "second", "--format", "json").out)) == 2
    assert run("report", "first", "--format", "md", "-o", "pr.md").code == 0
    assert (tmp_path / "pr.md").read_text("utf-8") == run("report", "first", "--format", "md").out


@pytest.mark.slow
def test_uniform_groups_are_measured_for_comparison(run: Command, tmp_path: Path) -> None:
    options = ("--input-size", "3,8,8", "--min-group-width", 1, "--data", "tests.cli_nets:data")
    made = run("convert", "tests.cli_nets:net", "--groups", 2, "-o", "out", *options, "--uniform", "2,4,8,4")
    assert made.code == 0
    document = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    validate(document)
    # Two groups are the run itself; nothing is measured twice.
    assert [rival["groups"] for rival in document["uniform"]] == [4, 8]
    assert document["uniform"][1]["macs"] < document["uniform"][0]["macs"] < document["macs"]["grouped"]
    assert all(rival["milliseconds"] > 0 for rival in document["uniform"])
    assert f"uniform groups, untrained: g=4 {100 * document['uniform'][0]['top1']:.2f}% in" in made.out
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()).count(".onnx") == 1
    alone = run("convert", "tests.cli_nets:net", "--groups", 4, "-o", "alone", *options)
    again = json.loads((tmp_path / "alone" / "report.json").read_text("utf-8"))
    assert alone.code == 0
    assert again["accuracy"]["converted"] == document["uniform"][0]["top1"]
    assert again["params"]["grouped"] == document["uniform"][0]["params"]


def test_uniform_groups_need_labels(run: Command, tmp_path: Path) -> None:
    refused = run("convert", "tests.cli_nets:net", "--input-size", "3,8,8", "--uniform", "2", "-o", "out")
    assert (refused.code, list(tmp_path.iterdir())) == (2, [])
    assert "--uniform compares accuracies: give --data with labels and a test part" in refused.err
    assert "--uniform 'x': expected whole numbers" in run("convert", "demo", "--uniform", "x").err


def test_report_refuses_in_one_line(run: Command) -> None:
    missing = run("report", "nowhere")
    assert (missing.code, missing.out) == (2, "")
    assert missing.err.startswith("groupify: error: no report.json in nowhere")
    assert missing.err.count("\n") == 1
    assert run("report").code == 2


def test_no_color_is_respected(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "out", FULL.values())
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    shown = run("report", "out", "--format", "text").out
    assert "top-1" in shown
    assert not re.search(r"\x1b\[[\d;]*[34]\d", shown)  # bold is no colour


def test_shell_completion() -> None:
    environment = {"_GROUPIFY_COMPLETE": "bash_complete", "COMP_WORDS": "groupify re", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['groupify']; from groupify.cli.main import main; main()"
    completed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        check=False,
    )
    assert completed.stdout.decode().splitlines() == ["plain,report"]


# in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@needs_chromium
@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_pages_open_without_errors_or_requests(page: Page, kind: str, tmp_path: Path) -> None:
    runs = [run_of("a run"), run_of("another", latency_ms=None)]
    file = tmp_path / "page.html"
    file.write_text(report_page(runs[0], runs[1:]) if kind == "report" else comparison_page(runs), "utf-8")
    for width, dark in ((1200, False), (1200, True), (390, False)):
        page.open(file.as_uri(), width=width, dark=dark)
        assert page.problems == []
        assert page.requests == [file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(tmp_path / f"{width}-{dark}.png")
        picture = Image.open(tmp_path / f"{width}-{dark}.png").convert("L")
        assert (picture.getpixel((2, 2)) < 64) == dark  # type: ignore[operator]
    assert page.print_pdf().startswith(b"%PDF")


OVERLAPS = """(() => {
  const texts = [...document.querySelectorAll("svg text")].map((it) => [it, it.getBoundingClientRect()]);
  return texts.flatMap(([text, a], i) => texts.slice(i + 1)
    .filter(([, b]) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
    .map(([other]) => `${text.textContent} and ${other.textContent}`));
})()"""
PAPER = 688  # what A4 leaves between the margins, in CSS pixels


@needs_chromium
@pytest.mark.parametrize(
    ("width", "printed"), [(1200, False), (390, False), (PAPER, True)], ids=["wide", "narrow", "printed"]
)
def test_texts_in_charts_stay_apart_and_inside(page: Page, width: int, printed: bool, tmp_path: Path) -> None:
    runs = [
        run_of(
            f"a run with {'a very ' * number}long name",
            latency_ms=LatencyChange(145.78, 47.17 * (1 + 0.3 * number), 3.1, threads=2, batch_size=8),
        )
        for number in range(4)
    ]
    file = tmp_path / "page.html"
    for text in (report_page(runs[0], runs[1:]), comparison_page(runs)):
        file.write_text(text, "utf-8")
        page.open(file.as_uri(), width=width, printed=printed)
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_chromium
def test_printed_page_is_dark_on_white_without_what_only_a_screen_can_do(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(report_page(run_of()), "utf-8")
    page.open(file.as_uri(), width=PAPER, dark=True, printed=True)
    style = "getComputedStyle(document.body)"
    assert page.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(f"{style}.color") == "rgb(0, 0, 0)"
    assert "click" not in page.evaluate("document.body.innerText")
    tops = "[...document.querySelectorAll('.tiles div')].map(tile => tile.offsetTop)"
    assert len(set(page.evaluate(tops))) == 1
    assert page.evaluate("document.querySelector('#sites').getBoundingClientRect().right") <= PAPER
    # Chromium repeats the head of a table on every page only if its buttons have no boxes.
    assert page.evaluate("getComputedStyle(document.querySelector('#sites button')).display") == "contents"


@needs_chromium
def test_a_click_sorts(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(report_page(run_of()), "utf-8")
    page.open(file.as_uri())

    def click(title: str) -> tuple[list[str], str]:
        buttons = "[...document.querySelectorAll('#sites th button')]"
        page.evaluate(f"{buttons}.find(button => button.textContent === {title!r}).click()")
        names = page.evaluate("[...document.querySelectorAll('#sites tbody .name')].map(c => c.textContent)")
        return names, page.evaluate("document.querySelector('#sites th[aria-sort]').ariaSort")

    assert click("params") == (["stem", "layer.conv", "last"], "descending")
    assert click("params") == (["last", "layer.conv", "stem"], "ascending")
    assert click("site") == (["last", "layer.conv", "stem"], "ascending")
    # The stem has no fitted error: it stays below whichever way the others go.
    assert click("outputs missed") == (["last", "layer.conv", "stem"], "descending")
    assert click("outputs missed") == (["layer.conv", "last", "stem"], "ascending")
    assert page.problems == []


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(Report.schema(), indent=2, ensure_ascii=False) + "\n", "utf-8")
