"""Convert in the middle of your own training loop: dense epochs, conversion, grouped epochs.

Run it from anywhere: ``python examples/plain_training_loop.py``; it prints the accuracy of each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import groupify
from groupify.models.demo import DemoResNet

INPUT_SHAPE = (3, 28, 28)


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)


def converted(model: nn.Module, images: Tensor, groups: int) -> nn.Module:
    """A grouped model that goes on where the dense one stands; no labels are needed."""
    plan = groupify.plan(model, INPUT_SHAPE, groups=groups, rules=groupify.Rules(min_group_width=8))
    return groupify.convert(model, plan, images).model


def main(
    train: Dataset[tuple[Tensor, Tensor]],
    test: Dataset[tuple[Tensor, Tensor]],
    epochs: int = 4,
    convert_after: int = 2,
    groups: int = 4,
    images: int = 300,
) -> Sequence[float]:
    """Train; return the test accuracy after each epoch, and right after the conversion."""
    torch.manual_seed(0)
    model: nn.Module = DemoResNet()
    teacher: nn.Module | None = None
    optimizer = make_optimizer(model, 0.05)
    loader = DataLoader(train, batch_size=64, shuffle=True)
    accuracies = []
    for epoch in range(epochs):
        if epoch == convert_after:
            # The dense model stays as the teacher. The grouped one has parameters of its own, so the
            # optimizer is made anew; a scheduler would be, too.
            teacher = model.eval()
            model = converted(model, groupify.calibration_images(train, images, seed=0), groups)
            optimizer = make_optimizer(model, 0.01)
            accuracies.append(groupify.evaluate(model, test).top1)
            print(f"converted: {accuracies[-1]:.1%}")
        model.train()
        for batch, labels in loader:
            logits = model(batch)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(batch).softmax(1)
                loss = loss + F.cross_entropy(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracies.append(groupify.evaluate(model, test).top1)
        print(f"epoch {epoch + 1}: {accuracies[-1]:.1%}")
    return accuracies


if __name__ == "__main__":
    source = groupify.load_model("demo")
    data = groupify.load_data("demo", source.spec)
    assert isinstance(data.train, Dataset)
    assert isinstance(data.test, Dataset)
    main(data.train, data.test)
