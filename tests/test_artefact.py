from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from groupify.artefact import WEIGHTS_FILE, load, read_recipe, save
from groupify.conversion.surgery import restructure
from groupify.errors import ArtefactError, CheckpointError, ConversionError, GroupifyError
from groupify.files import RECIPE_FILE
from groupify.models.sources import build_model
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.recipe import Recipe
from groupify.structures import SiteRecipe, Structure
from tests.test_recipe import VALUES, paths_of, replaced


class TinyNet(nn.Module):
    """A shared conv, a tied linear, a batch norm, and a buffer outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.again = self.body[0]
        self.head = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.full((), 0.5), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.again(self.body(self.stem(inputs) * self.scale))
        logits: Tensor = self.tied(self.head(features.mean((2, 3))))
        return logits


SITES = (SiteRecipe("body.0", Structure(groups=4), shuffle=True),)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return model.eval()


def recipe_of(name: str, sites: tuple[SiteRecipe, ...], **arguments: Any) -> Recipe:
    spec = ModelSpec(name, arguments, (3, 8, 8), None)
    return Recipe(spec, WeightsOrigin("random", 0), sites, metrics={"top1": 0.5})


def images(seed: int = 1, side: int = 8) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def set_recipe(folder: Path, *path: str | int, value: Any) -> None:
    """Change one value of a saved recipe."""
    document = json.loads((folder / RECIPE_FILE).read_text())
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    (folder / RECIPE_FILE).write_text(json.dumps(document))


def set_weights(folder: Path, content: bytes) -> None:
    """Replace the weights, with a matching hash."""
    (folder / WEIGHTS_FILE).write_bytes(content)
    set_recipe(folder, "sha256", value=hashlib.sha256(content).hexdigest())


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return randomised(restructure(TinyNet(), SITES))


@pytest.fixture
def saved(tmp_path: Path, tiny: nn.Module) -> Path:
    save(tmp_path / "tiny", tiny, recipe_of("user_models:tiny", SITES))
    return tmp_path / "tiny"


@pytest.mark.slow
def test_the_demo_comes_back_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    names = [f"layer{stage}.1.conv{index}" for stage in (1, 2, 3) for index in (1, 2)]
    sites = (
        *(SiteRecipe(name, Structure(groups=4), shuffle="conv1" in name) for name in names),
        SiteRecipe("layer2.0.conv2", Structure(None, 8, 32)),
    )
    recipe = recipe_of("demo", sites)
    model = randomised(restructure(build_model(recipe.model), sites))
    written = save(tmp_path / "out", model, recipe)
    assert sorted(child.name for child in (tmp_path / "out").iterdir()) == [WEIGHTS_FILE, RECIPE_FILE]
    assert read_recipe(tmp_path / "out") == written
    assert written == dataclasses.replace(recipe, sha256=written.sha256)

    loaded = load(tmp_path / "out")
    assert not any(module.training for module in loaded.modules())
    assert list(loaded.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        expected = model(images(side=28))
        assert torch.equal(loaded(images(side=28)), expected)

    torch.save({"images": images(side=28), "expected": expected}, tmp_path / "expected.pt")
    script = (
        "import sys, torch, groupify.artefact as artefact\n"
        "saved = torch.load(sys.argv[2], weights_only=True)\n"
        "outputs = artefact.load(sys.argv[1])(saved['images'])\n"
        "sys.exit(0 if torch.equal(outputs, saved['expected']) else 5)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out"), str(tmp_path / "expected.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr


# MNASNet wants the version of its state; RegNet cannot be built without memory.
@pytest.mark.parametrize(
    ("name", "site", "groups"),
    [("mnasnet0_5", "layers.0", None), ("regnet_y_400mf", "trunk_output.block1.block1-0.proj.0", 2)],
)
def test_awkward_torchvision_models_come_back(
    tmp_path: Path, name: str, site: str, groups: int | None
) -> None:
    sites = () if groups is None else (SiteRecipe(site, Structure(groups=groups)),)
    recipe = recipe_of(name, sites, num_classes=7)
    model = restructure(build_model(recipe.model), sites).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    save(tmp_path / "out", model, recipe)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(images(side=64)), model(images(side=64)))


def test_a_given_dense_model_is_converted_as_a_copy(saved: Path, tiny: nn.Module) -> None:
    dense = randomised(TinyNet(), seed=3).train()
    before = copy.deepcopy(dense.state_dict())
    loaded = load(saved, model=dense)
    assert torch.equal(loaded(images()), tiny(images()))
    assert dense.training
    conv = dense.get_submodule("body.0")
    assert type(conv) is nn.Conv2d
    assert conv.groups == 1
    for key, value in dense.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_shared_modules_and_tied_parameters_stay_so(saved: Path) -> None:
    loaded = load(saved, model=TinyNet())
    assert loaded.get_submodule("again") is loaded.get_submodule("body.0")
    assert loaded.get_parameter("tied.weight") is loaded.get_parameter("head.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_precision_comes_back(tmp_path: Path, tiny: nn.Module, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny).to(dtype)
    save(tmp_path / "out", model, recipe_of("user_models:tiny", SITES))
    loaded = load(tmp_path / "out", model=TinyNet())
    assert loaded.get_buffer("scale").dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded(images().to(dtype)), model(images().to(dtype)))


def test_mixed_precision_comes_back(tmp_path: Path, tiny: nn.Module) -> None:
    model = copy.deepcopy(tiny)
    model.get_submodule("head").half()
    save(tmp_path / "out", model, recipe_of("user_models:tiny", SITES))
    for key, value in load(tmp_path / "out", model=TinyNet()).state_dict().items():
        assert value.dtype == model.state_dict()[key].dtype
        assert torch.equal(value, model.state_dict()[key])


def test_the_memory_format_comes_back(tmp_path: Path, tiny: nn.Module) -> None:
    model = copy.deepcopy(tiny).to(memory_format=torch.channels_last)
    save(tmp_path / "out", model, recipe_of("user_models:tiny", SITES))
    loaded = load(tmp_path / "out", model=TinyNet())
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
        assert value.stride() == model.state_dict()[key].stride()
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    recipe = recipe_of("demo", ())
    model = build_model(recipe.model)
    before = torch.get_rng_state()
    save(tmp_path / "out", model, recipe)
    load(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable module whose import leaves a file behind."""
    trace = tmp_path / "imported"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "user_models_of_test.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nfrom {__name__} import TinyNet as tiny\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield trace
    sys.modules.pop("user_models_of_test", None)


def test_a_recipe_imports_code_only_if_trusted(tmp_path: Path, tiny: nn.Module, user_module: Path) -> None:
    save(tmp_path / "out", tiny, recipe_of("user_models_of_test:tiny", SITES))
    with pytest.raises(GroupifyError, match="trust"):
        load(tmp_path / "out")
    assert not user_module.exists()
    assert torch.equal(load(tmp_path / "out", trust=True)(images()), tiny(images()))
    assert user_module.exists()


@pytest.mark.parametrize("name", ["../tiny", "/etc/passwd", "tiny/../../tiny", "..", "\\\\host\\share"])
def test_a_recipe_names_no_files(saved: Path, name: str) -> None:
    set_recipe(saved, "model", "name", value=name)
    for trust in (False, True):
        with pytest.raises(GroupifyError, match="unknown model"):
            load(saved, trust=trust)


@pytest.mark.parametrize(
    "name", ["groupify.models.demo:nn.Module", "os:system", "groupify.models.demo:fashion_resnet18.x"]
)
def test_no_callable_is_reached_without_trust(saved: Path, name: str) -> None:
    set_recipe(saved, "model", "name", value=name)
    with pytest.raises(GroupifyError, match="trust"):
        load(saved)


def test_groupify_trusts_its_own_benchmark_networks(tmp_path: Path) -> None:
    from groupify.models.demo import fashion_resnet18

    sites = (SiteRecipe("layer4.1.conv2", Structure(groups=8)),)
    model = restructure(fashion_resnet18(), sites)
    save(tmp_path / "out", model, recipe_of("groupify.models.demo:fashion_resnet18", sites))
    loaded = load(tmp_path / "out")
    assert torch.equal(
        loaded.state_dict()["layer4.1.conv2.weight"], model.state_dict()["layer4.1.conv2.weight"]
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"weights": "../../weights.pth"},
        {"num_classes": 10**9},
        {"num_classes": 1e30},
        {"weights": "DEFAULT"},
        {"weights_backbone": "DEFAULT"},
        {"inverted_residual_setting": [[1, 16, 10**6, 1]]},
        {"block": {"a": 1}},
        {"replace_stride_with_dilation": [True] * 1000},
        {"no_such_argument": 1},
        {"num_classes": -5},
        {"num_classes": "many"},
        {"width_per_group": 65_536},
    ],
)
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "regnet_y_400mf"])
def test_hostile_arguments_are_refused_quickly(saved: Path, name: str, arguments: dict[str, Any]) -> None:
    set_recipe(saved, "model", "name", value=name)
    set_recipe(saved, "model", "arguments", value=arguments)
    start = time.perf_counter()
    with pytest.raises(GroupifyError) as raised:
        load(saved)
    assert "\n" not in str(raised.value)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("sites", 0, "name"), "body.9"),
        (("sites", 0, "name"), "head"),
        (("sites", 0, "name"), ""),
        (("sites", 0, "name"), "../../etc/passwd"),
        (("sites", 0, "name"), "/etc/passwd"),
        (("sites", 0, "structure", "groups"), 3),
        (("sites", 0, "structure", "groups"), 65_536),
        (("sites", 0, "structure", "groups"), 1),
        (("sites", 0, "structure", "reduce"), 4),
        (("sites", 0, "structure", "expand"), 8),
        (("sites", 0, "structure"), {"reduce": 8, "groups": 1, "expand": 8}),
    ],
)
def test_a_plan_for_another_model_is_refused(saved: Path, path: tuple[str | int, ...], value: Any) -> None:
    set_recipe(saved, *path, value=value)
    with pytest.raises(GroupifyError) as raised:
        load(saved, model=TinyNet())
    assert "\n" not in str(raised.value)


def test_another_dense_model_is_named_with_both_shapes(saved: Path) -> None:
    other = TinyNet()
    other.head = nn.Linear(8, 5)
    other.tied = nn.Linear(5, 8)
    with pytest.raises(CheckpointError, match=r"'head.weight' has shape \(8, 8\), the model has \(5, 8\)"):
        load(saved, model=other)


def test_keys_are_strict(saved: Path, tiny: nn.Module) -> None:
    larger = TinyNet()
    larger.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"'extra.weight' of shape \(2, 2\) is missing"):
        load(saved, model=larger)
    state = {key: value.clone() for key, value in tiny.state_dict().items()}
    set_weights(saved, safetensors.torch.save({**state, "more": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"the model has no 'more' \(shape \(3,\)"):
        load(saved, model=TinyNet())
    set_weights(saved, safetensors.torch.save({**state, "head.weight": torch.zeros(8, 8, dtype=torch.int64)}))
    with pytest.raises(CheckpointError, match=r"'head.weight' holds torch\.int64"):
        load(saved, model=TinyNet())


def test_models_on_the_meta_device_are_refused(saved: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = TinyNet()
    with pytest.raises(ArtefactError, match="meta device"):
        load(saved, model=empty)
    with pytest.raises(ArtefactError, match="meta device"):
        save(tmp_path / "out", empty, recipe_of("user_models:tiny", ()))


def test_state_that_needs_a_pickle_is_refused(tmp_path: Path) -> None:
    class Stateful(TinyNet):
        def get_extra_state(self) -> object:
            return {"any": object()}

    with pytest.raises(ArtefactError, match="no pickled objects"):
        save(tmp_path / "out", Stateful(), recipe_of("user_models:stateful", ()))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_copied_is_refused(saved: Path) -> None:
    model = TinyNet()
    model.__dict__["generator"] = (number for number in range(3))
    with pytest.raises(
        ConversionError, match="the model cannot be copied, since its attribute 'generator' cannot"
    ):
        load(saved, model=model)


def test_a_recipe_that_is_too_large_is_not_saved(tmp_path: Path, tiny: nn.Module) -> None:
    metrics = {str(index): "x" * 4096 for index in range(4200)}
    recipe = dataclasses.replace(recipe_of("user_models:tiny", SITES), metrics=metrics)
    with pytest.raises(ArtefactError, match="at most 16777216 are allowed"):
        save(tmp_path / "out", tiny, recipe)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_another_model_is_not_saved(tmp_path: Path, tiny: nn.Module) -> None:
    with pytest.raises(GroupifyError, match="does not describe this model"):
        save(tmp_path / "out", tiny, recipe_of("demo", ()))
    assert list(tmp_path.iterdir()) == []


def test_nan_metrics_are_not_saved(tmp_path: Path, tiny: nn.Module) -> None:
    recipe = dataclasses.replace(recipe_of("user_models:tiny", SITES), metrics={"top1": float("nan")})
    with pytest.raises(ArtefactError, match="cannot be written as JSON"):
        save(tmp_path / "out", tiny, recipe)
    assert list(tmp_path.iterdir()) == []


def test_saving_again_needs_force(saved: Path, tiny: nn.Module) -> None:
    recipe = recipe_of("user_models:tiny", SITES)
    with pytest.raises(ArtefactError, match="--force"):
        save(saved, tiny, recipe)
    other = randomised(copy.deepcopy(tiny), seed=9)
    save(saved, other, recipe, force=True)
    assert torch.equal(load(saved, model=TinyNet())(images()), other(images()))


def test_a_full_disk_leaves_the_earlier_artefact(
    saved: Path, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ArtefactError, match="No space left"):
            save(saved, tiny, recipe_of("user_models:tiny", SITES), force=True)
    assert [child.name for child in saved.parent.iterdir()] == [saved.name]
    assert torch.equal(load(saved, model=TinyNet())(images()), tiny(images()))


def test_missing_folders_and_files_are_named(saved: Path) -> None:
    with pytest.raises(ArtefactError, match="there is no folder"):
        load(saved / "nowhere")
    (saved / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match="there is no such file"):
        load(saved, model=TinyNet())
    (saved / RECIPE_FILE).unlink()
    with pytest.raises(ArtefactError, match="there is no such file"):
        load(saved)


def as_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_huge(path: Path) -> None:
    os.truncate(path, 2**40)


def as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("change", [as_link, as_pipe, as_folder, as_huge, as_device])
@pytest.mark.parametrize("name", [RECIPE_FILE, WEIGHTS_FILE])
def test_only_regular_files_of_sensible_size_are_read(
    saved: Path, name: str, change: Callable[[Path], None]
) -> None:
    change(saved / name)
    with pytest.raises(GroupifyError) as raised:
        load(saved, model=TinyNet())
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\x00" * 100, b"null", b'{"format": "groupify"}'])
def test_a_recipe_that_is_none_is_refused(saved: Path, content: bytes) -> None:
    (saved / RECIPE_FILE).write_bytes(content)
    with pytest.raises(ArtefactError, match=RECIPE_FILE):
        load(saved)


def test_a_recipe_without_a_hash_is_refused(saved: Path) -> None:
    set_recipe(saved, "sha256", value=None)
    with pytest.raises(ArtefactError, match="sha256 is None"):
        load(saved)


def test_pickles_are_never_opened(saved: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickle was opened",))

    set_weights(saved, pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(saved, model=TinyNet())


def load_or_refuse(folder: Path, tiny: nn.Module, *, damaged: bool) -> None:
    try:
        loaded = load(folder, model=TinyNet())
    except GroupifyError as error:
        if "\n" in str(error):
            pytest.fail(f"more than one line: {error}")
    else:
        assert not damaged, "damage went unnoticed"
        for key, value in loaded.state_dict().items():
            assert value.shape == tiny.state_dict()[key].shape


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, tiny: nn.Module) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("fuzz") / "tiny"
    save(folder, tiny, recipe_of("user_models:tiny", SITES))
    return folder, (folder / WEIGHTS_FILE).read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bit_flips_and_truncations_are_noticed(
    fuzzed: tuple[Path, bytes], tiny: nn.Module, data: st.DataObject
) -> None:
    folder, content = fuzzed
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for bit in data.draw(st.lists(st.integers(0, max(0, 8 * len(damaged) - 1)), max_size=3, unique=True)):
        if damaged:
            damaged[bit // 8] ^= 1 << bit % 8
    (folder / WEIGHTS_FILE).write_bytes(damaged)
    set_recipe(folder, "sha256", value=hashlib.sha256(content).hexdigest())
    load_or_refuse(folder, tiny, damaged=bytes(damaged) != content)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_headers_with_a_matching_hash_do_no_harm(
    fuzzed: tuple[Path, bytes], tiny: nn.Module, data: st.DataObject
) -> None:
    folder, content = fuzzed
    header_end = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    for position in data.draw(st.lists(st.integers(0, header_end - 1), min_size=1, max_size=4)):
        damaged[position] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789[]{},:"')))
    set_weights(folder, bytes(damaged[: data.draw(st.integers(header_end - 4, len(content)))]))
    load_or_refuse(folder, tiny, damaged=False)


@pytest.fixture(scope="module")
def fuzzed_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fuzz") / "demo"
    sites = (
        SiteRecipe("layer1.1.conv1", Structure(groups=4)),
        SiteRecipe("layer2.1.conv1", Structure(groups=2)),
    )
    recipe = recipe_of("demo", sites)
    save(folder, restructure(build_model(recipe.model), sites), recipe)
    return folder, json.loads((folder / RECIPE_FILE).read_text())


HOSTILE = VALUES | st.sampled_from(
    [
        "squeezenet1_1",
        "os:system",
        "demo",
        65_536,
        2**31,
        "layer1.1",
        "layer2.1.conv2",
        {"num_classes": 10**6},
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_recipes_load_or_are_refused(
    fuzzed_demo: tuple[Path, dict[str, Any]], data: st.DataObject
) -> None:
    folder, document = fuzzed_demo
    # Of what decides how the model is built.
    places = [path for path in paths_of(document) if path[:1] in (("model",), ("sites",))]
    for path in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=2)):
        with contextlib.suppress(LookupError, TypeError):  # the one before took it away
            document = replaced(document, path, data.draw(HOSTILE))
    (folder / RECIPE_FILE).write_text(json.dumps(document))
    start = time.process_time()
    try:
        loaded = load(folder)
    except GroupifyError as error:
        if "\n" in str(error):
            pytest.fail(f"more than one line: {error}")
    else:
        assert isinstance(loaded, nn.Module)
    assert time.process_time() - start < 10
