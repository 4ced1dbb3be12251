"""``groupify.apply``: a converted architecture in the user's own code."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import groupify
from groupify.errors import ArtefactError, CheckpointError, ConversionError
from groupify.pipeline.compressed import Compressed
from tests import cli_nets


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return cli_nets.net()


@pytest.fixture(scope="module")
def result(net: nn.Module) -> Compressed:
    rules = groupify.Rules(min_group_width=1)
    return groupify.compress(net, cli_nets._images(32, 1)[0], groups=2, rules=rules)


def test_from_a_recipe_its_file_and_its_folder(net: nn.Module, result: Compressed, tmp_path: Path) -> None:
    result.save(tmp_path / "out")
    images = torch.randn(4, 3, 8, 8)
    file = tmp_path / "out" / "recipe.json"
    for recipe in (result.recipe, tmp_path / "out", str(tmp_path / "out"), file):
        applied = groupify.apply(recipe, net)
        assert applied.training
        assert net.state_dict()["2.weight"].shape[1] == 32
        applied.load_state_dict(result.model.state_dict())
        with torch.no_grad():
            assert torch.equal(applied.eval()(images), result.model.eval()(images))
    for missing in (tmp_path / "none", tmp_path / "none" / "recipe.json"):
        with pytest.raises(ArtefactError, match="there is no"):
            groupify.apply(missing, net)
    with pytest.raises(ConversionError, match="the model has no layer '2'"):
        groupify.apply(result.recipe, nn.Sequential(nn.Conv2d(3, 8, 3)))
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="there is no such file"):
        groupify.apply(tmp_path / "out", net)
    groupify.apply(file, net)


class Moved(nn.Module):
    """Holds a tensor that is no part of its state, until a conversion changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.register_buffer("scale", torch.arange(16.0)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.two(torch.relu(self.one(images)) * self.get_buffer("scale"))
        return features.mean((2, 3))


def test_values_that_became_part_of_the_state_fit_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Moved()
    rules = groupify.Rules(min_group_width=1)
    found = groupify.compress(net, torch.randn(64, 16, 6, 6), groups=4, rules=rules)
    assert "scale" in found.model.state_dict()  # its channels have another order
    found.save(tmp_path / "out")
    applied = groupify.apply(tmp_path / "out", net)
    applied.load_state_dict(found.model.state_dict())
    images = torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        assert torch.equal(applied(images), found.model(images))


def test_a_lightning_checkpoint_of_a_converted_model_loads(
    net: nn.Module, result: Compressed, tmp_path: Path
) -> None:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Classifier(groupify.apply(result.recipe, net))
    module.model.load_state_dict(result.model.state_dict())
    result.save(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of few workers and no validation
        trainer = lightning.Trainer(
            max_steps=2, default_root_dir=tmp_path, accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(cli_nets.data()[0], batch_size=16))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        again = Classifier(groupify.apply(tmp_path / "out", net))
        again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.eval().model(images), module.eval().model(images))
    assert not torch.equal(again.model.get_parameter("2.weight"), result.model.get_parameter("2.weight"))
    # What was trained elsewhere is saved with the recipe of the result.
    groupify.save(tmp_path / "trained", again.model, result.recipe)
    loaded = groupify.load(tmp_path / "trained", model=net)
    with torch.no_grad():
        assert torch.equal(loaded(images), again.model(images))
