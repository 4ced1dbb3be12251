"""The documentation's examples run, and its pages are complete."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import groupify
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
OPTIONS = doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    # A fence is no part of the expected output.
    text = re.sub(r"^```.*$", "", page.read_text("utf-8"), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    torch.manual_seed(0)
    assert doctest.DocTestRunner(optionflags=OPTIONS).run(test).failed == 0


def _documented() -> list[Any]:
    public = [getattr(groupify, name) for name in groupify.__all__]
    return [thing for thing in public if ">>>" in (thing.__doc__ or "")]


def test_the_main_functions_have_examples() -> None:
    names = {thing.__name__ for thing in _documented()}
    assert names >= {"plan", "convert", "evaluate", "calibration_images"}


@pytest.mark.parametrize("thing", _documented(), ids=lambda thing: thing.__name__)
def test_examples_of_a_docstring(thing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"groupify": groupify, "torch": torch}
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    tests = doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, globs=names)
    assert sum(len(test.examples) for test in tests) > 0
    for test in tests:
        assert runner.run(test).failed == 0


def test_the_api_page_names_the_public_names_and_nothing_else() -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    named = re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)$", page, flags=re.MULTILINE)
    homes = [path.rpartition(".") for path in named if path != "groupify.__version__"]
    found = [getattr(importlib.import_module(module), name) for module, _, name in homes]
    public = [getattr(groupify, name) for name in groupify.__all__ if name != "__version__"]
    assert sorted(map(repr, found)) == sorted(map(repr, public))
    assert "groupify.__version__" in named
