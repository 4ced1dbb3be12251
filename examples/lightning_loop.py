"""Convert in the middle of a Lightning training, with a callback.

Run it from anywhere: ``python examples/lightning_loop.py`` (``pip install lightning`` first).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import groupify
from groupify.models.demo import DemoResNet

INPUT_SHAPE = (3, 28, 28)


class Classifier(lightning.LightningModule):
    """Your module; that it will be converted shows nowhere but in the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module = DemoResNet()
        self.learning_rate = 0.05

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: Any, _: int) -> None:
        images, labels = batch
        accuracy = (self.model(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, batch_size=len(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class ConvertAfter(lightning.Callback):
    """Replace the model by a grouped one when an epoch begins."""

    def __init__(self, epoch: int, images: Tensor, groups: int = 4) -> None:
        self.epoch, self.images, self.groups = epoch, images, groups

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.current_epoch != self.epoch:
            return
        assert isinstance(module, Classifier)
        plan = groupify.plan(
            module.model, INPUT_SHAPE, groups=self.groups, rules=groupify.Rules(min_group_width=8)
        )
        module.model = groupify.convert(module.model, plan, self.images).model
        module.learning_rate = 0.01
        # The grouped model has parameters of its own: the optimizer is made anew.
        trainer.strategy.setup_optimizers(trainer)


def main(
    train: Dataset[tuple[Tensor, Tensor]],
    test: Dataset[tuple[Tensor, Tensor]],
    epochs: int = 4,
    convert_after: int = 2,
    images: int = 300,
    folder: Path = Path(),
    **options: Any,
) -> Classifier:
    """Train; return the module with its converted model."""
    lightning.seed_everything(0, verbose=False)
    module = Classifier()
    calibration = groupify.calibration_images(train, images, seed=0)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[ConvertAfter(convert_after, calibration)],
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=256))
    print(f"accuracy {float(trainer.callback_metrics['accuracy']):.1%}")
    return module


if __name__ == "__main__":
    source = groupify.load_model("demo")
    data = groupify.load_data("demo", source.spec)
    assert isinstance(data.train, Dataset)
    assert isinstance(data.test, Dataset)
    main(data.train, data.test)
