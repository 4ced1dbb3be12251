from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from scripts.benchmarks.pictures import draw, main, read_panels

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


def test_rows(tmp_path: Path) -> None:
    source = tmp_path / "accuracy.json"
    source.write_text(json.dumps(DOCUMENT))
    (panel,) = read_panels(source)
    assert (list(panel.rows), panel.dense, panel.key) == (
        ["truncation + refresh", "groupify, reconstruction"], 93.64, "macs_ratio",
    )  # fmt: skip
    assert [row["groups"] for row in panel.rows["groupify, reconstruction"]] == [2, 4]
    source.write_text(json.dumps({**DOCUMENT, "rows": [{**row, "speed_up": 2.0} for row in ROWS]}))
    assert read_panels(source)[0].key == "speed_up"
    source.write_text(json.dumps({**DOCUMENT, "rows": ROWS[3:]}))
    assert list(read_panels(source)[0].rows) == ["a detail of the table"]


def test_the_picture(tmp_path: Path) -> None:
    source = tmp_path / "accuracy.json"
    source.write_text(json.dumps(DOCUMENT))
    first, second = tmp_path / "docs" / "a.svg", tmp_path / "b.svg"
    draw(source, first)
    draw(source, second)
    assert first.read_bytes() == second.read_bytes()
    text = "".join(ElementTree.parse(first).getroot().itertext())
    for words in ("dense 93.64%", *read_panels(source)[0].rows, "MACs: dense ÷ converted"):
        assert words in text
    assert [path.name for path in first.parent.iterdir()] == ["a.svg"]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rows": [], "dense_accuracy": 1}', '{"rows": [{"groups": 2}]}']
)
def test_bad_results(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "bad.json"
    source.write_text(content)
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(source), "-o", str(tmp_path / "out.svg")])
    with pytest.raises(SystemExit, match=r"pictures: .*bad\.json: "):
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_picture_has_a_panel_per_training(tmp_path: Path) -> None:
    rows = [
        {**ROWS[0], "method": method, "groups": groups, "macs_ratio": ratio, "epochs": epochs}
        for method, groups, ratio in (("groupify", 2, 1.9), ("groupify", 4, 3.7), ("truncation", 4, 3.7))
        for epochs in (0.0, 1.0)
    ]
    source = tmp_path / "peers.json"
    source.write_text(json.dumps({"dense_accuracy": 93.5, "rows": rows[:-1]}))
    draw(source, tmp_path / "peers.svg")
    picture = (tmp_path / "peers.svg").read_text("utf-8")
    for text in ("no training", "1 epoch", "groupify", "truncation", "dense 93.50%"):
        assert picture.count(f">{text}<") == 1


def test_picture_has_a_panel_per_net(tmp_path: Path) -> None:
    row = {"side": 112, "groups": 4, "top1": 92.0, "macs_ratio": 3.7, "latency": {"1": {"speed_up": 3.4}}}
    rows = [
        {**row, "model": model, "dense_top1": dense, "method": name}
        for model, dense in (("nets:one", 93.5), ("nets:two", 91.5))
        for name in ("groupify", "truncation")
    ]
    source = tmp_path / "latency.json"
    source.write_text(json.dumps({"rows": rows}))
    draw(source, tmp_path / "latency.svg")
    picture = (tmp_path / "latency.svg").read_text("utf-8")
    for text in ("one, 112×112", "dense 93.50%", "dense 91.50%", "dense", "truncation"):
        assert picture.count(f">{text}<") == 1
