"""A module of your own: convert it with your own images, then save, load and export it.

Run it from anywhere: ``python examples/own_model.py`` writes into the current folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import groupify
from groupify.structures import Plan

INPUT_SHAPE = (3, 32, 32)


class Net(nn.Module):
    """Stands for yours: any module whose convolutions are ``nn.Conv2d``."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.stem(images)))
        features = features + torch.relu(self.conv1(features))
        features = torch.relu(self.conv2(features)).mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


def main(folder: Path = Path(), count: int = 200) -> Plan:
    """Convert ``Net``; return the plan."""
    torch.manual_seed(0)
    model = Net().eval()  # load your trained weights here
    images = torch.randn(count, *INPUT_SHAPE)  # and your images, normalised as in training

    plan = groupify.plan(model, INPUT_SHAPE, groups=4, rules=groupify.Rules(exclude=["conv1"]))
    conversion = groupify.convert(model, plan, images)
    for fit in conversion.fits:
        print(f"{fit.name}: relative error of the fit {fit.error:.3f}")

    # Its recipe names the class, own_model:Net, which is imported on request only (trust=True); giving a
    # dense model is the other way.
    groupify.save(folder / "own-g4", conversion)
    loaded = groupify.load(folder / "own-g4", model=Net())
    with torch.no_grad():
        assert torch.equal(loaded(images[:4]), conversion.model(images[:4]))

    exported = groupify.export(conversion, folder / "own-g4.onnx")
    print(f"wrote {exported.path}, at most {exported.parity.max_abs_diff:.1e} from PyTorch")
    return plan


if __name__ == "__main__":
    main()
