"""Where a model runs, and how much memory a conversion may take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from groupify import devices
from groupify.cli.main import cli
from groupify.devices import find_device
from groupify.errors import SpecError
from tests.cli_nets import INPUT_SIZE
from tests.conftest import Run

NET = ("tests.cli_nets:net", "--input-size", INPUT_SIZE)
DATA = ("--data", "tests.cli_nets:data")
ABSENT = "cuda:7"


@pytest.mark.parametrize(
    "command",
    [
        ("plan", *NET, "--groups", 2),
        ("convert", *NET, "--groups", 2, "-o", "out"),
        ("evaluate", *NET, *DATA),
    ],
    ids=lambda command: str(command[0]),
)
def test_an_absent_device_is_refused_with_what_there_is(
    run: Run, command: tuple[object, ...], tmp_path: Path
) -> None:
    refused = run(*command, "--device", ABSENT)
    assert refused.code == 2
    assert f"--device {ABSENT}: PyTorch sees no such device here; expected auto or one of cpu" in refused.err
    assert refused.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_command_that_runs_a_model_takes_a_device() -> None:
    having = {
        name
        for name, command in cli.commands.items()
        if any("--device" in parameter.opts for parameter in command.params)
    }
    assert having == {"plan", "convert", "evaluate", "finetune"}


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta", ABSENT])
def test_what_is_no_device_here_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="expected auto or one of cpu"):
        find_device(name)


def test_present_devices_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    present = [torch.device(name) for name in ("cpu", "mps:0")]
    monkeypatch.setattr(devices, "_present", lambda: present)
    assert find_device("mps") == torch.device("mps")
    with pytest.raises(SpecError, match="one of cpu, mps:0"):
        find_device("mps:1")


def test_onnx_files_run_on_the_cpu_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"")
    refused = run("evaluate", "net.onnx", *DATA, "--device", "cuda")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--device cuda: ONNX files run in ONNX Runtime, on the CPU" in refused.err


def test_memory_is_limited_and_its_need_told(run: Run) -> None:
    command = ("convert", *NET, *DATA, "--groups", 2, "--min-group-width", 1, "--calibrate", 32, "-o", "out")
    done = run(*command, "--memory", "10KiB", "--device", "cpu")
    assert done.code == 0, done.err
    told = [line for line in done.notes.splitlines() if "memory:" in line]
    assert len(told) == 1
    assert "activations of 32 images take about" in told[0]
    assert "beyond 10.0 KiB they wait in" in told[0]
    quiet = run(*command, "--memory", "10KiB", "--force", "--quiet")
    assert (quiet.code, quiet.notes) == (0, "")
    assert "memory" not in quiet.err


def test_an_amount_of_memory_that_is_none_is_refused(run: Run) -> None:
    refused = run("convert", *NET, *DATA, "--groups", 2, "--memory", "2")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--memory: '2' is no amount of memory" in refused.err
