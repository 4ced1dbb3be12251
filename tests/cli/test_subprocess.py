"""The command line as a process of its own, on the embedded demo: whole runs, and leaving half-way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import groupify
from tests.cli_nets import part_of_the_demo
from tests.conftest import ROOT, Run

# What pytest was started from may ignore SIGINT, and a child would inherit that.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from groupify.cli.main import main
main()
"""


DATA = ("--data", "tests.cli_nets:part_of_the_demo")


def environment() -> Mapping[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, *map(str, arguments)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that one whole conversion wrote, and the document that it printed."""
    folder = tmp_path_factory.mktemp("whole")
    options = ("--groups", 4, *DATA, "--calibrate", 100, "--epochs", 0.5, "--json")
    code, out, err = finish(start(folder, "convert", "demo", *options))
    assert code == 0, err
    notes = [line for line in err.splitlines() if not re.match(r"\[\d/\d\] [a-z]", line)]
    assert len(notes) == 2, err
    assert notes[0].startswith(
        "groupify: preprocessing (the data set's own): the whole image to 28×28, bilinear;"
    )
    assert notes[1].startswith("groupify: memory: activations of 100 images take about ")
    return folder / "demo-g4", json.loads(out)


@pytest.mark.slow
def test_the_document(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, document = converted
    assert document["model"] == "demo"
    assert document["weights"] == {"kind": "demo", "value": None}
    assert len(document["sites"]) == 15
    for site in document["sites"]:
        kept = site["name"] == "conv1" or "downsample" in site["name"]
        assert site["structure"] == {"reduce": None, "groups": 1 if kept else 4, "expand": None}
        assert (site["reason"] is not None) == kept
    assert document["sites"][0]["reason"] == "first conv: too few input channels (3)"
    for key in ("params", "macs", "weight_bytes", "activation_bytes", "latency_ms", "onnx_bytes"):
        assert document[key]["dense"] >= document[key]["grouped"] > 0, key
    assert document["params"]["dense"] / document["params"]["grouped"] > 3.5
    assert document["macs"]["dense"] / document["macs"]["grouped"] > 3.5
    accuracy = document["accuracy"]
    assert accuracy["dense"] >= 0.92
    assert 0.8 < accuracy["converted"] <= 1
    assert 0.8 < accuracy["recovered"] <= 1
    assert document["parity"]["max_abs_diff"] < 1e-3
    files = dict(document["files"])
    # The weights that were not chosen are there: those before a training that helped, or of its last step.
    others = {key: files.pop(key) for key in ("weights_before_training", "last_weights") if key in files}
    assert set(others.values()) <= {"demo-g4/before.safetensors", "demo-g4/last.safetensors"}
    assert others
    assert files == {
        "onnx": "demo-g4/model.onnx",
        "recipe": "demo-g4/recipe.json",
        "report": "demo-g4/report.json",
        "page": "demo-g4/report.html",
        "weights": "demo-g4/model.safetensors",
    }
    assert sorted(document["files"].values()) == sorted(f"demo-g4/{path.name}" for path in folder.iterdir())
    assert json.loads((folder / "report.json").read_text("utf-8")) == document
    assert [path.name for path in folder.parent.iterdir()] == ["demo-g4"]


@pytest.mark.slow
def test_onnx_runtime_computes_what_pytorch_does(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, document = converted
    model = groupify.load(folder)
    data = part_of_the_demo()
    assert data.test is not None
    images = groupify.calibration_images(data.test, 50, seed=1)
    with torch.inference_mode():
        expected = model(images).numpy()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"input": images.numpy()})
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
    # The file on disk is the model that was measured, not the one before the fine-tune.
    assert groupify.evaluate(model, data.test).top1 == document["accuracy"]["recovered"]


# ---- the other verbs, on the folder that the whole run wrote


@pytest.mark.slow
def test_evaluate(converted: tuple[Path, dict[str, Any]], run: Run) -> None:
    folder, document = converted
    outcome = run("evaluate", folder, *DATA, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out) == {
        "model": str(folder),
        "data": DATA[1],
        "top1": document["accuracy"]["recovered"],
        "images": 200,
    }


@pytest.mark.slow
def test_finetune(converted: tuple[Path, dict[str, Any]], run: Run, tmp_path: Path) -> None:
    folder, document = converted
    shutil.copytree(folder, tmp_path / "moved")
    outcome = run("finetune", "moved", *DATA, "--epochs", 0.5, "--labels", "none", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    before = json.loads(run("evaluate", "moved", *DATA, "--json").out)
    assert before["images"] == report["accuracy"]["images"] == 200
    assert report["files"]["onnx"] == "moved-finetuned/model.onnx"
    # "converted" is the model that was given: the one that the first run recovered.
    assert report["accuracy"]["converted"] == before["top1"]
    assert report["accuracy"]["dense"] > 0.9
    assert report["accuracy"]["recovered"] > 0.75
    assert [site["structure"] for site in report["sites"]] == [
        site["structure"] for site in document["sites"]
    ]
    assert report["params"] == document["params"]
    assert len(report["history"]) >= 2
    refused = run("finetune", "moved", *DATA)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "moved-finetuned exists; pass --force" in refused.err


@pytest.mark.slow
def test_export(converted: tuple[Path, dict[str, Any]], run: Run, tmp_path: Path) -> None:
    folder, _ = converted
    outcome = run("export", folder, "-o", "one.onnx", "--static-batch", 1)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("wrote one.onnx (")
    assert "ONNX Runtime against PyTorch: largest difference" in outcome.out
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 28, 28]
    assert run("export", folder, "-o", "one.onnx").code == 2
    tiny = ("export", "tests.cli_nets:net", "--input-size", "3,8,8")
    document = json.loads(run(*tiny, "-o", "one.onnx", "--force", "--json").out)
    assert document["files"] == {"onnx": "one.onnx"}
    assert document["onnx_bytes"] == (tmp_path / "one.onnx").stat().st_size
    assert document["parity"]["max_abs_diff"] < 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]


@pytest.mark.slow
def test_bench(converted: tuple[Path, dict[str, Any]], run: Run, tmp_path: Path) -> None:
    folder, document = converted
    outcome = run("bench", folder, "--seconds", 0.3, "--batch-sizes", "1,2", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads(outcome.out)
    assert result["macs"] == document["macs"]
    rows = result["rows"]
    assert [
        (row["engine"], row["threads"], row["batch_size"], row["model"], row["precision"]) for row in rows
    ] == [
        ("ONNX Runtime", 1, batch_size, model, "float32")
        for batch_size in (1, 2)
        for model in ("dense", "grouped")
    ]
    for dense, grouped in zip(rows[::2], rows[1::2], strict=True):
        assert dense["median_ms"] > grouped["median_ms"] > 0
        assert dense["speed_up"] == 1 < grouped["speed_up"] == grouped["speed_up_over_best"]
    assert min(result["peak_memory_bytes"].values()) > 1e6
    assert list(tmp_path.iterdir()) == []


def test_native_code_that_prints_stays_out_of_results(tmp_path: Path) -> None:
    code, out, err = finish(
        start(tmp_path, "plan", "tests.cli_nets:noisy", "--input-size", "3,8,8", "--groups", 4, "--json")
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["macs"]["grouped"] > 0


# ---- leaving half-way


def test_a_signal_leaves_nothing(tmp_path: Path) -> None:
    options = ("convert", "demo", "--groups", 4, "--data", "demo", "--epochs", 50, "-o", "a/out")
    started = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        folder.mkdir()
        started[number] = start(folder, *options)
    for number, process in started.items():
        waited = time.monotonic() + 120
        while not list(tmp_path.glob(f"{number.name}/a/.out.*.partial")) and time.monotonic() < waited:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
    messages = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
    for number, process in started.items():
        code, word = messages[number]
        status, output, errors = finish(process)
        assert (status, output) == (code, "")
        assert errors.endswith(f"groupify: error: {word}; nothing was written\n")
        assert list((tmp_path / number.name).iterdir()) == []


def test_a_reader_that_leaves(converted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    tiny = ("plan", "tests.cli_nets:net", "--input-size", "3,8,8", "-g", 4, "--json")
    processes = [start(tmp_path, *command) for command in (tiny, ("report", converted[0]))]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    for process in processes:
        assert process.stderr is not None
        assert process.stderr.read() == ""
        process.stderr.close()
        assert process.wait(timeout=300) == 0


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = "import sys, groupify.cli.main; assert not {'torch', 'numpy', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)
