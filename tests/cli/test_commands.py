"""The command line in this process: what it refuses, what it prints, what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path

import click
import onnx
import pytest
import torch
from safetensors.torch import save_file

import groupify
from groupify.cli.main import cli
from groupify.cli.options import SectionedCommand
from groupify.errors import SpecError
from groupify.measure.latency_table import LatencyTable
from groupify.models import sources as zoo_load
from groupify.onnx.exporting import export_onnx
from groupify.pipeline import exporting
from groupify.pipeline import run as pipeline_run
from tests.cli_nets import INPUT_SIZE, net
from tests.conftest import Run

# Wide enough to be faster when grouped, on any machine: a warning would be one line more.
TINY = ("tests.cli_nets:net", "--input-size", INPUT_SIZE, "--model-args", '{"channels": 64}')


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """What the commands below name: broken and foreign weights, a file, and a folder of the user's own."""
    (tmp_path / "garbage.pt").write_bytes(b"no checkpoint")
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 64)
    state = net().state_dict()
    state["2.weight"] = state["2.weight"][:, :16].clone()
    save_file(state, tmp_path / "other.safetensors")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").write_text("not groupify's")
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measured numbers are kept."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GROUPIFY_CACHE", str(folder))
    return folder


BAD_INPUT = [
    # budgets
    ("plan demo --budget macs=0%", "budget 'macs=0%': expected a value above 0"),
    ("plan demo --budget mac=40%", "did you mean 'macs'"),
    ("plan demo --budget macs=40% --budget macs=50%", "two limits for 'macs'"),
    ("plan demo --budget macs=40% --plan plan.json", "--plan and a budget"),
    ("plan demo --groups 4 --plan plan.json", "--plan and --groups: the file says"),
    ("convert demo --plan plan.json --min-group-width 8", "--plan and --min-group-width"),
    ("plan demo --budget drop=1", "needs images; give --data"),
    ("plan demo --groups 4 --frontier", "--frontier shows", "give one, for example --budget macs=40%"),
    ("plan demo --groups 4 --budget macs=40%", "groups and a budget: both say", "give one of the two"),
    ("plan demo --plan missing.json", "cannot read plan 'missing.json'"),
    ("plan demo --budget latency=2x --latency-table missing.json", "cannot read latency table"),
    ("bench missing", "no folder 'missing'"),
    # models
    ("convert resnett18", "unknown model 'resnett18'", "did you mean 'resnet18'"),
    ("plan nothing:at_all", "cannot import 'nothing'"),
    ("plan tests.cli_nets:nett", "no 'nett' in tests.cli_nets; did you mean 'net'"),
    ("plan tests.cli_nets:net --input-size 4,8,8", "does not run on an input of shape (1, 4, 8, 8)", "C,H,W"),
    ("convert tests.cli_nets:net --input-size 4,8,8 --data tests.cli_nets:data", "give --input-size 3,8,8"),
    ("convert tests.cli_nets:net --input-size 4,8,8", "does not run on an input of shape (1, 4, 8, 8)"),
    ("plan tests.cli_nets:net", "nothing says the size of the inputs", "give it with --input-size"),
    ("plan resnet18 --weights FOO", "unknown weights 'FOO'", "IMAGENET1K_V1"),
    ("convert resnet18 --weights V1 --data demo", "unknown weights 'V1'"),
    # groups
    ("convert demo -g 0", "groups is 0", "expected at least 2"),
    ("convert demo --groups -4", "groups is -4", "expected at least 2"),
    ("convert demo -g 1", "groups is 1", "expected at least 2"),
    ("convert demo -g 2 --include conv1", "among the 15 convs", "too few input channels (3)"),
    (
        'plan tests.cli_nets:net --input-size 3,8,8 --model-args {"channels":9} --include 2 -g 2',
        "among the 3 convs",
        "no number of groups from 2 to 2 divides 9 → 18 channels",
    ),
    ("convert demo -g 4 --min-group-width 1000", "groups narrower than 1000 channels"),
    ("convert demo -g four", "groups 'four': expected a number"),
    # weights
    ("convert demo --checkpoint missing.pt", "no checkpoint missing.pt"),
    ("convert demo --checkpoint there", "no checkpoint there"),
    ("convert demo --checkpoint garbage.pt", "garbage.pt is corrupt"),
    ("convert demo --checkpoint garbage.safetensors", "garbage.safetensors is corrupt"),
    (
        "convert tests.cli_nets:net --checkpoint other.safetensors",
        "other.safetensors: '2.weight' has shape (64, 16, 3, 3), the model's has (64, 32, 3, 3)",
    ),
    ("convert demo --checkpoint other.safetensors", "has no 'conv1.weight'", "with shape (64, 3, 3, 3)"),
    # data
    ("convert demo --data imagefolder:missing", "missing"),
    ("convert demo --data fashion-mnist:missing", "missing"),
    ("convert demo --data cifar10:missing", "missing"),
    ("convert demo --data imagefolder", "give imagefolder:ROOT"),
    ("convert demo --data fashion-mnits", "unknown data 'fashion-mnits'", "did you mean 'fashion-mnist'"),
    ("convert demo --data tests.cli_nets:no_data", "RuntimeError: no such bucket retry later"),
    ("evaluate demo --data synthetic", "'synthetic' has no labelled test part"),
    ("evaluate demo --data imagefolder:missing", "missing"),
    ("evaluate demo", "Missing option '--data'"),
    # output
    ("convert demo -o /proc/groupify", "cannot write to /proc", "-o"),
    ("convert demo -o file/below", "cannot write to", "-o"),
    ("convert demo -o file", "is a file"),
    ("convert demo -o there", "exists; pass --force"),
    ("convert demo -o there --force", "neither empty nor written by groupify"),
    ("export demo -o file", "file exists; give --force"),
    ("export demo -o there --force", "there"),
    ("export demo -o missing/demo.onnx", "missing"),
    ("export demo -o file/demo.onnx", "demo.onnx"),
    ("convert demo --save-plan there", "--save-plan: cannot write there: it is a folder"),
    ("convert demo --epochs 1 --log-file file/log", "--log-file: cannot write file/log", "is no folder"),
    ("plan demo --budget macs=40% --frontier-plot file/a.png", "--frontier-plot: cannot write file/a.png"),
    ("bench demo --table there", "--table: cannot write there: it is a folder"),
    # options
    ("plan demo --min-group-width 0", "--min-group-width '0': expected auto or a number"),
    ("plan demo --min-group-width ²", "--min-group-width '²'"),
    ("plan demo --input-size 3", "--input-size '3': expected C,H,W"),
    ("plan demo --mean 0.5,x", "--mean '0.5,x': expected numbers"),
    ("plan demo --std nan", "--std 'nan': expected numbers"),
    ("plan demo --input-size 3,0,28", "--input-size '3,0,28': expected C,H,W"),
    ("plan demo --input-size a,b,c", "--input-size 'a,b,c': expected C,H,W"),
    ("plan demo --model-args {", "--model-args '{' is no JSON"),
    ("plan demo --model-args [1]", "--model-args '[1]': expected a JSON object"),
    ('plan demo --model-args {"classes":3}', "unexpected keyword argument 'classes'"),
    ("plan demo --include layer9.*", "pattern 'layer9.*' matches no conv", "layer"),
    ("plan demo --include layer3.0.conv3", "did you mean 'layer3.0.conv", "'layer3.0.conv3'"),
    ("plan demo --exclude nothing", "pattern 'nothing' matches no conv"),
    ("plan demo --structure depthwise", "unknown structure 'depthwise'"),
    ("plan demo --shuffle some", "unknown shuffle 'some'"),
    ("plan demo --shuffle auto", "unknown shuffle 'auto', expected one of none, all"),
    ("plan demo --structure grouped-pointwise --shuffle all", "the pointwise conv mixes the groups already"),
    ("plan demo --cpu sparc", "unknown CPU 'sparc': expected one of avx2, avx512"),
    ("plan demo --seed -1", "Invalid value for '--seed'"),
    ("convert demo --epochs 1", "--epochs 1 needs --data"),
    ("convert demo --precision int8", "--precision int8 needs --data to calibrate with"),
    ("export demo --precision both", "--precision int8 needs --data to calibrate with"),
    ("export demo --precision int4", "'int4' is not one of 'float32', 'int8', 'both'"),
    ("convert demo --reconstruct 10", "--reconstruct 10 needs --data"),
    ("convert demo --data demo --epochs -1", "epochs is -1.0; expected"),
    ("convert demo --data demo --epochs nan", "epochs is nan; expected"),
    ("convert demo --data demo --epochs 1 --learning-rate 0", "learning_rate is 0.0; expected"),
    ("convert demo --data demo --epochs 1 --batch-size 1", "batch_size is 1; expected"),
    ("convert demo --data demo --calibrate 0", "--calibrate '0': expected none or a number of images"),
    ("convert demo --data demo --calibrate some", "--calibrate 'some': expected none or a number"),
    ("convert demo --static-batch 0", "Invalid value for '--static-batch'"),
    ("convert demo --threads 0", "Invalid value for '--threads'"),
    ("bench demo --threads 0", "--threads '0': expected whole numbers from 1"),
    ("bench demo --batch-sizes 1,x", "--batch-sizes '1,x': expected whole numbers from 1"),
    ("plan demo --colour", "No such option", "--colour"),
    ("plan", "Missing argument 'MODEL'"),
    ("converts demo", "No such command 'converts'"),
    # folders to read
    ("evaluate missing-g4 --data demo", "no folder 'missing-g4', and as a model: unknown model"),
    ("evaluate out/missing --data demo", "no folder 'out/missing'"),
    ("evaluate there --data demo", "recipe.json"),
    ("finetune missing --data demo", "missing"),
    ("finetune . --data demo", "recipe.json"),
    ("bench missing", "missing"),
    ("bench there", "recipe.json"),
    ("export there", "recipe.json"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "pieces"), [(row[0], row[1:]) for row in BAD_INPUT])
def test_bad_input_gets_one_line_and_code_2(
    command: str, pieces: tuple[str, ...], run: Run, files: Path
) -> None:
    before = tree(files)
    outcome = run(*command.split())
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("groupify: error: ")
    assert outcome.err.count("\n") == 1
    for piece in pieces:
        assert piece in outcome.err
    assert tree(files) == before


def test_labels_out_of_range(run: Run, tmp_path: Path) -> None:
    """Found by the evaluation, behind the conversion: still nothing is left."""
    outcome = run(
        "convert", *TINY, "-g", 4, "--data", "tests.cli_nets:bad_labels", "--calibrate", 40, "-o", "out", "-q"
    )
    assert outcome.code == 2
    assert "label 10 is out of range: the model has 10 classes" in outcome.err
    assert tree(tmp_path) == {}
    outcome = run("evaluate", "tests.cli_nets:net", "--data", "tests.cli_nets:bad_labels")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "label 10 is out of range" in outcome.err


def test_a_bug_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero\nagain")

    monkeypatch.setattr(exporting, "check_parity", fail)
    outcome = run("convert", *TINY, "-g", 4, "-o", "out")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith(
        "groupify: error: internal error: ZeroDivisionError: by zero again; please report it"
    )
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("force", [False, True])
def test_an_interrupt_leaves_nothing(
    force: bool, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    if force:
        folder.mkdir()
        (folder / "recipe.json").write_text('{"format": "groupify"}')
    before = tree(tmp_path)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "check_parity", interrupt)
    outcome = run("convert", *TINY, "-g", 4, "-o", "out", *(["--force"] if force else []))
    left = "groupify: error: interrupted; nothing was written\n"
    assert (outcome.code, outcome.out, outcome.err) == (130, "", left)
    assert tree(tmp_path) == before


def test_full_disk(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(pipeline_run, "write_artefact", full)
    outcome = run("convert", *TINY, "-g", 4, "-o", "out")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "cannot write" in outcome.err
    assert "free some space" in outcome.err
    assert tree(tmp_path) == {}


def test_weights_that_cannot_be_had(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_: object) -> None:
        raise SpecError("cannot reach the hub")

    monkeypatch.setattr(zoo_load, "fetch_torchvision_state", unreachable)
    squeezenet = ("evaluate", "squeezenet1_1", "--data", "synthetic")
    strict = run(*squeezenet, "--weights", "DEFAULT")
    assert (strict.code, strict.err.count("\n")) == (2, 1)
    assert "cannot reach the hub" in strict.err
    auto = run(*squeezenet)  # goes on, as far as the data
    warning, refusal = auto.err.splitlines()
    assert warning.startswith("groupify: warning: squeezenet1_1 goes on with RANDOM weights (seed 0)")
    assert "no labelled test part" in refusal
    silent = run(*squeezenet, "--weights", "none")
    assert silent.err.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("options", "shown"), [([], True), (["--quiet"], False)])
def test_progress_bars_are_for_terminals(
    options: list[str], shown: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("tests.cli_nets:net", "--weights", "none")
    command = ("evaluate", *model, "--data", "tests.cli_nets:data", *options)
    assert run(*command).err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(*command).code == 0
    assert ("evaluate" in terminal.getvalue()) == shown


@pytest.mark.parametrize("as_json", [False, True])
def test_an_accuracy_below_the_least_asked_for_ends_with_4(as_json: bool, run: Run) -> None:
    model = ("tests.cli_nets:net", "--weights", "none", "--data", "tests.cli_nets:data")
    options = ("--json",) if as_json else ()
    assert run("evaluate", *model, "--min-top1", "0", *options).code == 0
    missed = run("evaluate", *model, "--min-top1", "99.5", *options)
    assert (missed.code, missed.err.count("\n")) == (4, 1)
    assert "--min-top1 99.5: tests.cli_nets:net has " in missed.err
    assert "top" in missed.out  # the result is printed all the same
    assert run("evaluate", *model, "--min-top1", "101").code == 2


def test_a_file_slower_than_asked_for_ends_with_4(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_onnx(net().eval(), tmp_path / f"{name}.onnx", input_shape=(3, 8, 8))
    command = ("bench", "--onnx", f"{tmp_path}/a.onnx,{tmp_path}/b.onnx", "--seconds", "0.1", "-q")
    assert run(*command, "--max-latency-ratio", "1000").code == 0
    missed = run(*command, "--max-latency-ratio", "0.001")
    assert (missed.code, missed.err.count("\n")) == (4, 1)
    assert "--max-latency-ratio 0.001: measured " in missed.err
    assert "b.onnx, threads 1, batch 1" in missed.err
    assert "a.onnx" not in missed.err
    assert "b.onnx" in missed.out
    assert run(*command, "--max-latency-ratio", "0").code == 2


@pytest.mark.parametrize("verb", ["", *cli.commands])
def test_help_has_an_example(verb: str, run: Run) -> None:
    outcome = run(*verb.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert (f"Example: groupify {verb} " in outcome.out) == bool(verb)


SECTIONS = [
    "Model",
    "How images become inputs",
    "What to convert",
    "How to fit",
    "Training",
    "Training run",
    "Output",
    "General",
]


def test_help_is_in_sections(run: Run) -> None:
    convert = cli.commands["convert"]
    assert isinstance(convert, SectionedCommand)
    context = click.Context(convert)
    sections = convert.sections(context)
    assert list(sections) == SECTIONS
    places = {
        name: title
        for title, lines in sections.items()
        for line in lines
        for name in re.split("[ ,]+", line[0])
    }
    options = [option for option in convert.get_params(context) if isinstance(option, click.Option)]
    assert len(options) > 50
    assert all(option.opts[-1] in places for option in options)
    # What every command has, and nothing else.
    general = {name for name, title in places.items() if title == "General" and name.startswith("--")}
    assert general == {"--seed", "--json", "--quiet", "--help"}
    shown = [line.removesuffix(":") for line in run("convert", "-h").out.splitlines()]
    assert [line for line in shown if line in SECTIONS] == SECTIONS


def test_verbs(run: Run) -> None:
    assert sorted(cli.commands) == ["bench", "convert", "evaluate", "export", "finetune", "plan", "report"]
    nothing = run()
    assert (nothing.code, nothing.out) == (2, "")
    assert nothing.err.startswith("Usage: ")
    assert all(verb in nothing.err for verb in cli.commands)


def test_plan_writes_nothing(run: Run, tmp_path: Path) -> None:
    outcome = run("plan", "demo", "--groups", 8, "--exclude", "layer3.*", "--cpu", "avx512")
    assert (outcome.code, outcome.err) == (0, "")
    assert tree(tmp_path) == {}
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["site", "shape", "groups", "params", "MACs", "reason"]
    rows = {line.split()[0]: line for line in lines[1:16]}
    assert rows["conv1"].endswith("first conv: too few input channels (3)")
    assert "64 → 64, 3×3, 14×14" in rows["layer1.0.conv1"]
    assert "1 → 4   36.9k → 9.22k" in rows["layer1.0.conv1"]
    assert rows["layer1.0.conv1"].endswith("clamped: groups narrower than 16 channels are slower")
    assert "1 → 8" in rows["layer2.1.conv1"]
    assert rows["layer3.0.conv1"].endswith("excluded")
    assert lines[-1] == "8 of 15 convs are converted, planned for avx512"
    assert not any(line.endswith(" ") for line in lines)


def test_plan_as_json(run: Run) -> None:
    command = ("plan", "demo", "--groups", 4, "--shuffle", "--json")
    outcome = run(*command)
    document = json.loads(outcome.out)
    assert document["groups"] == 4
    site = {site["name"]: site for site in document["sites"]}["layer3.0.conv1"]
    # 256 outputs of 128 / 4 inputs each, 3×3 taps, at 4×4 positions.
    assert site["params"] == {"dense": 128 * 256 * 9, "grouped": 32 * 256 * 9}
    assert site["macs"] == {"dense": 128 * 256 * 9 * 16, "grouped": 32 * 256 * 9 * 16}
    assert (site["groups_before"], site["shuffle"]) == (1, True)
    assert site["structure"] == {"reduce": None, "groups": 4, "expand": None}
    for key in ("params", "macs"):
        for side in ("dense", "grouped"):
            assert document[key][side] == sum(site[key][side] for site in document["sites"])
    assert run(*command).out == outcome.out


@pytest.mark.slow
def test_the_same_command_gives_the_same_result(run: Run, tmp_path: Path) -> None:
    data = ("--data", "tests.cli_nets:data")
    model = (*TINY, "--weights", "none")
    command = ("convert", *model, "-g", 4, *data, "--calibrate", 64, "--epochs", 1, "-o", "out", "--json")
    documents, weights = [], []
    for options in ([], ["--force"]):
        outcome = run(*command, *options)
        assert (outcome.code, outcome.err) == (0, ""), outcome.err
        document = json.loads(outcome.out)
        assert document == json.loads((tmp_path / "out" / "report.json").read_text())
        assert document.pop("latency_ms")["dense"] > 0
        assert document.pop("site_milliseconds")
        assert document.pop("command").startswith("groupify convert ")
        for row in document["history"]:
            row.pop("images_per_second")
        documents.append(document)
        weights.append(
            [(tmp_path / "out" / name).read_bytes() for name in ("model.safetensors", "recipe.json")]
        )
    assert documents[0] == documents[1]
    assert weights[0] == weights[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    refused = run(*command)
    assert (refused.code, refused.out) == (2, "")
    # A model of the user's own code is loaded again with the user's trust only.
    refused = run("evaluate", "out", *data)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--trust" in refused.err
    trusted = run("evaluate", "out", *data, "--trust")
    assert trusted.out == f"out: top-1 {100 * documents[0]['accuracy']['recovered']:.2f}% on 40 test images\n"


def test_files_of_any_size(run: Run, tmp_path: Path) -> None:
    net = ("tests.cli_nets:segmenter", "--input-size", "3,8,8", "--data", "tests.cli_nets:data", "-q")
    converted = run("convert", *net, "-g", 2, "--precision", "both", "-o", "any", "--dynamic-size")
    half = run("export", *net, "--precision", "float16", "-o", "half.onnx", "--dynamic-size")
    assert (converted.code, half.code) == (0, 0), converted.err + half.err
    assert ", at 3×8×8 and 3×9×11" in half.out
    for file in ("any/model.onnx", "any/model.int8.onnx", "half.onnx"):
        dims = onnx.load(str(tmp_path / file)).graph.input[0].type.tensor_type.shape.dim
        assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]
    report = json.loads((tmp_path / "any" / "report.json").read_text())
    assert report["parity"]["shapes"] == [[3, 8, 8], [3, 9, 11]]


def test_from_the_weights_alone(run: Run, tmp_path: Path) -> None:
    """No data, the table, and the default folder's name."""
    outcome = run("convert", *TINY, "--weights", "none", "-g", 2, "--static-batch", 2)
    assert (outcome.code, outcome.err) == (0, "")
    assert "no calibration images: accuracy is not protected" in outcome.out
    assert "the weights are random" in outcome.out
    for title in (
        "params",
        "MACs",
        "weight bytes",
        "peak activation bytes",
        "ONNX file",
        "latency (1 thread, batch 2)",
    ):
        assert f"\n{title}  " in outcome.out
    assert "top-1" not in outcome.out
    assert sorted(path.name for path in (tmp_path / "net-g2").iterdir()) == [
        "model.onnx",
        "model.safetensors",
        "recipe.json",
        "report.html",
        "report.json",
    ]
    graph = onnx.load(str(tmp_path / "net-g2" / "model.onnx")).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    report = json.loads((tmp_path / "net-g2" / "report.json").read_text())
    assert set(report["accuracy"].values()) == {None}
    model = groupify.load("net-g2", trust=True)
    conv = model.get_submodule("2")
    assert isinstance(conv, torch.nn.Conv2d)
    assert conv.groups == 2


# ---- budgets


def test_a_budget_is_planned_saved_and_converted(run: Run, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "plan.json"
    outcome = run(
        "plan", *TINY, "--budget", "macs=60%", "--cpu", "any", "--data", "tests.cli_nets:data",
        "--calibrate", 48, "--save-plan", path, "--frontier", "--frontier-plot", tmp_path / "f.png", "-q",
    )  # fmt: skip
    assert outcome.code == 0
    assert "planned for macs=60%: macs" in outcome.out
    assert "measured class probabilities off by" in outcome.out
    assert "← asked budget" in outcome.out
    assert list(cache.glob("sensitivity-*.json"))
    saved = json.loads(path.read_text())
    assert saved["model"] == TINY[0]
    dense = {"reduce": None, "groups": 1, "expand": None}
    converted = {site["name"]: site["structure"] for site in saved["sites"] if site["structure"] != dense}
    assert converted
    outcome = run("convert", *TINY, "--plan", path, "-o", tmp_path / "out", "-q", "--json")
    assert outcome.code == 0
    sites = json.loads(outcome.out)["sites"]
    found = {site["name"]: site["structure"] for site in sites if site["structure"] != dense}
    assert found == converted


def test_a_plan_file_may_give_any_structure(run: Run, tmp_path: Path) -> None:
    path, folder = tmp_path / "plan.json", tmp_path / "out"
    assert run("plan", *TINY, "-g", 2, "--min-group-width", 1, "--save-plan", path, "-q").code == 0
    plan = json.loads(path.read_text())
    given = [{"reduce": 16, "groups": 4, "expand": 32}, {"reduce": 24, "groups": 1, "expand": None}]
    names = [site["name"] for site in plan["sites"] if site["structure"]["groups"] == 2][:2]
    plan["sites"] = [
        {"name": name, "structure": structure, "shuffle": False}
        for name, structure in zip(names, given, strict=True)
    ]
    path.write_text(json.dumps(plan))
    data = ("--data", "tests.cli_nets:data", "--calibrate", 64)
    outcome = run("convert", *TINY, "--plan", path, *data, "-o", folder, "-q", "--json")
    assert outcome.code == 0
    document = json.loads(outcome.out)
    sites = {site["name"]: site["structure"] for site in document["sites"] if site["name"] in names}
    assert list(sites.values()) == given
    assert document["params"]["grouped"] < document["params"]["dense"]
    assert document["parity"]["max_rel_diff"] < 1e-3
    assert {fit["name"] for fit in document["fits"]} == set(names)
    again = run("evaluate", folder, "--data", "tests.cli_nets:data", "--trust", "-q")
    assert again.code == 0
    assert run("report", folder, "--format", "text").code == 0


def test_convert_takes_a_budget_and_says_what_it_won_against(run: Run, tmp_path: Path, cache: Path) -> None:
    outcome = run(
        "convert", *TINY, "--budget", "macs=60%,params=90%", "--data", "tests.cli_nets:data",
        "--calibrate", 48, "-o", tmp_path / "out", "-q", "--json", "--save-plan", tmp_path / "plan.json",
    )  # fmt: skip
    assert outcome.code == 0
    document = json.loads(outcome.out)
    assert document["macs"]["grouped"] <= 0.6 * document["macs"]["dense"]
    assert any(note.startswith("planned for macs=60%,params=90%") for note in document["notes"])
    assert (tmp_path / "plan.json").is_file()


def test_a_plan_for_a_budget_as_json(run: Run, cache: Path) -> None:
    outcome = run("plan", *TINY, "--budget", "macs=60%", "--frontier", "-q", "--json")
    assert outcome.code == 0
    document = json.loads(outcome.out)
    assert document["budget"] == ["macs=60%"]
    assert document["contenders"][0]["costs"]["macs"] <= 0.6 * document["dense_costs"]["macs"]
    assert sum(point["asked"] for point in document["frontier"]["points"]) == 1


def test_a_latency_table_made_by_bench_serves_a_plan(run: Run, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "table.json"
    outcome = run("bench", *TINY, "--table", path, "-q")
    assert outcome.code == 0
    assert f"wrote {path}" in outcome.out
    outcome = run("plan", *TINY, "--budget", "latency=99%", "--latency-table", path, "-q", "--json")
    # Within noise no plan may be faster for so small a net; either way the table was enough.
    assert outcome.code == 0 or "latency=99% cannot be held" in outcome.err
    assert not list(cache.glob("latency-*.json"))


def test_a_table_serves_plans_in_the_precisions_that_it_was_made_for(
    run: Run, tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "table.json"
    assert run("bench", *TINY, "--table", path, "--precision", "int8", "-q").code == 0
    assert all(shape.endswith(", int8") for shape in LatencyTable.read(path).convs)
    budget = ("--budget", "latency=99%", "--latency-table", path, "-q")
    outcome = run("plan", *TINY, *budget, "--precision", "int8", "--json")
    if outcome.code == 0:
        assert json.loads(outcome.out)["precision"] == "int8"
    else:  # within noise no plan may be faster for so small a net
        assert "latency=99% cannot be held" in outcome.err
    in_float32 = run("plan", *TINY, *budget)
    assert in_float32.code == 2
    assert "has no conv" in in_float32.err


def test_a_table_of_other_threads_is_refused(run: Run, tmp_path: Path, cache: Path) -> None:
    assert run("bench", *TINY, "--table", tmp_path / "table.json", "--threads", "1,2").code == 2
    table = LatencyTable("a device", threads=4)
    table.write(tmp_path / "table.json")
    outcome = run("plan", *TINY, "--budget", "latency=50%", "--latency-table", tmp_path / "table.json")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "was measured with 4 threads, not 1: give --threads 4" in outcome.err


@pytest.mark.parametrize(("plot", "says"), [("f.xyz", "'.xyz'"), ("f", "''")])
def test_a_plot_that_cannot_be_drawn_is_refused_at_once(run: Run, plot: str, says: str) -> None:
    refused = run("plan", "no such model", "--budget", "macs=60%", "--frontier-plot", plot)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert f"{plot}: its ending is {says}, expected one of" in refused.err
