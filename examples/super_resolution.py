"""A super-resolution net: compressed within a limit on the PSNR lost, trained further, exported for any size.

The images are drawn by a seed: waves and edges. The net stands for yours.

Run it from anywhere: ``python examples/super_resolution.py`` writes into the current folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import groupify

SIZE = 32


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return small images (N, 1, 16, 16) and what they were made from, (N, 1, 32, 32), both in 0 … 1."""
    generator = torch.Generator().manual_seed(seed)
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    waves = torch.zeros(count, 1, SIZE, SIZE)
    for _ in range(4):
        slopes = 8 * torch.randn(2, count, 1, 1, 1, generator=generator)
        phases = 6.3 * torch.rand(count, 1, 1, 1, generator=generator)
        wave = torch.sin(slopes[0] * ys + slopes[1] * xs + phases)
        waves += torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, wave, wave.sign())
    images = 0.5 + 0.125 * waves
    return F.avg_pool2d(images, 2), images


class Net(nn.Module):
    """What is missing from the image enlarged by interpolation, as an efficient sub-pixel net gives it."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, images: Tensor) -> Tensor:
        larger = F.interpolate(images, scale_factor=2.0, mode="bilinear")
        enlarged: Tensor = larger + self.body(images)
        return enlarged


def loss(enlarged: Tensor, images: Tensor) -> Tensor:
    """Return the mean absolute error."""
    return (enlarged - images).abs().mean()


def train(net: nn.Module, small: Tensor, images: Tensor, epochs: int) -> nn.Module:
    """Stands for your training."""
    optimizer = torch.optim.AdamW(net.parameters(), 0.005)
    for _ in range(epochs):
        for some in torch.randperm(len(small)).split(32):
            optimizer.zero_grad()
            loss(net(small[some]), images[some]).backward()
            optimizer.step()
    return net.eval()


def main(folder: Path = Path(), count: int = 256, epochs: int = 20) -> dict[str, float]:
    """Compress ``Net``; return the PSNR of each stage, in decibels."""
    torch.manual_seed(0)
    small, images = draw(count, seed=0)
    seen, truth = draw(64, seed=1)  # not among those to fit on
    net = train(Net(), small, images, epochs)

    def psnr(model: nn.Module) -> float:
        return float(-10 * (model(seen) - truth).square().mean().log10())

    # Nothing but images to fit on; at most half a decibel less than the dense net. The last conv stays dense.
    rules = groupify.Rules(exclude=["body.6"])
    result = groupify.compress(net, small, budget="drop=0.5", metric=psnr, rules=rules)

    # With the right images there is a loss for them; without, the dense net's outputs are learned.
    settings = groupify.FinetuneSettings(epochs=2, batch_size=32)
    tuned = groupify.finetune(result, TensorDataset(small, images), loss=loss, settings=settings)
    print(tuned)

    # The file takes images of any height and width.
    exported = groupify.export(tuned, folder / "super_resolution.onnx", dynamic_size=True)
    sizes = " and ".join(f"{height}×{width}" for _, height, width in exported.parity.shapes)
    print(f"wrote {exported.path}, checked at {sizes}")
    measured = tuned.measured_by_metric
    assert measured is not None
    assert measured.recovered is not None
    return {"dense": measured.dense, "converted": measured.converted, "tuned": measured.recovered}


if __name__ == "__main__":
    main()
