"""The benchmark of the text detector: its net, its images, and a quick run of every line."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from scripts.benchmarks import craft, tables
from scripts.benchmarks.craft_net import Craft, random_craft
from scripts.benchmarks.low_rank import SPATIAL_SVD, SpatialSVD, site_factors
from scripts.benchmarks.text_images import draw_words, find_photographs, text_images


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three photographs, one of them in two sizes, and what is none."""
    folder = tmp_path / "photographs"
    chance = random.Random(0)
    sizes = {"a.png": (200, 150), "b.png": (140, 160), "lake/contents/images/150x150.png": (150, 150)}
    for name, size in {**sizes, "lake/contents/images/300x200.png": (300, 200), "tiny.png": (9, 9)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = Image.frombytes("RGB", (12, 9), chance.randbytes(12 * 9 * 3))
        noise.resize(size).save(folder / name)
    (folder / "notes.txt").write_text("no photograph")
    return folder


def test_the_net_has_the_published_layers_and_skips() -> None:
    model = random_craft(4)
    names = dict(Craft(4).named_parameters())
    assert {"basenet.slice4.37.weight", "basenet.slice5.2.bias", "upconv1.conv.3.weight"} <= set(names)
    published = sum(parameter.numel() for parameter in Craft().parameters())
    assert published == pytest.approx(20.8e6, rel=0.01)
    seen: list[torch.Tensor] = []
    model.upconv4.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model.upconv1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 96)).shape == (2, 32, 48, 2)
    fourth, first = seen[0][:, -128:], seen[1][:, -32:]
    assert first.min() == 0  # rectified in place by the stage behind
    assert fourth.min() < 0  # nothing rectifies that one


def test_calibration_and_test_share_no_photograph(photographs: Path) -> None:
    found = find_photographs(photographs)
    assert {name: path.name for name, path in found.items()} == {
        "a": "a.png", "b": "b.png", "lake": "300x200.png",
    }  # fmt: skip
    images = text_images(photographs, calibration=3, test=2, side=64)
    assert images.calibration.shape == (3, 3, 64, 64)
    assert images.test.shape == (2, 3, 64, 64)
    again = text_images(photographs, calibration=3, test=2, side=64)
    assert torch.equal(images.calibration, again.calibration)
    other = text_images(photographs, calibration=3, test=2, side=64, seed=1)
    assert not torch.equal(images.calibration, other.calibration)
    with pytest.raises(ValueError, match="holds 1 photographs"):
        text_images(photographs / "lake", calibration=1, test=1)
    blank = Image.new("RGB", (128, 128))
    assert draw_words(blank, random.Random(0)).getextrema() != blank.getextrema()


def test_a_truncated_conv_is_as_far_off_as_its_energies_say() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 12, 3, padding=1, bias=False)
    ).eval()
    images = torch.randn(64, 3, 12, 12)
    factors = site_factors(net, SPATIAL_SVD, ["1"], images)["1"]
    assert isinstance(factors, SpatialSVD)
    cut = factors.truncated(6)
    assert cut.shape == (12, 8, 3, 3)
    with torch.no_grad():
        right = net(images)
        missed = torch.nn.functional.conv2d(net[0](images), cut, padding=1) - right
    energies = factors.energies[0]
    relative = float(
        (missed - missed.mean((0, 2, 3), keepdim=True)).square().sum() / right.var((0, 2, 3)).sum()
    )
    relative /= right.numel() / 12
    assert relative == pytest.approx(float(energies[6:].sum() / energies.sum()), rel=0.5)
    assert torch.allclose(factors.truncated(24), net.get_parameter("1.weight"), atol=1e-4)


def test_scores_of_maps() -> None:
    dense = torch.zeros(1, 2, 2, 2)
    dense[0, 0, :, 0] = 1.0
    other = dense.clone()
    other[0, 0, 1, 0] = 0.0
    assert craft.rms(other, dense) == pytest.approx((1 / 8) ** 0.5)
    assert craft.f_score(dense, dense) == 1.0
    assert craft.f_score(other, dense) == pytest.approx(2 / 3)
    assert craft.f_score(dense * 0, dense * 0) == 1.0


@pytest.mark.slow
def test_a_quick_run_has_a_row_of_every_method(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "craft.json"
    arguments = ["craft", "--photographs", str(photographs), "--quick", "--json", str(results)]
    monkeypatch.setattr(sys, "argv", arguments)
    craft.main()
    document = json.loads(results.read_text("utf-8"))
    assert [row["method"] for row in document["rows"]] == list(craft.METHODS)
    for row in document["rows"]:
        assert 0 < row["rms"] < math.inf
        assert 0 <= row["f_score"] <= 1
        assert row["macs_ratio"] > 1
    table = tables.craft(document)
    assert len(table) == 1 + len(craft.METHODS)
    assert "÷1.1" in capsys.readouterr().out
