"""A segmentation net: compressed within a limit on the mIoU lost, trained further, exported for any size.

The images are drawn by a seed: discs and squares, under so much noise that one pixel does not tell its class.
The net stands for yours.

Run it from anywhere: ``python examples/segmentation.py`` writes into the current folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import groupify

CLASSES = 3  # ground, disc, square
SIZE = 32


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) and the class of each pixel (N, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    ys, xs = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    places = torch.randint(6, SIZE - 6, (2, 2, count, 1, 1), generator=generator)
    sizes = torch.randint(3, 8, (2, count, 1, 1), generator=generator)
    disc = (ys - places[0, 0]) ** 2 + (xs - places[0, 1]) ** 2 <= sizes[0] ** 2
    square = torch.maximum((ys - places[1, 0]).abs(), (xs - places[1, 1]).abs()) <= sizes[1]
    maps = torch.where(square, 2, torch.where(disc, 1, 0))
    images = F.one_hot(maps, CLASSES).movedim(3, 1).float()  # ground, discs and squares have a colour each
    return images + torch.randn(images.shape, generator=generator), maps


class Net(nn.Module):
    """An encoder and a decoder with a skip: a small U-net."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = self._block(3, channels)
        self.down = self._block(channels, 2 * channels, stride=2)
        self.middle = self._block(2 * channels, 2 * channels)
        self.up = self._block(3 * channels, channels)
        self.head = nn.Conv2d(channels, CLASSES, 1)

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        fine = self.stem(images)
        coarse = self.middle(self.down(fine))
        larger = F.interpolate(coarse, size=fine.shape[2:], mode="nearest")
        scores: Tensor = self.head(self.up(torch.cat([fine, larger], 1)))
        return scores


def loss(scores: Tensor, maps: Tensor) -> Tensor:
    """Return the cross-entropy of each image, shape (N,)."""
    return F.cross_entropy(scores, maps, reduction="none").mean((1, 2))


def train(net: nn.Module, images: Tensor, maps: Tensor, epochs: int) -> nn.Module:
    """Stands for your training."""
    optimizer = torch.optim.AdamW(net.parameters(), 0.005)
    for _ in range(epochs):
        for some in torch.randperm(len(images)).split(16):
            optimizer.zero_grad()
            loss(net(images[some]), maps[some]).mean().backward()
            optimizer.step()
    return net.eval()


def main(folder: Path = Path(), count: int = 128, epochs: int = 10) -> dict[str, float]:
    """Compress ``Net``; return the mIoU of each stage, in percent."""
    torch.manual_seed(0)
    images, maps = draw(count, seed=0)
    seen, truth = draw(64, seed=1)  # not among those to fit on
    net = train(Net(), images, maps, epochs)

    def miou(model: nn.Module) -> float:
        found = model(seen).argmax(1)
        shares = [
            ((found == one) & (truth == one)).sum() / ((found == one) | (truth == one)).sum()
            for one in range(CLASSES)
        ]
        return 100 * float(torch.stack(shares).mean())

    # Nothing but images to fit on; at most 2 points of mIoU less than the dense net. The head stays dense.
    rules = groupify.Rules(exclude=["head"])
    result = groupify.compress(net, images, budget="drop=2", metric=miou, rules=rules)

    # With labels of any shape there is a loss for them; without, the dense net's outputs are learned.
    settings = groupify.FinetuneSettings(epochs=2, batch_size=16)
    tuned = groupify.finetune(result, TensorDataset(images, maps), loss=loss, settings=settings)
    print(tuned)

    # The file takes images of any height and width.
    exported = groupify.export(tuned, folder / "segmentation.onnx", dynamic_size=True)
    sizes = " and ".join(f"{height}×{width}" for _, height, width in exported.parity.shapes)
    print(f"wrote {exported.path}, checked at {sizes}")
    measured = tuned.measured_by_metric
    assert measured is not None
    assert measured.recovered is not None
    return {"dense": measured.dense, "converted": measured.converted, "tuned": measured.recovered}


if __name__ == "__main__":
    main()
