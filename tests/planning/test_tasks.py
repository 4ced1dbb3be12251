"""What a model is taken for, and a measure of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.errors import PlanError, SpecError, WrongTypeError
from groupify.planning.rules import Rules
from groupify.planning.search import SearchOptions
from groupify.scores import Judge, Metric, measure_metric
from groupify.tasks import describe_task, task_of
from tests.conftest import Run

SHAPE = (3, 8, 8)
RULES = Rules(min_group_width=1, cpu="avx512")


def convs(*ends: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, *ends).eval()


def embedding() -> nn.Module:
    """Its outputs (N, K) look like class scores; all that matters is their direction, and one is huge."""
    return convs(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 6))


def enlarger() -> nn.Module:
    """An image-to-image net: three channels that are no classes."""
    return convs(nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2))


def images(count: int = 24) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def closeness(reference: nn.Module) -> Metric:
    held_out = images(8).flip(3)
    with torch.no_grad():
        wanted = reference(held_out)

    def psnr(model: nn.Module) -> float:
        assert not model.training
        return float(-10 * (model(held_out) - wanted).square().mean().clamp(min=1e-6).log10())

    return psnr


def test_the_task_follows_the_form_of_the_outputs_unless_it_is_said() -> None:
    scores, picture = torch.zeros(2, 5), torch.zeros(2, 3, 4, 4)
    assert [task_of(scores), task_of(picture)] == ["classes", "outputs"]
    assert task_of(scores, "outputs") == "outputs"
    assert "class scores (N, 5), judged by their softmax" in describe_task(scores, "classes")
    assert describe_task(scores, "outputs") == "task: outputs (N, 5), judged by their relative error"
    assert describe_task(picture, "outputs").endswith("(N, 3, 4, 4), judged by their relative error")
    with pytest.raises(SpecError, match=r"no class scores: \(N, 3, 4, 4\): take 'outputs'"):
        task_of(picture, "classes")
    with pytest.raises(SpecError, match="unknown task 'class': expected auto, classes, outputs"):
        task_of(scores, "class")


def test_an_image_that_is_off_by_a_hundred_everywhere_is_not_taken_for_right() -> None:
    class Shifted(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: Tensor) -> Tensor:
            shifted: Tensor = self.net(batch) + 100
            return shifted

    for net, task in ((enlarger(), "auto"), (embedding(), "outputs")):
        assert Judge(net, images(), task=task).judge(Shifted(net)).divergence > 1
    assert (
        Judge(embedding(), images()).judge(Shifted(embedding())).divergence < 1e-6
    )  # a softmax cannot see it


@pytest.mark.parametrize("task", ["auto", "outputs"])
def test_a_run_says_what_it_took_the_task_to_be(task: str) -> None:
    result = groupify.compress(embedding(), images(), budget="macs=60%", rules=RULES, task=task)
    expected = (
        "class scores (N, 6), judged by their softmax" if task == "auto" else "outputs (N, 6), judged by"
    )
    assert sum(expected in note for note in result.notes) == 1
    assert expected in str(result)


def test_a_limit_on_the_drop_is_in_the_units_of_the_metric() -> None:
    net = enlarger()
    psnr = closeness(net)
    result = groupify.compress(net, images(), budget="drop=30", rules=RULES, metric=psnr)
    found = result.measured_by_metric
    assert found is not None
    assert found.name == "psnr"
    assert found.dense == pytest.approx(60.0)
    assert found.converted == pytest.approx(measure_metric(psnr, result.model))
    assert 0 < found.drop <= 30
    assert f"metric psnr (higher is better): dense 60 → converted {found.converted:.4g}" in str(result)
    with pytest.raises(SpecError, match="give a metric, --metric module:function, or limit the macs"):
        groupify.compress(net, images(), budget="drop=20", rules=RULES)
    with pytest.raises(PlanError, match=r"of psnr on 6 held-out"):
        groupify.compress(net, images(), budget="macs=30%,drop=0.000001", rules=RULES, metric=psnr)


def test_a_metric_that_says_nothing_is_refused() -> None:
    def broken(model: nn.Module) -> float:
        raise ValueError("no images here")

    with pytest.raises(SpecError, match="metric 'broken' fails: ValueError: no images here"):
        measure_metric(broken, nn.Identity())
    with pytest.raises(SpecError, match="metric '<lambda>' is nan: expected a finite number"):
        measure_metric(lambda _: float("nan"), nn.Identity())
    with pytest.raises(WrongTypeError, match="metric is a str: expected a function of a model"):
        groupify.compress(enlarger(), images(), metric="psnr")  # type: ignore[arg-type]


def test_sensitivities_of_another_task_are_kept_apart(tmp_path: Path) -> None:
    options = SearchOptions(cache=tmp_path, verify=False, sensitivity="errors")
    for task in ("auto", "classes", "outputs"):
        groupify.compress(embedding(), images(), budget="macs=60%", rules=RULES, search=options, task=task)
    assert len(list(tmp_path.glob("sensitivity-*"))) == 2


def number_of_weights(model: nn.Module) -> float:
    """A metric for the command line: more weights are better."""
    return float(sum(parameter.numel() for parameter in model.parameters()))


def test_the_command_line_takes_a_metric_and_a_task(run: Run, tmp_path: Path) -> None:
    command = (
        "convert", "tests.planning.test_tasks:embedding", "--input-size", "3,8,8",
        "--data", "tests.cli_nets:data", "--calibrate", 24, "--budget", "macs=60%", "--min-group-width", 1,
    )  # fmt: skip
    metric = ("--metric", "tests.planning.test_tasks:number_of_weights", "--task", "outputs")
    outcome = run(*command, *metric, "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["metric"]["name"] == "number_of_weights"
    assert report["metric"]["dense"] > report["metric"]["converted"] == report["params"]["grouped"]
    assert any(note.startswith("task: outputs (N, 6)") for note in report["notes"])
    assert "metric number_of_weights" in (tmp_path / "out" / "report.html").read_text("utf-8")
    refused = run(*command, "--metric", "tests.planning.test_tasks:nothing")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "metric 'tests.planning.test_tasks:nothing': no 'nothing'" in refused.err
