from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from torch import nn

import groupify
from groupify.data.batches import calibration_images
from groupify.data.files import read_fashion_mnist, write_idx
from groupify.data.images import ImageArrays
from groupify.data.splits import load_data
from groupify.models import demo
from groupify.models.sources import build_model, load_model
from groupify.models.specs import WeightsOrigin
from groupify.scores import evaluate
from tests.conftest import ROOT

SCRIPTS = ROOT / "scripts"


def script(name: str) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # where dataclasses look for their module
    module_spec.loader.exec_module(module)
    return module


def test_assets_are_small_and_licensed() -> None:
    folder = Path(groupify.__file__).parent
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".gz", ".safetensors"))
    assert size < 12e6
    licence = demo.DATA_FOLDER.with_name("LICENSE-fashion-mnist").read_text("utf-8")
    assert "2017 Zalando SE" in licence
    assert "Permission is hereby granted" in licence


def test_images_are_balanced() -> None:
    splits = load_data("demo", load_model("demo").spec, num_classes=10)
    for part, count in ((splits.train, 6000), (splits.test, 2000)):
        assert isinstance(part, ImageArrays)
        assert part.labels.bincount().tolist() == [count // 10] * 10
        assert part.images.shape == (count, 1, 28, 28)
    assert splits.labelled
    assert splits.train is not None
    images = calibration_images(splits.train, 1000, seed=0)
    assert images.shape == (1000, 3, 28, 28)
    assert abs(float(images.mean())) < 0.05
    assert abs(float(images.std()) - 1) < 0.05


@pytest.mark.slow
def test_model_is_accurate_on_the_embedded_images() -> None:
    source = load_model("demo")
    assert source.weights.pretrained
    assert source.weights == WeightsOrigin("demo")
    splits = load_data("demo", source.spec, num_classes=10)
    assert splits.test is not None
    accuracy = evaluate(source.model, splits.test)
    assert accuracy.images == 2000
    assert accuracy.top1 >= 0.93


def test_model_file_says_how_it_was_made() -> None:
    with safe_open(demo.MODEL_FILE, "pt") as file:
        metadata = file.metadata()
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16, torch.int64}  # noqa: SIM118
    assert metadata["model"] == "demo"
    assert metadata["data"] == "fashion-mnist"
    assert metadata["test_images"] == "10000"
    assert abs(float(metadata["test_top1_half"]) - float(metadata["test_top1_float32"])) < 0.005


def test_the_demo_net_has_not_seen_the_embedded_images() -> None:
    with safe_open(demo.MODEL_FILE, "pt") as file:
        assert file.metadata()["without_demo_images"] == "True"
        assert file.metadata()["training_images"] == "54000"


def test_random_demo_and_its_architecture() -> None:
    source = load_model("demo", weights="none")
    assert source.weights == WeightsOrigin("random", 0)
    assert sum(parameter.numel() for parameter in source.model.parameters()) == 2_777_674
    trained = load_model("demo").model
    build_model(source.spec).load_state_dict(trained.state_dict())


@pytest.mark.parametrize("name", ["demo_model", "fashion_resnet18", "fashion_vgg11_bn"])
def test_benchmark_networks(name: str) -> None:
    source = load_model(f"groupify.models.demo:{name}")
    assert source.spec.input_shape == (3, 28, 28)
    assert source.spec.preprocessing is not None
    assert isinstance(source.model, nn.Module)
    with torch.inference_mode():
        assert source.model(torch.zeros(2, 3, 28, 28)).shape == (2, 10)


# ---- scripts


@pytest.fixture
def small_fashion_mnist(tmp_path: Path) -> Path:
    """A tenth of the embedded data, in the layout of the full data set."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = read_fashion_mnist(demo.DATA_FOLDER, split)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images[::10].squeeze(1))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels[::10])
    return folder


def test_demo_data_are_made_the_same_again(
    small_fashion_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for output in (tmp_path / "one", tmp_path / "two"):
        arguments = [
            "--root",
            str(small_fashion_mnist),
            "--output",
            str(output),
            "--train",
            "50",
            "--test",
            "20",
        ]
        monkeypatch.setattr(sys, "argv", ["make_demo_data.py", *arguments])
        script("make_demo_data").main()
        contents.append({path.name: path.read_bytes() for path in output.iterdir()})
        images, labels = read_fashion_mnist(output, "train")
        assert images.shape == (50, 1, 28, 28)
        assert labels.bincount().tolist() == [5] * 10
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_training_is_deterministic_and_learns(
    small_fashion_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for output in (tmp_path / "one.safetensors", tmp_path / "two.safetensors"):
        arguments = ["--model", "demo", "--epochs", "3", "--data", f"fashion-mnist:{small_fashion_mnist}"]
        monkeypatch.setattr(sys, "argv", ["train_dense.py", *arguments, "--output", str(output)])
        script("train_dense").main()
        with safe_open(output, "pt") as file:
            assert float(file.metadata()["test_top1_half"]) > 0.25
        states.append(load_model("demo", checkpoint=output).model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.slow
def test_training_leaves_out_what_the_demo_embeds(
    small_fashion_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = read_fashion_mnist(demo.DATA_FOLDER, "train")
    embedded, _ = read_fashion_mnist(small_fashion_mnist, "train")
    new = 255 - embedded[:300]  # none of these is embedded
    write_idx(
        small_fashion_mnist / "train-images-idx3-ubyte.gz", torch.cat([embedded, new, images[:5]]).squeeze(1)
    )
    write_idx(small_fashion_mnist / "train-labels-idx1-ubyte.gz", labels[: len(embedded) + 305])
    output = tmp_path / "demo.safetensors"
    arguments = ["--data", f"fashion-mnist:{small_fashion_mnist}", "--without-demo-images", "--model", "demo"]
    arguments += ["--epochs", "2", "--small-epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["train_dense.py", *arguments, "--output", str(output)])
    script("train_dense").main()
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata["training_images"] == "300"
    assert metadata["without_demo_images"] == "True"
    assert metadata["small_epochs"] == "1"


def test_left_out_images_are_found_by_their_bytes() -> None:
    pixels = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1)
    whole = ImageArrays(pixels, torch.arange(6), demo.PREPROCESSING)
    left = script("train_dense").without(whole, pixels[[4, 0]])
    assert left.labels.tolist() == [1, 2, 3, 5]
    assert left.images.flatten().tolist() == [1, 2, 3, 5]


def test_training_refuses_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--data", "synthetic"], ["--epochs", "0"], ["--epochs", "2", "--small-epochs", "2"]):
        monkeypatch.setattr(
            sys, "argv", ["train_dense.py", *arguments, "--output", str(tmp_path / "x.safetensors")]
        )
        with pytest.raises(SystemExit, match="2"):
            script("train_dense").main()
