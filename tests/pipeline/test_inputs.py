"""What is fed to a model: shape, preprocessing and classes are settled before the work, and said."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import groupify
from groupify.errors import DataError, GroupifyWarning, SpecError
from groupify.models import demo
from groupify.models.preprocessing import Preprocessing, PreprocessingOptions, of_timm
from groupify.models.specs import ModelSpec, Source, WeightsOrigin
from groupify.pipeline.inputs import from_recipe, with_data
from groupify.pipeline.requests import ModelRequest
from tests.conftest import ROOT, Run

NET = "tests.pipeline.test_inputs:brightness"
NOTHING = PreprocessingOptions()


class Brightness(nn.Module):
    """Tells dark, middling and bright images apart, if their mean is 0.5 and their deviation 0.25."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 1)
        self.other = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        nn.init.dirac_(self.other.weight)
        nn.init.constant_(self.conv.weight, 1 / 3)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.register_buffer("centres", torch.tensor([-2.0, 0.0, 2.0, *([99.0] * (classes - 3))]))

    def forward(self, images: Tensor) -> Tensor:
        means: Tensor = self.other(self.conv(images)).mean((1, 2, 3))
        return -((means[:, None] - self.get_buffer("centres")) ** 2)


def brightness(classes: int = 3) -> nn.Module:
    return Brightness(classes)


def images_of_16() -> TensorDataset:
    return TensorDataset(torch.rand(40, 3, 16, 16), torch.arange(40) % 3)


def two_sizes() -> tuple[TensorDataset, TensorDataset]:
    return TensorDataset(torch.rand(4, 3, 12, 12), torch.zeros(4).long()), images_of_16()


def unlabelled() -> tuple[Tensor, Iterator[Tensor]]:
    return torch.rand(12, 3, 16, 16), iter(torch.rand(12, 3, 16, 16).split(5))


def labelled_otherwise() -> Iterator[tuple[Tensor, list[str]]]:
    return ((batch, ["a car"] * len(batch)) for batch in torch.rand(12, 3, 16, 16).split(4))


def waves() -> TensorDataset:
    return TensorDataset(torch.randn(40, 2, 64), torch.arange(40) % 4)


def wave_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 32, 3),
        nn.ReLU(),
        nn.Conv1d(32, 32, 3),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def volume_net() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 32, 3), nn.ReLU(), nn.Conv3d(32, 32, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of each class, 16×16."""
    for name, value in (("a", 0), ("b", 128), ("c", 255)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (16, 16), (value,) * 3).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def source(shape: tuple[int, ...], known: bool = True, classes: int = 3) -> Source:
    spec = ModelSpec(NET, {}, shape, None)
    return Source(brightness(classes).eval(), spec, WeightsOrigin("factory"), input_known=known)


# ---- preprocessing


def test_options_in_place_of_what_is_known() -> None:
    known = Preprocessing((64, 64), 72, "center", (0.5,) * 3, (0.2,) * 3, "bicubic")
    shape = (3, 64, 64)
    assert NOTHING.over(known, shape, "x") == known
    assert NOTHING.over(None, shape, "x") is None
    squashed = PreprocessingOptions(crop="none").over(known, shape, "x")
    assert squashed == Preprocessing((64, 64), None, "none", (0.5,) * 3, (0.2,) * 3, "bicubic")
    whole = PreprocessingOptions(resize=0).over(known, shape, "x")
    assert whole == Preprocessing((64, 64), None, "center", (0.5,) * 3, (0.2,) * 3, "bicubic")
    assert PreprocessingOptions.of(whole).over(None, shape, "x") == whole
    assert PreprocessingOptions.of(squashed).then(PreprocessingOptions(resize=80)).over(None, shape, "x") == (
        Preprocessing((64, 64), 80, "center", (0.5,) * 3, (0.2,) * 3, "bicubic")
    )
    assert (
        PreprocessingOptions.of(known).then(PreprocessingOptions(crop="none")).over(None, shape, "x")
        == squashed
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (PreprocessingOptions(mean=(0.5,)), "nothing says how .* give both, --mean and --std"),
        (PreprocessingOptions(resize=80), "give both, --mean and --std"),
        (PreprocessingOptions((0.5, 0.5), (0.5,)), "--mean has 2 values, the model 3 channels"),
        (PreprocessingOptions((123.7,), (58.4,)), "--mean 123.7: expected values for pixels in"),
        (PreprocessingOptions((0.5,), (0.0,)), "expected standard deviations above 0"),
        (PreprocessingOptions((0.5,), (0.5,), resize=63), "expected a resize of at least 64"),
        (PreprocessingOptions((0.5,), (0.5,), resize=80, crop="none"), "expected no resize where nothing is"),
    ],
)
def test_options_that_cannot_be(options: PreprocessingOptions, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        options.over(None, (3, 64, 64), "x")


def test_options_for_images_only() -> None:
    with pytest.raises(SpecError, match="are for images"):
        PreprocessingOptions((0.5,), (0.5,)).over(None, (1, 16000), "x")


def test_another_input_size_keeps_the_share_of_the_crop() -> None:
    spec = groupify.load_model("resnet18", weights="none", input_shape=(3, 112, 112)).spec
    assert spec.preprocessing is not None
    assert (spec.preprocessing.size, spec.preprocessing.resize) == ((112, 112), 128)


def test_timm_says_what_its_models_want() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", pretrained=False)
    shape, preprocessing = of_timm(model) or ((), None)
    config = model.pretrained_cfg
    assert shape == tuple(config["input_size"])
    assert preprocessing is not None
    assert (preprocessing.mean, preprocessing.std) == (tuple(config["mean"]), tuple(config["std"]))
    arguments = {"model_name": "test_resnet", "num_classes": 3}
    loaded = groupify.load_model("timm:create_model", arguments=arguments)
    assert loaded.spec.input_shape == shape
    assert loaded.spec.preprocessing == preprocessing
    assert loaded.preprocessing_from == "timm's pretrained_cfg"
    grey = groupify.load_model("timm:create_model", arguments=arguments, input_shape=(1, 32, 32))
    assert grey.spec.preprocessing is None


CONFIG = {
    "input_size": (3, 64, 64),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 0.8,
}


@pytest.mark.parametrize(
    ("change", "resize", "crop"),
    [
        ({}, 80, "center"),
        ({"crop_mode": "squash", "crop_pct": 1.0}, None, "none"),
        ({"crop_mode": "border"}, None, None),
        ({"crop_mode": "squash"}, None, None),
        ({"interpolation": "lanczos"}, None, None),
        ({"crop_pct": "most"}, None, None),
        ({"mean": None}, None, None),
        ({"std": (0.0,) * 3}, None, None),
    ],
)
def test_the_config_of_timm(change: dict[str, object], resize: int | None, crop: str | None) -> None:
    model = nn.Identity()
    model.pretrained_cfg = CONFIG | change  # type: ignore[assignment]
    shape, preprocessing = of_timm(model) or ((), None)
    assert shape == (3, 64, 64)
    if crop is None:
        assert preprocessing is None
    else:
        assert preprocessing is not None
        assert (preprocessing.resize, preprocessing.crop) == (resize, crop)


@pytest.mark.parametrize("config", [None, 3, {}, {"input_size": 3}, {"input_size": (3, 0, 4)}])
def test_what_is_no_config_of_timm(config: object) -> None:
    model = nn.Identity()
    model.pretrained_cfg = config  # type: ignore[assignment]
    assert of_timm(model) is None


def test_a_recipe_holds_for_any_data_and_an_option_before_it() -> None:
    kept = Preprocessing((28, 28), 32, "center", (0.1,) * 3, (0.9,) * 3, "bicubic")
    made = Source(demo.demo_model(), ModelSpec("demo", {}, (3, 28, 28), kept), WeightsOrigin("demo"))
    _, data = with_data(from_recipe(made), "demo", NOTHING, seed=0)
    assert data is not None
    assert data.preprocessing == kept
    changed, data = with_data(from_recipe(made), "demo", PreprocessingOptions(mean=(0.4,)), seed=0)
    assert changed.spec.preprocessing == Preprocessing(
        (28, 28), 32, "center", (0.4,) * 3, (0.9,) * 3, "bicubic"
    )
    settled, _ = with_data(made, "demo", NOTHING, seed=0)
    assert settled.spec.preprocessing == demo.PREPROCESSING  # the data set's own


# ---- the input's shape


def test_the_shape_comes_from_the_first_batch() -> None:
    name = "tests.pipeline.test_inputs:images_of_16"
    settled, _ = with_data(source((3, 224, 224), known=False), name, NOTHING, seed=0)
    assert settled.spec.input_shape == (3, 16, 16)
    with pytest.raises(
        DataError, match=r"shape \(3, 16, 16\), .* take \(3, 32, 32\): give --input-size 3,16,16"
    ):
        with_data(source((3, 32, 32)), name, NOTHING, seed=0)
    # Training images may be smaller, as in some recipes.
    for known in (True, False):
        two_sizes = "tests.pipeline.test_inputs:two_sizes"
        settled, _ = with_data(source((3, 16, 16), known=known), two_sizes, NOTHING, seed=0)
        assert settled.spec.input_shape == (3, 16, 16)


def test_the_shape_comes_from_the_images_of_a_folder(folder: Path) -> None:
    said = PreprocessingOptions((0.5,), (0.25,))
    settled, _ = with_data(source((3, 224, 224), known=False), f"imagefolder:{folder}", said, seed=0)
    assert settled.spec.input_shape == (3, 16, 16)
    Image.new("RGB", (20, 16)).save(folder / "a" / "0.png")
    with pytest.raises(SpecError, match=r"nothing says the size of the inputs of .*--input-size"):
        with_data(source((3, 224, 224), known=False), f"imagefolder:{folder}", said, seed=0)


@pytest.mark.parametrize("data", [None, "demo", "synthetic"])
def test_a_shape_that_nothing_says(data: str | None) -> None:
    with pytest.raises(SpecError, match=r"nothing says the size of the inputs of .*--input-size"):
        with_data(source((3, 224, 224), known=False), data, NOTHING, seed=0)


def test_inputs_of_other_dimensions_on_the_command_line(run: Run) -> None:
    waves = ("tests.pipeline.test_inputs:wave_net", "--weights", "none", "--input-size")
    plan = ("--groups", 2, "--min-group-width", 1)
    options = (*plan, "--calibrate", 8, "--data", "tests.pipeline.test_inputs:waves", "-o", "out", "--json")
    outcome = run("convert", *waves, "2,64", *options)
    assert outcome.code == 0, outcome.err
    assert "preprocessing" not in outcome.notes
    assert json.loads(outcome.out)["accuracy"]["images"] == 40
    assert "of shape (2, 64), " in run("convert", *waves, "2,60", *options, "--force").err
    assert "are for images" in run("plan", *waves, "2,64", "--mean", "0.5", "--std", "0.5").err
    volumes = ("tests.pipeline.test_inputs:volume_net", "--input-size", "1,8,8,8")
    planned = run("plan", *volumes, *plan)
    assert (planned.code, planned.notes) == (0, "")


# ---- the whole way


def test_a_factory_s_model_on_a_folder_of_images(folder: Path, run: Run, tmp_path: Path) -> None:
    data = ("--data", f"imagefolder:{folder}")
    refused = run("evaluate", NET, *data)
    assert (refused.code, refused.out) == (2, "")
    assert "nothing says how images become inputs of" in refused.err
    said = ("--mean", "0.5", "--std", "0.25")
    right = run("evaluate", NET, *data, *said)
    assert "top-1 100.00% on 36 test images" in right.out
    assert right.notes.splitlines() == [
        "groupify: input: 3×16×16, as the data have it",
        "groupify: preprocessing (as asked): the shorter side to 16, then the middle 16×16, bilinear; "
        "mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)",
    ]
    quiet = run("evaluate", NET, *data, *said, "--quiet")
    assert (quiet.notes, quiet.err) == ("", "")
    wrong = run("evaluate", NET, *data, "--mean", "-3", "--std", "1")
    assert "about what guessing among 3 classes has: check the preprocessing" in wrong.err

    options = ("--groups", 2, "--include", "other", "--calibrate", 8, "-o", "out", "--json")
    converted = run("convert", NET, *data, *said, *options)
    assert converted.code == 0, converted.err
    expected = Preprocessing((16, 16), 16, "center", (0.5,) * 3, (0.25,) * 3, "bilinear")
    assert groupify.Recipe.read(tmp_path / "out" / "recipe.json").model.preprocessing == expected
    again = run("evaluate", "out", *data, "--model", NET)
    assert "top-1 100.00%" in again.out
    assert "preprocessing (the recipe): the shorter side to 16" in again.notes

    classifier = runpy.run_path(str(ROOT / "examples" / "classify_image.py"))["Classifier"]
    probabilities = classifier(tmp_path / "out" / "model.onnx")([Image.open(folder / "c" / "0.png")])
    assert np.argmax(probabilities) == 2


def test_what_a_recipe_says_is_not_said_again(run: Run, tmp_path: Path) -> None:
    for said, option in (
        ({"input_shape": (3, 8, 8)}, "--input-size"),
        ({"weights": "none"}, "--weights"),
        ({"checkpoint": Path("x.pth")}, "--checkpoint"),
        ({"arguments": {"a": 1}}, "--model-args"),
    ):
        with pytest.raises(SpecError, match=f"{option} is for a dense model: the recipe of out says it"):
            ModelRequest("out", **said).check_for_folder()
    (tmp_path / "out").mkdir()
    assert (
        "--weights is for a dense model" in run("evaluate", "out", "--data", "demo", "--weights", "none").err
    )


def test_inputs_that_come_ready_made(run: Run, tmp_path: Path) -> None:
    data = ("--data", "tests.pipeline.test_inputs:images_of_16")
    unsaid = run("export", NET, *data, "-o", "one.onnx")
    assert "nothing says how images become inputs of" in unsaid.notes
    said = run("export", NET, *data, "-o", "two.onnx", "--mean", "0.5", "--std", "0.25")
    assert "gives inputs ready-made" in said.notes
    entries = [
        {entry.key for entry in onnx.load(str(tmp_path / name)).metadata_props}
        for name in ("one.onnx", "two.onnx")
    ]
    assert ["preprocessing" in keys for keys in entries] == [False, True]


def test_data_without_class_numbers_serve_all_the_same() -> None:
    for name in ("unlabelled", "labelled_otherwise"):
        spec = f"tests.pipeline.test_inputs:{name}"
        # The same problem: labels that are no class numbers count as none where data are read only once.
        with pytest.warns(GroupifyWarning, match="no accuracy is measured: the test images have no labels"):
            _, data = with_data(source((3, 16, 16)), spec, NOTHING, seed=0)
        assert data is not None
        assert not data.labelled
        assert groupify.calibration_images(data.for_calibration, 8, seed=0).shape == (8, 3, 16, 16)


def test_more_outputs_than_classes_are_said_by_every_command(folder: Path, run: Run) -> None:
    options = ("--data", f"imagefolder:{folder}", "--mean", "0.5", "--std", "0.25")
    outcome = run("evaluate", NET, "--model-args", '{"classes": 1000}', *options)
    assert "has 3 classes, the model 1000: its accuracy says little" in outcome.err


def test_random_weights_are_expected_to_guess(run: Run) -> None:
    data = ("--data", "tests.pipeline.test_inputs:images_of_16", "--mean", "0", "--std", "1")
    assert "guessing" in run("evaluate", NET, *data).err
    assert "guessing" not in run("evaluate", NET, *data, "--weights", "none").err


def test_few_images_say_nothing_about_chance(recwarn: pytest.WarningsRecorder) -> None:
    from groupify.data.splits import DataSplits
    from groupify.pipeline.inputs import warn_near_chance
    from groupify.scores import Accuracy

    splits = DataSplits("x", None, None, 10, None, labelled=True)
    warn_near_chance(Accuracy(0.0, 29), source((3, 16, 16)), splits)
    warn_near_chance(Accuracy(0.3, 100), source((3, 16, 16)), splits)
    assert not recwarn.list
    with pytest.warns(GroupifyWarning, match=r"has 10\.30% on x, about what guessing among 10 classes"):
        warn_near_chance(Accuracy(0.103, 1000), source((3, 16, 16)), splits)
