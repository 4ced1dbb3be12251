"""The benchmark on ImageNet: a quick run of every line, and how images are divided."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from groupify.models.sources import load_model
from scripts.benchmarks import imagenet
from scripts.benchmarks.imagenet import (
    PUBLISHED,
    QUICK_CLASSES,
    QUICK_IMAGES,
    QUICK_SIDE,
    QUICK_SIZE,
    make_images,
    split,
)

ALL = QUICK_CLASSES * QUICK_IMAGES


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["imagenet", *arguments])
    imagenet.main()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::groupify.errors.GroupifyWarning")
def test_a_quick_run_has_a_row_of_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "imagenet.json"
    run(monkeypatch, "--quick", "--json", str(file))
    rows = json.loads(file.read_text("utf-8"))["rows"]
    assert [(row["net"], row["method"], row["size"]) for row in rows] == [
        ("resnet18", method, QUICK_SIZE) for method in ("groupify", "spatial SVD", "Tucker-2")
    ]
    assert all(row["macs_ratio"] == pytest.approx(QUICK_SIZE, rel=0.05) for row in rows)
    out = capsys.readouterr().out
    # Beside them, what others published.
    for one in PUBLISHED:
        assert f"| {one.net} | {one.saved:.0f}% | {one.method} | {one.drop:.2f} | {one.source} |" in out
    assert "| measured here |" in out


def test_no_image_is_both_fitted_and_measured(tmp_path: Path) -> None:
    folder = make_images(tmp_path)
    source = load_model("resnet18", weights="none", input_shape=(3, QUICK_SIDE, QUICK_SIDE))
    fit, test = split(source, folder, 21)
    assert (len(fit), len(test)) == (21, (ALL - 21) // 8 * 8)  # type: ignore[arg-type]
    assert not set(fit.indices) & set(test.indices)  # type: ignore[union-attr]
    shutil.copytree(folder / "val", folder / "train")
    fit, test = split(source, folder, 21)
    assert (len(fit), len(test)) == (ALL, ALL)  # type: ignore[arg-type]


def test_images_are_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch)
    assert "--images is missing: a folder with val" in capsys.readouterr().err
