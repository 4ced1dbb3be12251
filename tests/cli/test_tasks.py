"""Models that are no classifiers on the command line: a loss, a metric, and what a folder keeps of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from groupify.reporting.results import Report
from tests import cli_nets
from tests.conftest import Run

HERE = "tests.cli.test_tasks"
NET = ("tests.cli_nets:segmenter", "--input-size", cli_nets.INPUT_SIZE, "--min-group-width", 1)
DATA = ("--data", f"{HERE}:maps")


def maps() -> tuple[TensorDataset, TensorDataset]:
    """A class for each pixel."""
    parts = []
    for count, seed in ((96, 1), (40, 2)):
        images, _ = cli_nets._images(count, seed)
        parts.append(TensorDataset(images, F.avg_pool2d(images, 3, 1, 1).argmax(1)))
    return parts[0], parts[1]


def of_pixels(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores, labels)


def likelihood(model: nn.Module) -> float:
    images, labels = maps()[1].tensors
    return -float(of_pixels(model(images), labels))


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return found


def test_a_folder_keeps_its_task_its_budget_and_its_metric(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    metric, loss = ("--metric", f"{HERE}:likelihood"), ("--loss", f"{HERE}:of_pixels")
    limits = ("--budget", "macs=60%,drop=5", "--structure", "grouped", "--task", "outputs", "--calibrate", 64)
    outcome = run("convert", *NET, *DATA, *limits, *metric, "-o", "out")
    assert outcome.code == 0, outcome.err
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert (recipe["task"], recipe["budget"]) == ("outputs", "macs=60%,drop=5")
    training = (*DATA, "--epochs", 4, "--learning-rate", 0.01, "--trust")

    tuned = run("finetune", "out", *training, *loss, *metric, "-o", "tuned")
    assert tuned.code == 0, tuned.err
    before, after = report_of(tmp_path / "out"), report_of(tmp_path / "tuned")
    assert after["budget"] == before["budget"]
    change = after["metric"]
    assert (change["name"], change["dense"]) == ("likelihood", before["metric"]["dense"])
    assert change["converted"] == before["metric"]["converted"] < change["recovered"]
    assert "metric likelihood (higher is better): dense " in tuned.out
    assert "asked drop=5: lost " in tuned.out
    assert {row["validation_top1"] for row in after["history"]} == {None}
    recipe = json.loads((tmp_path / "tuned" / "recipe.json").read_text())
    assert (recipe["task"], recipe["recovery"]["loss"]) == ("outputs", "of_pixels")
    assert "Validation loss" in (tmp_path / "tuned" / "report.html").read_text("utf-8")
    assert "Validation accuracy" not in (tmp_path / "tuned" / "report.html").read_text("utf-8")

    # Without labels and without the metric: the outputs are distilled, and it is said what is not known.
    distilled = run("finetune", "tuned", *training, "-o", "again")
    assert distilled.code == 0, distilled.err
    report = Report.read(tmp_path / "again" / "report.json")
    assert report.metric is not None
    assert report.metric.converted == change["recovered"]
    assert report.chosen is not None
    if report.chosen.step > 0:
        assert report.metric.recovered is None
        assert "asked drop=5: not measured by likelihood after the training" in distilled.out
        assert "give --metric package.module:likelihood" in distilled.out
    else:
        assert report.metric.recovered == report.metric.converted


def test_a_loss_goes_with_training_and_with_labels(run: Run) -> None:
    convert = ("convert", *NET, *DATA, "--groups", 2, "--calibrate", 32, "-o", "out")
    refused = run(*convert, "--loss", f"{HERE}:of_pixels")
    assert refused.code == 2
    assert "--loss is about training, and there is none; give --epochs N" in refused.err
    refused = run(*convert, "--epochs", 1, "--loss", f"{HERE}:nothing")
    assert "loss 'tests.cli.test_tasks:nothing': no 'nothing'" in refused.err
    refused = run(*convert, "--epochs", 1, "--loss", f"{HERE}:of_pixels", "--labels", "none")
    assert "the loss 'of_pixels' is for labels" in refused.err


def test_outputs_are_distilled_where_nothing_else_is_said(run: Run, tmp_path: Path) -> None:
    outcome = run(
        "convert", *NET, *DATA, "--groups", 2, "--calibrate", 64, "--epochs", 2, "-o", "out", "--json"
    )
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["accuracy"]["dense"] is None
    assert report["history"][-1]["validation_loss"] < report["history"][0]["validation_loss"]
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["recovery"]["labels"] is False


def test_an_embedding_has_no_accuracy(run: Run, tmp_path: Path) -> None:
    net = ("tests.cli_nets:net", "--input-size", cli_nets.INPUT_SIZE, "--min-group-width", 1)
    command = ("convert", *net, "--data", "tests.cli_nets:data", "--task", "outputs", "--groups", 2)
    outcome = run(*command, "--calibrate", 32, "--precision", "int8", "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["accuracy"]["dense"] is None
    assert report["int8"]["agreement"]["top1_agreement"] is None
    refused = run("evaluate", "out", "--data", "tests.cli_nets:data", "--trust")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "out was converted as --task outputs: its outputs are no class scores" in refused.err
    refused = run(*command, "--uniform", "4", "-o", "other")
    assert "--uniform compares accuracies, and the task is 'outputs'" in refused.err
