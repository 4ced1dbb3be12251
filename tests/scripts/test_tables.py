"""The tables of README and documentation come from the result files."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import (
    conversion,
    craft,
    efficiency,
    int8,
    latency,
    narrow_groups,
    peers_latency,
    planner,
    prediction,
    ranking,
    recovery,
    rivals,
    tables,
    whole_way,
)
from scripts.benchmarks.contest import KEYS, Row
from scripts.benchmarks.harness import Results
from scripts.benchmarks.zoo import LIBRARIES
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_the_numbers_of_the_readme_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    text = tables.README.read_text("utf-8")
    assert tables.fill(text) == text
    results = copy.deepcopy(tables.read("peers"))
    row = next(row for row in results["rows"] if row["method"] == "groupify")
    row["accuracy_mean"] = 12.3
    monkeypatch.setattr(tables, "read", lambda name: results)
    part = text[text.index("<!-- results: peers -->") : text.index("<!-- results: latency -->")]
    assert "12.3 / " in tables.fill(part)


def test_tables_come_from_the_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {name for page in PAGES for name in re.findall(r"<!-- table: (\S+) -->", page.read_text("utf-8"))}
    assert asked <= set(tables.TABLES)
    for name in asked:
        text = tables.table(name)
        if not (ROOT / "benchmarks" / f"{name}.json").exists():
            assert text.startswith("*Not measured yet")
            continue
        lines = text.splitlines()
        rows = lines[: lines.index("")]
        assert len(rows) > 2
        assert len({line.count("|") for line in rows}) == 1
        assert f"benchmarks/{name}.json" in lines[-1]
    monkeypatch.setattr(tables, "BENCHMARKS", tmp_path)
    assert tables.fill_page("a <!-- table: peers --> b").startswith("a *Not measured yet")
    with pytest.raises(KeyError):
        tables.fill_page("<!-- table: nothing -->")


def test_table_of_the_recovery() -> None:
    row = {
        "method": "groupify", "size": 6.9, "epochs": 0.0, "seed": 0, "top1": 93.0, "drop": 0.5,
        "macs_ratio": 6.95,
    }  # fmt: skip
    trained = {**row, "epochs": 1.0, "top1": 93.2, "drop": 0.3}
    second = {**trained, "seed": 1, "top1": 93.1, "drop": 0.4}
    rows = [row, {**row, "seed": 1}, trained, second, {**row, "method": "Tucker-2"}]
    assert tables.recovery({"rows": rows}) == [
        ("MACs wanted", "method", "MACs", "0 epochs (drop)", "1 epochs (drop)", "seeds",
         "least gain over its start"),
        ("÷6.9", "groupify", "÷6.95", "93.00% ± 0.00 (0.50)", "93.15% ± 0.05 (0.35)", "2", "+0.10"),
        ("÷6.9", "Tucker-2", "÷6.95", "93.00% (0.50)", "–", "1", "–"),
    ]  # fmt: skip


def test_table_of_the_planner() -> None:
    row = {
        "model": "groupify.models.demo:fashion_vgg11_bn", "row": "macs g=8", "dense_accuracy": 93.0,
        "uniform_accuracy": 89.0, "planned_accuracy": 91.0, "speed_up": None,
    }  # fmt: skip
    rows = [row, {**row, "planned_accuracy": 92.0, "speed_up": {"uniform": 8.0, "planned": 8.5}}]
    assert tables.planner({"rows": rows})[1:] == [
        ("fashion_vgg11_bn, macs g=8", "2", "93.00%", "89.00%", "91.50%", "62%", "8.00× → 8.50×")
    ]


def test_table_of_int8() -> None:
    row = {
        "name": "resnet18, 2×", "mac_ratio": 5.0,
        "latency": {"1": {"dense int8": 4.0, "planned int8": 1.6, "dense float32": 12.0, "speed_up": 2.5}},
        "top1": {"dense int8": 0.937, "planned int8": 0.931}, "peak_memory_bytes": {"dense int8": 2**27,
        "planned int8": 2**26}, "file_bytes": {"dense int8": 2**24, "planned int8": 2**22},
    }  # fmt: skip
    assert tables.int8({"rows": [row, {**row, "top1": None}]}) == [
        ("planned for int8", "MACs", "ms, 1 thr.", "over dense int8, 1 thr.", "top-1", "drop", "peak memory",
         "file"),
        ("resnet18, 2×", "÷5.00", "4.0 → 1.6 ms", "2.50×", "93.70% → 93.10%", "0.60", "128.0 → 64.0 MiB",
         "16.0 → 4.0 MiB"),
        ("resnet18, 2×", "÷5.00", "4.0 → 1.6 ms", "2.50×", "–", "–", "128.0 → 64.0 MiB", "16.0 → 4.0 MiB"),
    ]  # fmt: skip


def test_table_of_the_best_structures() -> None:
    rows = [
        {
            "net": "fashion_resnet18",
            "method": method,
            "size": size,
            "top1": top1 + seed,
            "divergence": 0.01,
            "macs_ratio": 6.0 if (method, size) == ("Tucker-2", 6.9) else size,
        }
        for size in (2.0, 6.9)
        for method, top1 in (("groupify", 93.0), ("spatial SVD", 92.0), ("Tucker-2", 91.0), ("other", 90.0))
        for seed in (0, 1)
    ]
    other = {"net": "fashion_vgg11_bn", "method": "groupify", "size": 2.0, "top1": 1.0, "divergence": 9.0}
    assert tables.best_structures({"rows": [*rows, other]}) == [
        ("top-1, KL to the dense net", "MACs ÷2.0", "MACs ÷6.9"),
        ("groupify", "93.50%, 0.0100", "93.50%, 0.0100"),
        ("spatial SVD", "92.50%, 0.0100", "92.50%, 0.0100"),
        ("Tucker-2", "91.50%, 0.0100", "91.50%, 0.0100 (÷6.00)"),
    ]


def test_table_of_the_efficiency() -> None:
    row = {
        "model": "resnet18", "budget": "macs=25%", "mac_ratio": 4.0,
        "latency": {"1": {"dense": 20.0, "planned": 5.5, "speed_up": 3.6}},
        "kernels": {"Conv": 0.95, "ReorderInput": 0.04, "Add": 0.01},
    }  # fmt: skip
    assert tables.efficiency({"rows": [row]}) == [
        ("", "planned for", "MACs", "ms, 1 thr.", "speed-up ÷ MAC ratio, 1 thr.", "time of its kernels"),
        ("resnet18", "macs=25%", "÷4.00", "20.0 → 5.5 ms", "0.90", "Conv 95%, ReorderInput 4%"),
    ]


def test_table_of_the_peers_latency() -> None:
    row = {
        "model": "groupify.models.demo:fashion_vgg11_bn", "side": 112, "method": "truncation", "groups": 4,
        "top1": 92.0, "dense_top1": 93.0, "macs_ratio": 3.7, "params_ratio": 3.8, "latency": {},
    }  # fmt: skip
    timed = {**row, "latency": {"1": {"dense_ms": 20.0, "ms": 5.0, "speed_up": 4.1}}}
    assert tables.peers_latency({"rows": [row, timed]}) == [
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
    assert tables.peers({"rows": [row, trained]}) == [
        ("", "MACs", "params", "0 epochs", "1 epochs", "speed-up, 1 thr."),
        ("groupify", "÷3.70", "÷3.80", "92.00%", "93.00%", "4.00×"),
    ]


FILES: dict[str, Results[Any]] = {
    "conversion": Results(conversion.Round, ("number",), under="rounds"),
    "craft": Results(craft.Row, craft.KEYS),
    "efficiency": Results(efficiency.Row, efficiency.KEYS),
    "latency": Results(latency.Row, ("name",)),
    **{f"models_{library}": Results(whole_way.Row, ("name",)) for library in LIBRARIES},
    "int8": Results(int8.Row, ("name",)),
    "narrow_groups": Results(narrow_groups.Row, ("kernel", "channels", "side")),
    "peers_latency": Results(peers_latency.Row, peers_latency.KEYS),
    "planner": Results(planner.Row, planner.KEYS),
    "prediction": Results(prediction.Row, prediction.KEYS),
    "ranking": Results(ranking.Row, ranking.KEYS),
    "recovery": Results(recovery.Row, recovery.KEYS),
    "rivals": Results(rivals.Row, rivals.KEYS),
}


@pytest.mark.parametrize("path", sorted(tables.BENCHMARKS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_file_is_read(path: Path) -> None:
    """Whatever version of an experiment wrote it: a later run goes on with it."""
    document = json.loads(path.read_text("utf-8"))
    results: Results[Any] = replace(FILES.get(path.stem, Results(Row, KEYS)), path=path)
    rows = results.rows
    assert len(rows) == len(document[results.under]) > 0
    for values, row in zip(document[results.under], rows.values(), strict=True):
        written = asdict(row)
        assert {name: written[name] for name in values} == values
