"""Models of timm and of Hugging Face, where they are installed, by their own constructors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.conversion.conversion import Calibration
from groupify.errors import PlanError
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from tests.conftest import Run
from tests.conversion.nets import images

SHAPE = (3, 32, 32)


def whole_way(name: str, arguments: dict[str, Any], shape: tuple[int, ...], folder: Path) -> nn.Module:
    """Plan, convert, save, load, export; the loaded model computes the same, and so does ONNX Runtime."""
    source = groupify.load_model(name, arguments=arguments, input_shape=shape)
    plan = groupify.plan(source.model, shape, groups=2, rules=groupify.Rules(min_group_width=8))
    result = groupify.convert(source.model, plan, Calibration(images(24, shape), restarts=0))
    recipe = groupify.Recipe(source.spec, source.weights, plan.recipes)
    groupify.save(folder / "out", result.model, recipe)
    loaded = groupify.load(folder / "out", trust=True)
    x = images(2, shape, seed=1)
    with torch.no_grad():
        one, other = leaves(result.model.eval()(x)), leaves(loaded(x))
    assert one
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    exported = export_onnx(loaded, folder / "model.onnx", input_shape=shape)
    assert check_parity(loaded, exported.path, input_shape=shape).max_rel_diff < 1e-4
    return loaded


def leaves(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output.values())


@pytest.mark.filterwarnings("ignore:.* layers have fewer samples than inputs")
def test_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    arguments = {"model_name": "test_efficientnet", "num_classes": 10}
    whole_way("timm:create_model", arguments, SHAPE, tmp_path)


@pytest.mark.slow
def test_timm_on_the_command_line(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    arguments = json.dumps({"model_name": "test_resnet", "num_classes": 10})
    options = ("--model-args", arguments, "--input-size", "3,32,32", "--include", "layer4.*")
    outcome = run(
        "convert",
        "timm:create_model",
        *options,
        "--groups",
        4,
        "--data",
        "synthetic",
        "--calibrate",
        8,
        "-o",
        "out",
        "--json",
    )
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["parity"]["max_rel_diff"] < 1e-4
    recipe = groupify.Recipe.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe.model.name == "timm:create_model"
    assert run("export", "out", "-o", "again.onnx", "--trust").code == 0
    refused = run("export", "out", "-o", "other.onnx")
    assert refused.code == 2
    assert "made by code of its own, which is not run unasked" in refused.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* layers have fewer samples than inputs")
def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    loaded = whole_way("tests.hf_nets:segformer", {}, SHAPE, tmp_path)
    with torch.no_grad():
        assert set(loaded(images(1, SHAPE))) == {"logits"}


def test_hugging_face_on_the_command_line(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options = ("--model-args", '{"hidden_sizes": [32, 32, 32, 32]}', "--input-size", "3,8,8")
    outcome = run(
        "convert", "tests.hf_nets:resnet", *options, "--min-group-width", 16, "--groups", 2,
        "--data", "tests.cli_nets:data", "--calibrate", 64, "-o", "out", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["accuracy"]["images"] == 40  # by the logits of the output
    assert document["parity"]["max_rel_diff"] < 1e-4
    evaluated = run("evaluate", "out", "--data", "tests.cli_nets:data", "--trust", "--json")
    assert json.loads(evaluated.out)["top1"] == document["accuracy"]["converted"]
    wrong = run("plan", "tests.hf_nets:resnet", "--input-size", "1,8,8")
    assert wrong.code == 2
    assert "does not run on an input of shape (1, 1, 8, 8): Make sure that the channel dimension" in wrong.err


def test_hugging_face_s_transformers_have_nothing_to_convert() -> None:
    pytest.importorskip("transformers")
    source = groupify.load_model("tests.hf_nets:vit", input_shape=SHAPE)
    with pytest.raises(PlanError, match="no convolution worth grouping"):
        groupify.plan(source.model, SHAPE, groups=2)


def test_outputs_in_outputs_are_exported(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = groupify.load_model("tests.hf_nets:resnet", arguments={"output_hidden_states": True})
    exported = export_onnx(source.model, tmp_path / "model.onnx", input_shape=SHAPE)
    assert len(exported.output_names) > 1
    assert check_parity(source.model, exported.path, input_shape=SHAPE).max_rel_diff < 1e-4
