"""What a run says of what it is doing: numbered stages, as many as it says, with estimates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.measure.latency_table import LatencyTable
from groupify.planning import durations, race
from groupify.planning.budget import Budget
from groupify.planning.durations import Pace
from groupify.planning.search import SearchOptions, count_stages
from groupify.stages import Stages, about
from tests import cli_nets
from tests.conftest import Run

STAGE = re.compile(r"\[(\d+)/(\d+)\] (.*)")
NET = ("tests.cli_nets:net", "--input-size", "3,8,8", "--weights", "none", "--min-group-width", 1)
DATA = ("--data", "tests.cli_nets:data", "--calibrate", 24)


def stages(text: str) -> list[str]:
    """What was said to begin; the numbers are checked."""
    found = [match.groups() for line in text.splitlines() if (match := STAGE.fullmatch(line)) is not None]
    assert [int(number) for number, _, _ in found] == list(range(1, len(found) + 1))
    assert {int(count) for _, count, _ in found} <= {len(found)}
    return [what for _, _, what in found]


def matches(found: list[str], expected: list[str]) -> bool:
    return len(found) == len(expected) and all(map(re.fullmatch, expected, found))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "1 s"), (1.4, "1 s"), (8.7, "9 s"), (43.1, "40 s"), (89, "90 s"), (150, "3 min"), (4000, "1.1 h")],
)
def test_durations_are_rough(seconds: float, text: str) -> None:
    assert about(seconds) == f"about {text}"


def test_nothing_is_estimated_where_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def never() -> float:
        raise AssertionError

    Stages(3).begin("timing", never)
    shown = Stages(3, show=True)
    shown.begin("timing 14 convs", lambda: 38.0)
    shown.begin("fitting")
    assert capsys.readouterr().err == "[1/3] timing 14 convs, about 40 s\n[2/3] fitting\n"


def test_a_whole_run_on_the_command_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPIFY_CACHE", str(tmp_path / "cache"))
    limits = ("--budget", "latency=99%,macs=70%", "--structure", "grouped", "--no-verify")
    outcome = run("convert", *NET, *DATA, *limits, "--epochs", 0.2, "--uniform", "2", "-o", "out")
    assert outcome.code == 0, outcome.err
    assert matches(
        stages(outcome.notes),
        [
            "measuring what each of 2 convs would lose, on 24 images, about \\d+ s",
            "timing 2 convs and what could replace them, about \\d+ s",
            "fitting [12] convs on 24 images, about \\d+ s",
            "measuring the accuracy of both models, about \\d+ s",
            "fine-tuning, epochs: 0.2, about \\d+ s",
            "converting [01] uniform plans as well",
            "exporting to ONNX in float32, checked against PyTorch",
            "timing dense against converted in ONNX Runtime, about \\d+ s",
        ],
    )
    again = run("finetune", "out", "--data", "tests.cli_nets:data", "--epochs", 0.2, "--trust")
    assert [what.split()[0] for what in stages(again.notes)] == [
        "measuring", "fine-tuning,", "exporting", "timing",
    ]  # fmt: skip


def test_a_plan_says_its_stages_unless_it_is_to_be_quiet(run: Run) -> None:
    plan = ("plan", *NET, *DATA, "--budget", "macs=70%", "--structure", "grouped", "--no-verify")
    assert [what.split()[0] for what in stages(run(*plan).notes)] == ["measuring"]
    quiet = run(*plan, "--quiet")
    assert (quiet.code, quiet.notes, quiet.err) == (0, "", "")


def test_the_call_says_it_where_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net, images = cli_nets.net(), cli_nets._images(24, 1)[0]
    options = {"structure": "grouped", "rules": groupify.Rules(min_group_width=1)}
    for verify, compared in ((True, ["converting the best plans, compared on 6 held-out .*"]), (False, [])):
        search = SearchOptions(verify=verify)
        groupify.compress(net, images, budget="macs=60%", search=search, progress=True, **options)  # type: ignore[arg-type]
        expected = ["measuring what each of 2 convs .*", *compared, "fitting . convs on 24 images.*"]
        assert matches(stages(capsys.readouterr().err), expected)
    groupify.compress(net, images, groups=2, rules=groupify.Rules(min_group_width=1))
    assert capsys.readouterr().err == ""
    example = torch.randn(2, 3, 8, 8)
    groupify.compress(
        net, groups=2, rules=groupify.Rules(min_group_width=1), example_inputs=example, progress=True
    )
    assert stages(capsys.readouterr().err) == ["fitting 2 convs from their weights alone"]


def test_stages_of_a_search_are_counted() -> None:
    latency, macs, drop = (Budget.parse(text) for text in ("latency=2x", "macs=50%", "drop=1"))
    measured, table = SearchOptions(), SearchOptions(table=LatencyTable("here"))
    fast = SearchOptions(verify=False)
    for budget, options, images, count in (
        (None, measured, False, 1), (None, measured, True, 2), (macs, fast, True, 1), (drop, fast, True, 2),
        (latency, measured, True, 3), (latency, measured, False, 3), (latency, fast, False, 2),
        (latency, table, True, 2), (latency, table, False, 1),
    ):  # fmt: skip
        assert count_stages(budget, options, images=images) == count


def test_a_device_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Net(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            done.append("run")
            return super().forward(images)

    def clock() -> float:
        done.append("clock")
        return 1.0

    monkeypatch.setattr(durations, "synchronise", lambda device: done.append("wait"))
    monkeypatch.setattr("groupify.planning.durations.time.perf_counter", clock)
    assert Pace(Net(3, 4, 3), (3, 8, 8), 100).seconds == 0
    assert done == ["wait", "clock", "run", "wait", "clock"] * 2


def test_a_plan_that_nothing_comes_near_is_not_said_to_be_converted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images = cli_nets.net(64).eval(), torch.randn(64, 3, 8, 8)
    rules = groupify.Rules(min_group_width=1)
    monkeypatch.setattr(race, "_FAR_BEHIND", 1.0)
    found = groupify.compress(net, images, budget="macs=50%", rules=rules, progress=True)
    assert "none comes near the best, so none is converted" in capsys.readouterr().err
    assert "not converted to be measured" in "".join(found.notes)
    monkeypatch.setattr(race, "_FAR_BEHIND", 1e9)
    groupify.compress(net, images, budget="macs=50%", rules=rules, progress=True)
    assert "converting the best plans, compared on 16 held-out" in capsys.readouterr().err


def test_estimates_grow_with_the_work() -> None:
    net = cli_nets.net().eval()
    rules = groupify.Rules(min_group_width=1)
    plan = groupify.plan(net, (3, 8, 8), groups=2, rules=rules)
    pace = Pace(net, (3, 8, 8), plan.macs.dense)
    assert 0 < pace.fit(plan.sites, 10) < pace.fit(plan.sites, 1000)
    assert pace.passes(1000) == pytest.approx(1000 * pace.seconds)
    pairs = groupify.plan(
        net, (3, 8, 8), groups=2, rules=groupify.Rules(min_group_width=1, structures="grouped-pointwise")
    )
    assert pace.fit([pairs.site("2")], 0) > pace.fit([plan.site("2")], 0) > 0
    assert pace.fit([plan.site("0")], 0) == 0  # stays as it is
