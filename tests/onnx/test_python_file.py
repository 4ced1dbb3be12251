"""The Python file rebuilds the model in a process that has no groupify."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import groupify
from groupify.conversion.surgery import restructure
from groupify.errors import ArtefactError, SpecError
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.onnx import standalone
from groupify.onnx.python_file import python_file, write_python_file
from groupify.structures import SiteRecipe, Structure
from tests.conftest import Run
from tests.conversion.nets import images, randomise

_READER = """
import sys
sys.modules["groupify"] = sys.modules["safetensors"] = sys.modules["onnx"] = None
sys.path.insert(0, sys.argv[1])
import importlib, torch
torch.set_num_threads(1)  # as in the tests: sums in another order differ in their last bits
outputs = {}
for stem in sys.argv[2:]:
    module = importlib.import_module(stem)
    model = module.load(f"{sys.argv[1]}/{stem}/model.safetensors")
    shape = (2, *module.INPUT_SHAPE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs[stem] = model(x)
try:
    import groupify
except ImportError:
    torch.save(outputs, f"{sys.argv[1]}/outputs.pt")
"""

CASES: Mapping[str, tuple[str, dict[str, Any], tuple[int, int, int], int, dict[str, Any]]] = {
    "shuffled": ("demo", {}, (3, 28, 28), 4, {"shuffle": "all"}),
    "pointwise": (
        "groupify.models.demo:fashion_resnet18", {}, (3, 28, 28), 8, {"structures": "grouped-pointwise"}
    ),
    # Refuses weights without its own version number.
    "versioned": ("mnasnet0_5", {"num_classes": 4}, (3, 32, 32), 2, {}),
    "no_norms": ("squeezenet1_1", {"num_classes": 4}, (3, 32, 32), 4, {}),
}  # fmt: skip


def write(folder: Path, stem: str) -> torch.Tensor:
    """Convert, save, write the file; the model's outputs."""
    name, arguments, shape, groups, options = CASES[stem]
    source = groupify.load_model(name, weights="none", arguments=arguments, input_shape=shape)
    plan = groupify.plan(
        source.model, shape, groups=groups, rules=groupify.Rules(min_group_width=1, **options)
    )
    model = restructure(source.model, plan.recipes)
    if stem == "no_norms":
        model = model.to(memory_format=torch.channels_last)
    recipe = groupify.Recipe(source.spec, source.weights, plan.recipes)
    recipe = groupify.save(folder / stem, model, recipe)
    write_python_file(recipe, folder / f"{stem}.py")
    x = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs: torch.Tensor = groupify.load(folder / stem)(x)
    return outputs


@pytest.mark.slow
def test_bit_equal_outputs_where_groupify_cannot_be_imported(tmp_path: Path) -> None:
    expected = {stem: write(tmp_path, stem) for stem in CASES}
    subprocess.run([sys.executable, "-I", "-c", _READER, str(tmp_path), *CASES], check=True)
    found = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for stem in CASES:
        assert torch.equal(found[stem], expected[stem]), stem
        assert "groupify" not in (tmp_path / f"{stem}.py").read_text().partition("import")[2], stem


@pytest.mark.parametrize("conv", [nn.Conv1d(8, 16, 3, padding=1), nn.Conv3d(8, 16, (1, 3, 3), bias=False)])
@pytest.mark.parametrize(
    "site",
    [
        (None, 4, None, True), (None, 2, None, False), (None, 2, 16, False), (6, 2, 10, False),
        (4, 1, None, False), (8, 8, 8, False),
    ],
)  # fmt: skip
def test_in_one_and_three_dimensions(
    conv: nn.Module, site: tuple[int | None, int, int | None, bool], tmp_path: Path
) -> None:
    net = nn.Sequential(conv, nn.ReLU())
    ours = randomise(restructure(net, [SiteRecipe("0", Structure(*site[:3]), site[3])])).eval()
    theirs = standalone.with_groups(net, {"0": site})
    safetensors.torch.save_file(ours.state_dict(), tmp_path / "weights")
    theirs = standalone.fill(theirs, standalone.read_safetensors(tmp_path / "weights"), channels_last=False)
    x = images(2, (8, 6) if isinstance(conv, nn.Conv1d) else (8, 2, 6, 6))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert type(net[0]) is type(conv)


@pytest.mark.parametrize("dtype", list(standalone.DTYPES.values()), ids=str)
def test_safetensors_of_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    values = {"a": torch.tensor([[0, 1], [1, 0]]), "b": torch.tensor(1), "c": torch.zeros(0, 3)}
    state = {name: value.to(dtype) for name, value in values.items()}
    safetensors.torch.save_file(state, tmp_path / "weights", metadata={"format": "pt"})
    found = standalone.read_safetensors(tmp_path / "weights")
    assert set(found) == set(state)
    for name, value in state.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value)


def recipe_of(name: str, **changes: Any) -> groupify.Recipe:
    spec = ModelSpec(name, {}, (3, 8, 8), None)
    origin = WeightsOrigin("factory")
    return dataclasses.replace(
        groupify.Recipe(spec, origin, (SiteRecipe("a", Structure(groups=2)),)), **changes
    )


def test_code_of_others_is_imported_only_if_trusted() -> None:
    recipe = recipe_of("tests.conversion.nets:Residual")
    with pytest.raises(SpecError, match="give --trust"):
        python_file(recipe, stem="net")
    text = python_file(recipe, stem="net", trust=True)
    assert "import tests.conversion.nets" in text
    assert "tests.conversion.nets.Residual(**arguments)" in text
    compile(text, "net.py", "exec")


@pytest.mark.parametrize(
    "name", ["os:system('x') or print", "a b:c", "os;x:y", "groupify.models.demo:nn.Module", ":x"]
)
def test_a_recipe_cannot_put_code_into_the_file(name: str) -> None:
    with pytest.raises(ArtefactError):
        python_file(recipe_of(name), stem="net", trust=True)


def test_names_of_layers_are_literals() -> None:
    name = "'): 1}\nimport os; os.system('x')#\"\"\""
    recipe = recipe_of("resnet18", sites=(SiteRecipe(name, Structure(groups=2)),))
    names: dict[str, Any] = {}
    text = python_file(recipe, stem="net")
    exec(compile(text, "net.py", "exec"), names)
    assert names["SITES"] == {name: (None, 2, None, False)}


def test_the_command(run: Run, tmp_path: Path) -> None:
    write(tmp_path, "no_norms")
    made = run("export", "no_norms", "--python", "net.py", "--json")
    assert made.code == 0
    assert "def load(path" in (tmp_path / "net.py").read_text()
    again = run("export", "no_norms", "--python", "net.py")
    assert again.code == 2
    assert "net.py exists; give --force to replace it, or another file with --python" in again.err
    assert run("export", "no_norms", "--python", "net.py", "--force").code == 0
    assert "needs an output folder" in run("export", "demo", "--python", "other.py").err
    assert not (tmp_path / "other.py").exists()


class Keeping(nn.Module):
    """Tensors that are no part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3), persistent=False)
        self.shift = torch.zeros(3)


def test_tensors_outside_of_the_state_take_what_was_saved() -> None:
    dense, values = Keeping(), torch.tensor([3.0, 1.0, 2.0])
    model: Any = standalone.fill(dense, OrderedDict(scale=values, shift=values + 1), channels_last=False)
    assert torch.equal(model.scale, values)
    assert torch.equal(model.shift, values + 1)
