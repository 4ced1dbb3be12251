"""The documentation's examples run, and its tables come from the result files."""

from __future__ import annotations

import copy
import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import groupify
from scripts.benchmarks import docs_tables
from scripts.benchmarks import tables as readme_tables
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
OPTIONS = doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_a_page(page: Path) -> None:
    # A fence is no part of the expected output.
    text = re.sub(r"^```.*$", "", page.read_text("utf-8"), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    torch.manual_seed(0)
    assert doctest.DocTestRunner(optionflags=OPTIONS).run(test).failed == 0


def test_the_numbers_of_the_readme_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    text = readme_tables.README.read_text("utf-8")
    assert readme_tables.fill(text) == text
    results = copy.deepcopy(readme_tables.results("peers"))
    row = next(row for row in results["rows"] if row["method"] == "groupify")
    row["accuracy_mean"] = 12.3
    monkeypatch.setattr(readme_tables, "results", lambda name: results)
    part = text[: text.index("<!-- results: latency -->")]
    assert "12.3 / " in readme_tables.fill(part)


def _documented() -> list[Any]:
    public = [getattr(groupify, name) for name in groupify.__all__]
    return [thing for thing in public if ">>>" in (thing.__doc__ or "")]


def test_the_main_functions_have_examples() -> None:
    names = {thing.__name__ for thing in _documented()}
    assert names >= {"plan", "convert", "evaluate", "calibration_images", "blocked_width"}


@pytest.mark.parametrize("thing", _documented(), ids=lambda thing: thing.__name__)
def test_examples_of_a_docstring(thing: Any) -> None:
    torch.manual_seed(0)
    names = {"groupify": groupify, "torch": torch}
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    tests = doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, globs=names)
    assert sum(len(test.examples) for test in tests) > 0
    for test in tests:
        assert runner.run(test).failed == 0


def test_the_api_page_names_every_public_function() -> None:
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), flags=re.MULTILINE)
    homes = [path.rpartition(".") for path in named if path != "groupify.errors"]
    found = [getattr(importlib.import_module(module), name) for module, _, name in homes]
    found += [groupify.GroupifyError, groupify.GroupifyWarning]
    missing = {name for name in groupify.__all__ if getattr(groupify, name) not in found}
    # What load_data returns is described where it is made.
    assert missing <= {"DataSplits"}


def test_tables_come_from_the_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {name for page in PAGES for name in re.findall(r"<!-- table: (\S+) -->", page.read_text("utf-8"))}
    assert asked == set(docs_tables.TABLES)
    for name in asked:
        text = docs_tables.table(name)
        if not (ROOT / "benchmarks" / f"{name}.json").exists():
            assert text.startswith("*Not measured yet")
            continue
        lines = text.splitlines()
        rows = lines[: lines.index("")]
        assert len(rows) > 2
        assert len({line.count("|") for line in rows}) == 1
        assert f"benchmarks/{name}.json" in lines[-1]
    monkeypatch.setattr(docs_tables, "BENCHMARKS", tmp_path)
    assert docs_tables.on_page_markdown("a <!-- table: peers --> b").startswith("a *Not measured yet")
    with pytest.raises(KeyError):
        docs_tables.on_page_markdown("<!-- table: nothing -->")


def test_table_of_the_recovery() -> None:
    row = {
        "method": "groupify", "groups": 4, "epochs": 0.0, "accuracy": {"0": 92.0}, "accuracy_mean": 92.0,
        "accuracy_spread": 0.0, "macs_ratio": 3.7,
    }  # fmt: skip
    trained = {**row, "epochs": 1.0, "accuracy": {"0": 93.0, "1": 93.5}, "accuracy_spread": 0.5}
    assert docs_tables.recovery({"rows": [row, {**trained, "accuracy_mean": 93.25}]}) == [
        ("top-1", "MACs", "0 epochs", "1 epochs"),
        ("groupify, g=4", "÷3.70", "92.00%", "93.25 ± 0.25%"),
    ]


def test_table_of_the_planner() -> None:
    row = {
        "model": "groupify.models.demo:fashion_vgg11_bn", "row": "macs g=8", "dense_accuracy": 93.0,
        "uniform_accuracy": 89.0, "planned_accuracy": 91.0, "speed_up": None,
    }  # fmt: skip
    rows = [row, {**row, "planned_accuracy": 92.0, "speed_up": {"uniform": 8.0, "planned": 8.5}}]
    assert docs_tables.planner({"rows": rows})[1:] == [
        ("fashion_vgg11_bn, macs g=8", "2", "93.00%", "89.00%", "91.50%", "62%", "8.00× → 8.50×")
    ]


def test_table_of_the_peers_latency() -> None:
    row = {
        "model": "groupify.models.demo:fashion_vgg11_bn", "side": 112, "method": "truncation", "groups": 4,
        "top1": 92.0, "dense_top1": 93.0, "macs_ratio": 3.7, "params_ratio": 3.8, "latency": {},
    }  # fmt: skip
    timed = {**row, "latency": {"1": {"dense_ms": 20.0, "ms": 5.0, "speed_up": 4.1}}}
    assert docs_tables.peers_latency({"rows": [row, timed]}) == [
        ("", "top-1", "MACs", "params", "dense → own, 1 thr.", "speed-up, 1 thr."),
        ("fashion_vgg11_bn, truncation", "92.00%", "÷3.70", "÷3.80", "–", "–"),
        ("fashion_vgg11_bn, truncation", "92.00%", "÷3.70", "÷3.80", "20.0 → 5.0 ms", "4.10×"),
    ]


def test_table_of_the_peers() -> None:
    row = {
        "method": "groupify", "groups": 4, "epochs": 0.0, "accuracy_mean": 92.0, "macs_ratio": 3.7,
        "params_ratio": 3.8, "latency": {"1": {"dense_ms": 2.0, "ms": 0.5, "speed_up": 4.0}},
    }  # fmt: skip
    trained = {**row, "epochs": 1.0, "accuracy_mean": 93.0}
    assert docs_tables.peers({"rows": [row, trained]}) == [
        ("", "MACs", "params", "0 epochs", "1 epochs", "speed-up, 1 thr."),
        ("groupify", "÷3.70", "÷3.80", "92.00%", "93.00%", "4.00×"),
    ]
