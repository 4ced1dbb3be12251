from __future__ import annotations

import importlib.util
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

NAMES = ("method", "groups", "accuracy_mean", "accuracy_spread", "macs_ratio")
ROWS = [
    dict(zip(NAMES, values, strict=True))
    for values in (
        ("groupify, reconstruction", 4, 92.5, 0.1, 3.7),
        ("groupify, reconstruction", 2, 93.25, 0.1, 1.9),
        ("truncation + refresh", 2, 80.0, 0.0, 1.9),
        ("a detail of the table", 2, 85.0, 0.0, 1.9),
    )
]
DOCUMENT = {"machine": {}, "versions": {}, "rows": ROWS, "dense_accuracy": 93.64}


@pytest.fixture(scope="module")
def plot_readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "plot_readme", ROOT / "scripts" / "benchmarks" / "pictures.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows(plot_readme: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "accuracy.json"
    source.write_text(json.dumps(DOCUMENT))
    by_method, dense, key = plot_readme.read_rows(source)
    assert (list(by_method), dense, key) == (
        ["truncation + refresh", "groupify, reconstruction"], 93.64, "macs_ratio",
    )  # fmt: skip
    assert [row["groups"] for row in by_method["groupify, reconstruction"]] == [2, 4]
    source.write_text(json.dumps({**DOCUMENT, "rows": [{**row, "speed_up": 2.0} for row in ROWS]}))
    assert plot_readme.read_rows(source)[2] == "speed_up"
    source.write_text(json.dumps({**DOCUMENT, "rows": ROWS[3:]}))
    assert list(plot_readme.read_rows(source)[0]) == ["a detail of the table"]


def test_the_picture(plot_readme: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "accuracy.json"
    source.write_text(json.dumps(DOCUMENT))
    first, second = tmp_path / "docs" / "a.svg", tmp_path / "b.svg"
    plot_readme.draw(source, first)
    plot_readme.draw(source, second)
    assert first.read_bytes() == second.read_bytes()
    text = "".join(ElementTree.parse(first).getroot().itertext())
    for words in ("dense 93.64%", *plot_readme.read_rows(source)[0], "MACs: dense ÷ converted"):
        assert words in text
    assert [path.name for path in first.parent.iterdir()] == ["a.svg"]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rows": [], "dense_accuracy": 1}', '{"rows": [{"groups": 2}]}']
)
def test_bad_results(
    content: str, plot_readme: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "bad.json"
    source.write_text(content)
    monkeypatch.setattr(sys, "argv", ["plot_readme", str(source), "-o", str(tmp_path / "out.svg")])
    with pytest.raises(SystemExit, match=r"plot_readme: .*bad\.json: "):
        plot_readme.main()
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]
