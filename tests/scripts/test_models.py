"""What becomes of other people's models: the ways that one can end, and what is written of it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupify.errors import ConversionError, GroupifyError
from scripts.benchmarks import models, tables, whole_way
from scripts.benchmarks.whole_way import FAILED, NOT_SUPPORTED, NOTHING, OK, Row, take
from scripts.benchmarks.zoo import LIBRARIES, Entry, entries

HERE = "tests.scripts.test_models"
SHAPES = ((3, 1, 1), (3, 8, 8))


def net(middle: int = 32) -> nn.Module:
    """Two convs, the second of which can be grouped where the middle is wide enough."""
    return nn.Sequential(nn.Conv2d(3, middle, 3), nn.ReLU(), nn.Conv2d(middle, 32, 3), nn.Flatten())


class Faulty(nn.Module):
    """A net that fails by itself."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Raise."""
        raise RuntimeError("always\nfails")


def entry(factory: str, **arguments: Any) -> Entry:
    return Entry("one", "kind", f"{HERE}:{factory}", arguments, SHAPES)


def test_a_model_goes_as_far_as_asked_on_the_first_input_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(whole_way, "export", lambda model, shape: "dynamic")
    row = take(entry("net"), until="convert")
    assert (row.result, row.reason, row.input, row.batch) == (OK, None, [3, 8, 8], "dynamic")
    assert (row.converted, row.convs) == (1, 2)
    assert list(row.stages) == ["torch.export", "plan", "convert"]


def test_each_end_of_a_way_has_its_result_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_way, "export", lambda model, shape: "fixed")
    nothing = take(entry("net", middle=4))
    assert nothing.result == NOTHING
    assert "no convolution worth grouping" in str(nothing.reason)
    faulty = take(entry("Faulty"))
    assert (faulty.result, faulty.stages) == (FAILED, {})
    assert str(faulty.reason).endswith("always fails")
    refused = take(Entry("two", "flow", "raft_small", refusal="takes two images"))
    assert (refused.result, refused.reason) == (NOT_SUPPORTED, "takes two images")

    def refuse(*_: Any, **__: Any) -> None:
        raise ConversionError("not this one")

    monkeypatch.setattr(whole_way, "convert", refuse)
    refused = take(entry("net"))
    assert (refused.result, refused.reason) == (NOT_SUPPORTED, "convert: not this one")


def test_outputs_that_do_not_depend_on_the_input_prove_nothing() -> None:
    alike = [torch.tensor([1, 2]), torch.ones(3)]
    changed = whole_way.change(alike, alike)
    with pytest.raises(GroupifyError, match="proves nothing"):
        whole_way.check_telling(1e-7, changed)
    whole_way.check_telling(1e-7, whole_way.change(alike, [alike[0], torch.full((3,), 0.99)]))


def test_a_run_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []

    def run(self: models.Apart, entry: Entry) -> Row:
        ran.append(entry.name)
        return Row(entry.name, "kind", NOTHING, "a | b", [3, 8, 8])

    monkeypatch.setattr(models.Apart, "__call__", run)
    monkeypatch.setitem(LIBRARIES, "others", lambda: [Entry("a", "", ""), Entry("b", "", "")])
    for only in ("a", "*"):
        monkeypatch.setattr(sys, "argv", ["models", "others", "--only", only, "--folder", str(tmp_path)])
        models.main()
    assert ran == ["a", "b"]
    monkeypatch.setattr(tables, "BENCHMARKS", tmp_path)
    heading, _, *lines = tables.table("models_others").splitlines()[:4]
    assert "2 nothing to convert" in heading
    assert "a \\| b" in lines[0]
    assert {line.replace("\\|", "").count("|") for line in [heading, *lines]} == {10}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_models_of_a_library_have_names_of_their_own_and_inputs(library: str) -> None:
    found = entries(library)
    assert all(shape for entry in found.values() for shape in entry.shapes)
    if library == "torchvision":
        assert "raft_small" in found
        assert found["fasterrcnn_resnet50_fpn"].backbone


def test_a_row_tells_as_much_as_its_table_wants() -> None:
    row = Row("a", stages={"torch.export": 1.0, "plan": 1.0, "convert": 2.0}, batch="why not", convs=2)
    cells = tables.models({"rows": [asdict(row)]})[1]
    assert cells[-4:] == ("–", "1.0", "3.0", "")
