"""``--precision int8`` and ``both``: the int8 file, dense int8 as its rival, and what the reports say."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from rich.console import Console

import groupify
from groupify.errors import ConversionError, GroupifyWarning
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.onnx.comparison import Agreement
from groupify.onnx.exporting import ExportedModel
from groupify.pipeline.exporting import export_and_check
from groupify.pipeline.folders import precisions_of
from groupify.pipeline.requests import ExportOptions
from groupify.pipeline.timing import Timed, latency_notes
from groupify.recipe import RECIPE_HASH
from groupify.reporting.html import comparison_page, report_page
from groupify.reporting.read import Run as ReadRun
from groupify.reporting.results import Int8File, LatencyChange
from groupify.reporting.summary import verdict
from groupify.reporting.text import int8_line, markdown, print_report
from groupify.structures import FilePrecision
from tests.cli_nets import INPUT_SIZE, net
from tests.conftest import Run
from tests.reporting.test_reporting import REPORT

NET = ("tests.cli_nets:net", "--input-size", INPUT_SIZE, "--model-args", '{"channels": 64}')
DATA = ("--data", "tests.cli_nets:data")
INT8 = Int8File(
    file_bytes=2048,
    calibration_images=256,
    reduced_range=False,
    agreement=Agreement(0.47, 0.038, 0.992, 256),
    top1=0.91,
    milliseconds=0.39,
    speed_up=4.0,
    speed_up_over_float=1.32,
    speed_up_over_dense_int8=1.6,
)
DENSE_INT8 = dataclasses.replace(
    INT8, file_bytes=4096, top1=0.935, milliseconds=0.62, speed_up=2.5, speed_up_over_float=2.5,
    speed_up_over_dense_int8=1.0,
)  # fmt: skip


def timed(
    speed_up: float = 3.0,
    over_float: float | None = None,
    *,
    over_dense_int8: float = 1.6,
    steady: bool = True,
) -> Timed:
    latency, int8 = LatencyChange(6.0, 2.0, speed_up, 1, 1, steady), None
    if over_float is not None:
        int8 = dataclasses.replace(
            INT8, speed_up_over_float=over_float, speed_up_over_dense_int8=over_dense_int8
        )
    return Timed(latency, ExportedModel(Path("dense.onnx"), 18, 1, ("input",), ("output",), 0, 0), int8)


def test_the_precisions_of_a_folder_are_those_of_its_files(tmp_path: Path) -> None:
    rules = groupify.Rules(min_group_width=1, precision="int8")
    example = torch.randn(2, 3, 8, 8)
    groupify.compress(net(), groups=2, rules=rules, example_inputs=example).save(tmp_path / "out")
    assert precisions_of(tmp_path / "out") == ("int8",)  # no file: what it was planned for
    (tmp_path / "out" / "model.onnx").touch()
    assert precisions_of(tmp_path / "out") == ("float32",)
    (tmp_path / "out" / "model.int8.onnx").touch()
    assert precisions_of(tmp_path / "out") == ("float32", "int8")


@pytest.mark.slow
def test_convert_and_finetune_and_export(run: Run, tmp_path: Path) -> None:
    outcome = run("convert", *NET, *DATA, "--calibrate", 64, "-g", 4, "--min-group-width", 16,
                  "--precision", "both", "-o", "out", "--json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
    int8, file = document["int8"], tmp_path / "out" / "model.int8.onnx"
    assert document["files"]["onnx_int8"] == "out/model.int8.onnx"
    assert int8["file_bytes"] == file.stat().st_size < document["onnx_bytes"]["grouped"]
    assert int8["calibration_images"] == 96  # all there are
    assert int8["agreement"]["images"] == 40  # the test part
    assert 0 < int8["agreement"]["max_rel_diff"] < 0.2
    assert 0 <= int8["top1"] <= 1
    assert math.isclose(int8["top1"] * 40, round(int8["top1"] * 40))
    times = document["latency_ms"]
    # The speed-ups come from rounds in which all ran side by side, the medians from all rounds.
    assert int8["milliseconds"] > 0
    assert math.isclose(int8["speed_up"] / int8["speed_up_over_float"], times["speed_up"], rel_tol=0.5)
    assert (int8["speed_up_over_float"] < 1) == any("int8 is slower" in note for note in document["notes"])
    dense = document["dense_int8"]
    assert dense["file_bytes"] > int8["file_bytes"]
    assert 0 <= dense["top1"] <= 1
    assert dense["agreement"]["images"] == 40
    assert dense["milliseconds"] > 0
    assert dense["speed_up_over_dense_int8"] == 1
    over_dense = dense["milliseconds"] / int8["milliseconds"]
    assert math.isclose(int8["speed_up_over_dense_int8"], over_dense, rel_tol=0.5)
    assert document["precision"] == "int8"
    metadata = {entry.key: entry.value for entry in onnx.load(str(file)).metadata_props}
    assert metadata[RECIPE_HASH]

    tuned = run("finetune", "out", *DATA, "--epochs", 1, "--trust")
    assert tuned.code == 0, tuned.err
    assert "\nint8: " in tuned.out
    assert "\ndense int8 " in tuned.out
    names = {path.name for path in (tmp_path / "out-finetuned").glob("*.onnx")}
    assert names == {"model.onnx", "model.int8.onnx"}  # as in the folder
    recipe = groupify.Recipe.read(tmp_path / "out-finetuned" / "recipe.json")
    assert recipe.precision == "int8"
    assert recipe.calibration == groupify.Recipe.read(tmp_path / "out" / "recipe.json").calibration
    assert json.loads((tmp_path / "out-finetuned" / "report.json").read_text())["precision"] == "int8"

    command = (
        "export", "out", *DATA, "--precision", "both", "--trust", "-o", "net.onnx", "--static-batch", 3,
    )  # fmt: skip
    exported = run(*command, "--json")
    assert exported.code == 0, exported.err
    document = json.loads(exported.out)
    assert document["files"] == {"onnx": "net.onnx", "onnx_int8": "net.int8.onnx"}
    assert document["parity"]["real_images"] > 0
    assert document["int8"]["speed_up"] is None  # no dense model was timed
    assert document["int8"]["milliseconds"] > 0
    float_file = onnx.load(str(tmp_path / "net.onnx"))
    assert {entry.key: entry.value for entry in float_file.metadata_props}[RECIPE_HASH]
    (tmp_path / "net.onnx").unlink()
    again = run(*command)
    assert (again.code, again.err) == (
        2, "groupify: error: net.int8.onnx exists; give --force to replace it, or another file with -o\n",
    )  # fmt: skip
    assert "int8: " in run(*command, "--force").out
    alone = run("export", "out", *DATA, "--precision", "int8", "--trust", "-o", "alone.onnx", "--json")
    document = json.loads(alone.out)
    assert document["files"] == {"onnx_int8": "alone.onnx"}
    assert document["onnx_bytes"] is None
    nodes = onnx.load(str(tmp_path / "alone.onnx")).graph.node
    assert any(node.op_type == "QuantizeLinear" for node in nodes)
    assert not list(tmp_path.glob("alone.*.onnx"))


def test_a_file_in_float16(run: Run, tmp_path: Path) -> None:
    command = ("export", *NET, "--precision", "float16", "--quiet")
    outcome = run(*command, "--json")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["files"] == {"onnx_float16": "net.float16.onnx"}
    assert document["onnx_bytes"] is None
    assert 0 < document["float16"]["max_rel_diff"] < 0.01
    half = onnx.load(str(tmp_path / "net.float16.onnx"))
    kinds = {weights.data_type for weights in half.graph.initializer if len(weights.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert half.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    said = run(*command, "--force", "-o", "half.onnx")
    assert "float16: largest difference " in said.out
    assert [path.name for path in sorted(tmp_path.glob("*.onnx"))] == ["half.onnx", "net.float16.onnx"]


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter("8.weight").mul_(1e7)
    options = ExportOptions(precisions=("float16",))
    paths: dict[FilePrecision, Path] = {"float32": tmp_path / "a.onnx", "float16": tmp_path / "b.onnx"}
    with pytest.raises(ConversionError, match=r"in float16 the outputs of .* are off by .*%: numbers"):
        export_and_check(
            model, ModelSpec("net", {}, (3, 8, 8), None), paths, options, None, recipe_sha256=None, seed=0,
            progress=False,
        )  # fmt: skip
    assert not paths["float16"].exists()


def test_a_report_with_int8() -> None:
    report = dataclasses.replace(REPORT, int8=INT8)
    console = Console(file=io.StringIO(), width=400, no_color=True)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    assert (
        "int8: 2.0 KiB, top-1 91.00%, same top-1 as float on 99.2% of 256 images, largest difference 0.47 "
        "(3.8% of the output), 0.39 ms, 4.00× over dense and 1.32× over the float file\n"
    ) in console.file.getvalue()
    document = report.values()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["int8"]["agreement"]["max_abs_diff"] == 0.47
    broken = dataclasses.replace(INT8, agreement=Agreement(math.nan, math.nan, 0.0, 4))
    assert dataclasses.replace(report, int8=broken).values()["int8"]["agreement"]["max_abs_diff"] is None
    bare = Int8File(2048, 256, False, Agreement(0.47, 0.038, None, 256))
    assert int8_line(bare) == "int8: 2.0 KiB, largest difference 0.47 (3.8% of the output)"


def test_dense_int8_stands_beside_dense_float32(tmp_path: Path) -> None:
    report = dataclasses.replace(REPORT, int8=INT8, dense_int8=DENSE_INT8, weights=WeightsOrigin("factory"))
    console = Console(file=io.StringIO(), width=400, no_color=True)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    shown = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["dense", "float32", "93.65%", "145.78", "ms", "1.00×", "0.40×", "136.7", "KiB"] in shown
    assert ["dense", "int8", "93.50%", "0.62", "ms", "2.50×", "1.00×", "4.0", "KiB"] in shown
    assert ["grouped", "float32", "92.50%", "47.17", "ms", "3.10×", "1.24×", "68.4", "KiB"] in shown
    assert ["grouped", "int8", "91.00%", "0.39", "ms", "4.00×", "1.60×", "2.0", "KiB"] in shown
    assert verdict(report) == "1.6× faster than dense int8, 2.0× smaller, 2.5 points less accurate"
    alone = dataclasses.replace(report, files={"onnx_int8": "out/model.int8.onnx"})
    assert "grouped float32" not in markdown([ReadRun("out", alone)])
    weak = dataclasses.replace(INT8, speed_up=2.0, speed_up_over_dense_int8=0.8)
    assert verdict(dataclasses.replace(alone, int8=weak)).startswith("1.2× slower than dense int8")
    no_vnni = dataclasses.replace(DENSE_INT8, speed_up=0.8)
    slow = dataclasses.replace(report, int8=dataclasses.replace(INT8, speed_up=2.4), dense_int8=no_vnni)
    assert verdict(slow).startswith("3.1× faster than dense float32")


def test_dense_int8_stands_on_the_pages_too() -> None:
    report = dataclasses.replace(REPORT, int8=INT8, dense_int8=DENSE_INT8)
    page = report_page(ReadRun("out", report))
    assert "<td>dense int8</td>" in page
    assert "dense int8: 0.62 ms, 93.50%" in page
    runs = [ReadRun("one", report), ReadRun("two", REPORT)]
    compared = comparison_page(runs)
    for name in ("dense float32", "dense int8", "one, float32", "one, int8", "two, float32"):
        assert f'data-sort="{name}"' in compared
    assert "| dense int8 | 93.50% | −0.15 points | 0.62 ms | 2.50× |" in markdown(runs)


def test_what_does_not_pay_is_said() -> None:
    assert latency_notes(timed()) == ()
    assert latency_notes(timed(over_float=1.2)) == ()
    (note,) = latency_notes(timed(over_float=0.8))
    assert note.startswith("int8 is slower than float on this machine: 0.80× its speed")
    with pytest.warns(GroupifyWarning, match=r"slower than the dense model.*0\.91"):
        (note,) = latency_notes(timed(0.91))
    assert "speed-up 0.91" in note
    with pytest.warns(GroupifyWarning, match=r"dense int8 wins on this machine: .* 0\.70× its speed"):
        (note,) = latency_notes(timed(3.0, 1.3, over_dense_int8=0.7))
    assert "groupify export MODEL --precision int8" in note
    assert latency_notes(timed(0.91, steady=False)) == ()  # a busy machine has a note of its own
