"""Which model the command line means: whose code may run, which weights, what the folder is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import groupify
from groupify.cli.shared import model_label
from groupify.errors import SpecError
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.pipeline.folders import dense_source
from groupify.recipe import Recipe
from groupify.structures import Plan
from tests.cli_nets import net
from tests.conftest import Run

NAME = "tests.cli_nets:net"
DATA = ("--data", "tests.cli_nets:data")


def recipe(origin: WeightsOrigin, plan: Plan | None = None) -> Recipe:
    spec = ModelSpec(NAME, {"channels": 32}, (3, 8, 8), None)
    return Recipe(spec, origin, () if plan is None else plan.recipes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder of a model of the user's own."""
    dense = net().eval()
    plan = groupify.plan(dense, (3, 8, 8), groups=2, rules=groupify.Rules(min_group_width=1))
    converted = groupify.convert(dense, plan)
    groupify.save(tmp_path / "out", converted.model, recipe(WeightsOrigin("factory"), plan))
    return tmp_path / "out"


@pytest.mark.parametrize("verb", ["evaluate", "export", "finetune"])
def test_a_factory_named_on_the_command_line_needs_no_trust(verb: str, folder: Path, run: Run) -> None:
    needed = {"evaluate": DATA, "export": ("--python", "net.py"), "finetune": (*DATA, "-o", "out")}[verb]
    refused = run(verb, "out", *needed, *(("--force",) if verb == "finetune" else ()))
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert f"--model {NAME}" in refused.err
    other = run(verb, "out", *needed, "--model", "os:getcwd")
    assert f"--model os:getcwd: the recipe of out names '{NAME}'" in other.err
    if verb != "finetune":
        assert run(verb, "out", *needed, "--model", NAME).code == 0


def test_naming_a_factory_needs_a_folder(run: Run) -> None:
    refused = run("evaluate", NAME, *DATA, "--input-size", "3,8,8", "--model", NAME)
    assert "goes with an output folder" in refused.err


def test_the_dense_weights_are_found_where_the_recipe_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(WeightsOrigin("checkpoint", "w.safetensors"))
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    dense = net()
    save_file(dense.state_dict(), tmp_path / "w.safetensors")
    for here, beside in ((tmp_path, Path("out")), (tmp_path / "elsewhere", Path(os.pardir, "out"))):
        monkeypatch.chdir(here)
        source = dense_source(made, None, beside=beside, trust=True)
        assert torch.equal(source.model.state_dict()["0.weight"], dense.state_dict()["0.weight"])
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(SpecError, match=r"'checkpoint w.safetensors', which is not here; give --checkpoint"):
        dense_source(made, None, beside=tmp_path / "out", trust=True)


def test_a_factory_s_own_weights_are_the_teacher(tmp_path: Path) -> None:
    source = dense_source(recipe(WeightsOrigin("factory")), None, beside=tmp_path, trust=True)
    assert source.weights.pretrained
    source = dense_source(recipe(WeightsOrigin("random", 3)), None, beside=tmp_path, trust=True)
    torch.manual_seed(3)
    assert torch.equal(source.model.state_dict()["0.weight"], net().state_dict()["0.weight"])


def test_the_weights_of_a_model_in_memory_are_not_made_up(tmp_path: Path) -> None:
    made = recipe(WeightsOrigin("given"))
    with pytest.raises(SpecError, match=r"were those of a model in memory: give --checkpoint FILE"):
        dense_source(made, None, beside=tmp_path, trust=True)
    dense = net()
    save_file(dense.state_dict(), tmp_path / "w.safetensors")
    source = dense_source(made, tmp_path / "w.safetensors", beside=tmp_path, trust=True)
    assert torch.equal(source.model.state_dict()["0.weight"], dense.state_dict()["0.weight"])


@pytest.mark.parametrize(
    ("name", "arguments", "label"),
    [
        ("timm:create_model", {"model_name": "resnet18.a1_in1k", "pretrained": True}, "resnet18.a1_in1k"),
        ("timm:create_model", {"model_name": "hf_hub:timm/resnet18"}, "resnet18"),
        ("my.models:get", {"name": "../../x", "model": 3}, "x"),
        ("my.models:get", {"name": "/"}, "get"),
        ("my.models:Nets.small", {"width": 3}, "small"),
        ("resnet50", {"num_classes": 3}, "resnet50"),
        ("demo", {}, "demo"),
    ],
)
def test_files_are_called_after_the_model(name: str, arguments: dict[str, object], label: str) -> None:
    assert model_label(name, arguments) == label
