"""Files from anywhere: timed in turns, and measured on data."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import groupify
from groupify.errors import GroupifyError, SpecError
from groupify.measure.onnx_files import bench_files
from groupify.onnx.exporting import export_onnx
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.onnx.providers import PROVIDERS, available_providers, check_started
from tests.conftest import Run

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    return export_onnx(net, tmp_path_factory.mktemp("files") / "float.onnx", input_shape=SHAPE).path


def foreign(path: Path, kind: int, shape: list[int | str]) -> Path:
    """Two inputs added up, of any type and shape, as some other tool might have written them."""
    inputs = [onnx.helper.make_tensor_value_info(name, kind, shape) for name in ("a", "b")]
    output = onnx.helper.make_tensor_value_info("sum", kind, shape)
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["a", "b"], ["sum"])], "g", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, str(path))
    return path


def test_files_of_any_kind_in_one_run(file: Path, tmp_path: Path) -> None:
    int8 = quantize_onnx(file, tmp_path / "int8.onnx", images=torch.rand(8, *SHAPE)).path
    result = bench_files([file, int8], batch_sizes=(1, 2), seconds=0.1)
    assert [(Path(row.path).name, row.batch_size) for row in result.rows] == [
        ("float.onnx", 1), ("int8.onnx", 1), ("float.onnx", 2), ("int8.onnx", 2)
    ]  # fmt: skip
    assert [row.speed_up for row in result.rows][::2] == [1, 1]
    assert all(row.median_ms > 0 for row in result.rows)
    assert [facts.quantised for facts in result.files] == [False, True]
    assert [facts.opset for facts in result.files] == [18, 18]
    assert result.files[0].blocked_convs is not None
    assert result.provider == "cpu"
    assert result.notes == ()


@pytest.mark.parametrize("kind", [onnx.TensorProto.INT64, onnx.TensorProto.DOUBLE])
def test_several_inputs_of_any_type(kind: int, tmp_path: Path) -> None:
    path = foreign(tmp_path / "sum.onnx", kind, ["n", 5])
    result = bench_files([path], batch_sizes=(3,), seconds=0.1)
    assert result.rows[0].images_per_second > 0
    assert result.files[0].opset == 15


def test_what_a_file_leaves_open_must_be_said(tmp_path: Path) -> None:
    path = foreign(tmp_path / "open.onnx", onnx.TensorProto.FLOAT, ["n", 3, "height", "width"])
    with pytest.raises(GroupifyError, match=r"leaves sizes open: give --input-size"):
        bench_files([path], seconds=0.1)
    assert len(bench_files([path], seconds=0.1, input_shape=(3, 4, 5)).rows) == 1
    with pytest.raises(GroupifyError, match=r"of shape \['n', 3, 'height', 'width'\], not \[1, 4, 4, 5\]"):
        bench_files([path], seconds=0.1, input_shape=(4, 4, 5))


def test_what_cannot_be_timed_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(GroupifyError, match=r"no file '.*gone.onnx'"):
        bench_files([file, tmp_path / "gone.onnx"])
    with pytest.raises(SpecError, match="named twice"):
        bench_files([file, file])
    text = foreign(tmp_path / "text.onnx", onnx.TensorProto.FLOAT, [2, 3])
    with pytest.raises(GroupifyError, match="takes batches of 2, not 1"):
        bench_files([text])


def test_providers_are_checked_against_what_is_installed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cpu" in available_providers()
    with pytest.raises(
        SpecError, match=r"unknown provider 'cudaa', expected one of cpu, cuda.*did you mean 'cuda'"
    ):
        bench_files([file], provider="cudaa")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SpecError, match=r"has no CoreMLExecutionProvider, only cpu: install"):
        bench_files([file], provider="coreml")


def test_a_provider_that_does_not_start_is_refused_and_one_that_does_is_marked_untried(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    with pytest.raises(GroupifyError, match="CUDAExecutionProvider does not start"):
        check_started(session, "cuda")
    monkeypatch.setitem(PROVIDERS, "xnnpack", "CPUExecutionProvider")
    result = bench_files([file], provider="xnnpack", seconds=0.1)
    assert "nothing has been measured with" in result.notes[0]
    assert result.files[0].blocked_convs is None


def test_on_the_command_line(run: Run, file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    again.write_bytes(file.read_bytes())
    outcome = run("bench", "--onnx", f"{file},{again}", "--seconds", 0.1, "-q")
    assert outcome.code == 0, outcome.err
    assert "again.onnx" in outcome.out
    assert "speed-up over the first file" in outcome.out
    outcome = run("bench", "--onnx", file, "--seconds", 0.1, "-q", "--json")
    assert [row["speed_up"] for row in json.loads(outcome.out)["rows"]] == [1]
    for options, words in (
        ((), "nothing to time"),
        (("--onnx", ","), "expected files"),
        (("folder", "--onnx", file), "--onnx times files alone: leave out folder"),
        (("--onnx", file, "--pytorch"), "leave out --pytorch"),
        (("folder", "--provider", "cuda"), "--provider is for files"),
        (("--onnx", file, "--provider", "coreml"), "has no CoreMLExecutionProvider"),
    ):
        refused = run("bench", *options)
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert words in refused.err


def test_accuracy_of_a_file_is_that_of_its_model(run: Run, tmp_path: Path) -> None:
    source = groupify.load_model("demo")
    data = groupify.load_data("demo", source.spec)
    shape, preprocessing = source.spec.input_shape, source.spec.preprocessing
    path = tmp_path / "demo.onnx"
    export_onnx(source.model, path, input_shape=shape, preprocessing=preprocessing, static_batch=8)
    int8 = tmp_path / "demo.int8.onnx"
    quantize_onnx(path, int8, images=groupify.calibration_images(data.for_calibration, 64, seed=0))
    outcome = run("evaluate", path, "--data", "demo", "-q", "--json")
    assert outcome.code == 0, outcome.err
    dense = json.loads(outcome.out)
    assert dense["images"] == 2000
    assert dense["top1"] == pytest.approx(0.935, abs=1e-3)
    outcome = run("evaluate", int8, "--data", "demo", "-q", "--json")
    assert json.loads(outcome.out)["top1"] == pytest.approx(dense["top1"], abs=0.02)


def test_files_that_hold_no_classifier_of_images(run: Run, file: Path, tmp_path: Path) -> None:
    pair = foreign(tmp_path / "pair.onnx", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])
    for target, options, words in (
        (tmp_path / "gone.onnx", (), "no file"),
        (pair, (), "takes a (tensor(float)), b (tensor(float)): expected one input"),
        (file, ("--input-size", "3,9,9"), "takes inputs of shape [3, 8, 8], not [3, 9, 9]"),
    ):
        refused = run("evaluate", target, "--data", "demo", *options)
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert words in refused.err
    refused = run("export", file)
    assert (refused.code, "is an ONNX file already" in refused.err) == (2, True)


def test_the_opset_of_an_export(run: Run, tmp_path: Path) -> None:
    options = ("--input-size", "3,8,8", "--model-args", '{"channels": 8}', "-q")
    outcome = run("export", "tests.cli_nets:net", *options, "--opset", 20, "-o", tmp_path / "net.onnx")
    assert outcome.code == 0, outcome.err
    assert onnx.load(str(tmp_path / "net.onnx")).opset_import[0].version == 20
    assert run("export", "tests.cli_nets:net", *options, "--opset", 11, "-o", tmp_path / "old.onnx").code == 2
    with pytest.raises(GroupifyError, match="opset 11: expected 18 to 23"):
        export_onnx(nn.Conv2d(3, 4, 1), tmp_path / "old.onnx", input_shape=SHAPE, opset=11)
