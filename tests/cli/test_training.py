"""The command line's training: its options, streams, an interrupted run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from groupify.cli.run_commands import finetune
from groupify.cli.shared import training_request
from groupify.errors import SpecError
from groupify.training.settings import FinetuneSettings
from tests.cli_nets import INPUT_SIZE
from tests.conftest import Run

TINY = ("tests.cli_nets:net", "--input-size", INPUT_SIZE, "--min-group-width", "8")
CONVERT = ("convert", *TINY, "--groups", 4)
GROUPED = ("--structure", "grouped")
STREAM = ("--data", "tests.cli_nets:stream", "--images-per-epoch", 192, "--batch-size", 16)


def test_each_option_reaches_its_setting(run: Run, tmp_path: Path) -> None:
    options = {
        "--batch-size": 32, "--accumulate": 2, "--optimizer": "adamw", "--learning-rate": 0.002,
        "--learning-rate-schedule": "one-cycle", "--weight-decay": 0.01, "--distill": "attention",
        "--distillation-weight": 0.5, "--temperature": 2.0, "--label-smoothing": 0.1, "--ema": 0.9,
        "--warmup": 0.2,
    }  # fmt: skip
    flags = ("--augment", "--freeze-batch-norms", "--channels-last", "--amp", "bf16", "--device", "cpu")
    command = (*CONVERT, "--data", "tests.cli_nets:data", "--calibrate", 64, "--epochs", 0.5)
    outcome = run(*command, *(word for pair in options.items() for word in pair), *flags, "-o", "out")
    assert outcome.code == 0, outcome.err
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    expected = FinetuneSettings(
        epochs=0.5, batch_size=32, accumulate=2, optimizer="adamw", learning_rate=0.002, schedule="one-cycle",
        weight_decay=0.01, distill="attention", distillation_weight=0.5, temperature=2.0, label_smoothing=0.1,
        ema_decay=0.9, warmup_fraction=0.2, augment=True, freeze_batch_norms=True, channels_last=True,
        amp="bfloat16", labels=True,
    )  # fmt: skip
    assert recipe["recovery"] == expected.as_recipe()


@pytest.mark.parametrize("option", ["--save-every=5", "--resume", "--log-file=a", "--tensorboard=a"])
def test_training_options_without_training(run: Run, option: str) -> None:
    refused = run(*CONVERT, option)
    assert refused.code == 2
    assert option.partition("=")[0] in refused.err
    assert "give --epochs N" in refused.err


def test_finetune_for_no_epochs(run: Run) -> None:
    refused = run("finetune", "somewhere", "--data", "demo", "--epochs", 0)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "nothing to train" in refused.err


@pytest.mark.slow
def test_streams_in_every_verb(run: Run, tmp_path: Path) -> None:
    options = (*STREAM, "--epochs", 1)
    outcome = run(*CONVERT, *options, "--calibrate", 64, "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["accuracy"]["images"] == 40
    assert report["history"][-1]["epoch"] == 1
    evaluated = run("evaluate", "out", *STREAM[:2], "--trust", "--json")
    assert json.loads(evaluated.out)["top1"] == pytest.approx(report["accuracy"]["recovered"])
    tuned = run("finetune", "out", *options, "--labels", "none", "--trust", "--json")
    assert tuned.code == 0, tuned.err
    assert json.loads(tuned.out)["accuracy"]["images"] == 40
    planned = run("plan", *TINY, *STREAM[:2], "--budget", "macs=60%", *GROUPED, "--calibrate", 64, "--json")
    assert planned.code == 0, planned.err
    assert "unlabelled images" in json.loads(planned.out)["method"]
    exported = run("export", "out", *STREAM[:2], "--trust", "--precision", "both", "--json")
    assert exported.code == 0, exported.err


@pytest.mark.slow
def test_what_the_data_cannot_give_is_said(run: Run, tmp_path: Path) -> None:
    tiny = (*CONVERT, "--calibrate", 64, "--epochs", 1)
    of_unknown_length = run(*tiny, *STREAM[:2])
    assert of_unknown_length.code == 2
    assert "--images-per-epoch N" in of_unknown_length.err.splitlines()[-1]
    plain = run(*tiny, "--data", "tests.cli_nets:data", "--augment", "-o", "out")
    assert plain.code == 0
    assert "warning: data 'tests.cli_nets:data' has no standard augmentation" in plain.err


def test_tensorboard_that_is_not_installed_is_noticed_at_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = ("--data", "there is none", "--epochs", 1, "--log-file", "log.jsonl", "--tensorboard", "board")
    refused = run(*CONVERT, *options)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "pip install tensorboard" in refused.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupted_command_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    def command(folder: str, *more: object) -> Any:
        return run(
            *CONVERT, *STREAM, "--calibrate", 64, "--epochs", 2, "--save-every", 3,
            "--log-file", f"{folder}.jsonl", "--log-every", 1, "-o", folder, *more,
        )  # fmt: skip

    assert command("whole").code == 0
    (tmp_path / "interrupt").touch()
    interrupted = command("out")
    state = tmp_path / "out.state"
    assert state.is_file()
    assert interrupted.code == 130
    assert interrupted.err.splitlines()[-1] == (
        f"groupify: error: interrupted; the state of the training is in {state}: the same command with "
        "--resume goes on from it"
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "interrupt").unlink()
    refused = command("out")
    assert refused.code == 2
    assert "out.state is the state of an interrupted run" in refused.err
    other = command("out", "--resume", "--temperature", 3)
    assert other.code == 2
    assert "is the state of another run" in other.err
    assert command("out", "--resume").code == 0
    assert not state.exists()
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(value.equal(resumed[key]) for key, value in whole.items())
    lines = [
        [(line["step"], line.get("loss")) for line in map(json.loads, path.read_text().splitlines())]
        for path in (tmp_path / "whole.jsonl", tmp_path / "out.jsonl")
    ]
    assert lines[0] == lines[1]


def test_an_interrupted_command_without_a_state_left_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "interrupt").touch()
    options = (*STREAM, "--calibrate", 64, "--epochs", 2)
    for keeping in ((), ("--save-every", 500)):
        outcome = run(*CONVERT, *options, *keeping, "-o", "out")
        assert outcome.code == 130
        assert outcome.err.splitlines()[-1] == "groupify: error: interrupted; nothing was written"
    assert [path.name for path in tmp_path.iterdir()] == ["interrupt"]


@pytest.mark.parametrize(("rate", "chosen"), [(0.03, True), (100.0, False)], ids=["helps", "hurts"])
def test_the_weights_that_were_not_chosen_are_kept(
    run: Run, tmp_path: Path, rate: float, chosen: bool
) -> None:
    options = ("--data", "tests.cli_nets:data", "--labels", "none", "--epochs", 8, "--learning-rate", rate)
    outcome = run(*CONVERT, *options, "--calibrate", "none", "-o", "out", "--json")
    report = json.loads(outcome.out)
    best = min(report["history"], key=lambda row: row["validation_loss"])
    step = report["chosen"]["step"]
    assert step == (best["step"] if chosen else 0)
    others = {"weights_before_training": "before", "last_weights": "last"}
    kept = {role for role in others if role in report["files"]}
    assert ("weights_before_training" in kept) is chosen
    assert ("last_weights" in kept) is (step < report["history"][-1]["step"])
    assert kept
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for role in kept:
        assert report["files"][role] == f"out/{others[role]}.safetensors"
        other = load_file(tmp_path / "out" / f"{others[role]}.safetensors")
        assert other.keys() == weights.keys()
        assert any(not value.equal(weights[key]) for key, value in other.items())
    said = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert ("training: the weights of step" in said) is chosen
    assert ("training: not taken" in said) is not chosen


def test_settings_without_options_are_the_defaults() -> None:
    context = finetune.make_context("finetune", ["folder", "--data", "demo"])
    request = training_request({key: value for key, value in context.params.items() if key != "folder"})
    assert request is not None
    assert request.settings == FinetuneSettings()
    assert request.log is None


def test_log_every_nothing_is_refused() -> None:
    from groupify.training.history import LogSettings
    from groupify.training.state import Checkpointing

    with pytest.raises(SpecError, match="log interval is 0"):
        LogSettings(interval=0)
    with pytest.raises(SpecError, match="every 0 steps"):
        Checkpointing(Path("state"), interval=0)
