"""What plan and convert choose where neither --groups nor --budget is given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from groupify.pipeline.requests import PlanRequest
from groupify.planning.budget import Budget
from groupify.planning.group_counts import GroupCounts
from groupify.planning.rules import Rules
from groupify.structures import FAMILIES
from tests.cli_nets import INPUT_SIZE, net
from tests.conftest import Run
from tests.planning.test_like_groups import macs

NET = ("tests.cli_nets:net", "--input-size", INPUT_SIZE, "--weights", "none")
DATA = ("--data", "tests.cli_nets:data", "--calibrate", 48)
NOTE = "no --groups and no --budget: structures chosen for each conv at the MACs of 4 plain groups"


def macs_of_four_groups() -> int:
    grouped = net()
    for name in ("2", "5"):
        conv: Any = grouped.get_submodule(name)
        conv.weight.data, conv.groups = conv.weight.data[:, : conv.in_channels // 4], 4
    return macs(grouped.eval())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPIFY_CACHE", str(tmp_path / "cache"))


def test_convert_chooses_structures_and_says_so(run: Run, tmp_path: Path) -> None:
    outcome = run("convert", *NET, *DATA)
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "net-auto" / "report.json").read_text("utf-8"))
    assert report["macs"]["grouped"] <= macs_of_four_groups() < report["macs"]["dense"]
    for start in (NOTE, "planned for the MACs of 4 plain groups: macs "):
        assert sum(note.startswith(start) for note in report["notes"]) == 1
    assert outcome.out.count(f"note: {NOTE}\n") == 1


def test_plan_does_the_same(run: Run) -> None:
    text = run("plan", *NET)
    assert (text.code, text.err) == (0, "")
    assert text.out.count(f"{NOTE}\n") == 1
    assert "\nplanned for the MACs of 4 plain groups: macs " in text.out
    document = json.loads(run("plan", *NET, "--json").out)
    assert document["notes"] == [NOTE]
    assert document["budget"] == [f"macs={macs_of_four_groups()}"]
    assert document["contenders"][0]["costs"]["macs"] <= macs_of_four_groups()


def test_what_was_asked_for_is_not_told_again(run: Run) -> None:
    for options in (("--groups", 4), ("--groups", "4,5=8", "--structure", "auto"), ("--budget", "macs=60%")):
        outcome = run("plan", *NET, *options)
        assert outcome.code == 0, outcome.err
        assert "no --groups" not in outcome.out
    for family, said in (
        ("block-term", "block-term structures chosen for each conv at the MACs of 4 plain groups"),
        ("grouped-pointwise", "4 groups in each conv"),
    ):
        outcome = run("plan", *NET, "--min-group-width", 1, "--structure", family)
        assert f"no --groups and no --budget: {said}\n" in outcome.out, outcome.err


@pytest.mark.parametrize(
    "options", [(), ("--structure", "block-term"), ("--groups", 4, "--structure", "auto")]
)
def test_a_frontier_of_each_plan_that_is_chosen(
    options: tuple[object, ...], run: Run, tmp_path: Path
) -> None:
    outcome = run("plan", *NET, *options, "--frontier", "--frontier-plot", "f.svg")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("← asked budget") == 1
    assert (tmp_path / "f.svg").is_file()


def test_a_measured_frontier_needs_images(run: Run) -> None:
    refused = run("plan", *NET, "--frontier", "measured")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "a measured frontier needs images; give --data" in refused.err


@pytest.mark.parametrize("verb", ["plan", "convert"])
def test_a_net_that_four_groups_do_not_divide(verb: str, run: Run, tmp_path: Path) -> None:
    odd = (*NET, "--model-args", '{"channels": 9}')
    refused = run(verb, *odd)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "4 groups, the default, divide the channels of no conv that may be converted" in refused.err
    assert "try 2 groups or a budget like macs=50%" in refused.err
    assert not (tmp_path / "net-auto").exists()
    # The advice helps.
    for options in (("-g", 2, "--structure", "auto"), ("--budget", "macs=50%")):
        assert run("plan", *odd, "--min-group-width", 1, *options).code == 0


AUTO = Rules(structures=FAMILIES)
FOLDERS = {
    "auto": PlanRequest(),
    "block-term": PlanRequest(rules=Rules(structures="block-term")),
    "grouped-pointwise": PlanRequest(rules=Rules(structures="grouped-pointwise")),
    "g4": PlanRequest(rules=Rules(structures="grouped")),
    "g8": PlanRequest(GroupCounts.of(8)),
    "g4-8": PlanRequest(GroupCounts.of("4,layer3.*=8")),
    "g1-8": PlanRequest(GroupCounts.of("layer3.*=8")),
    "auto-g8": PlanRequest(GroupCounts.of(8), AUTO),
    "auto-g4-8": PlanRequest(GroupCounts.of("4,layer3.*=8"), AUTO),
    "block-term-g8": PlanRequest(GroupCounts.of(8), Rules(structures="block-term")),
    "grouped-pointwise-g8": PlanRequest(GroupCounts.of(8), Rules(structures="grouped-pointwise")),
    "planned": PlanRequest(budget=Budget.parse("macs=50%")),
}


@pytest.mark.parametrize("ending", FOLDERS)
def test_folders_are_called_by_what_was_asked_for(ending: str) -> None:
    assert FOLDERS[ending].label == ending
    assert replace(PlanRequest(), file=Path("plan.json")).label == "planned"
