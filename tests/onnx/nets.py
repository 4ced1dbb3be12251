"""Small nets for the deployment tests, grouped by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from groupify.conversion.surgery import ShuffledConv2d

INPUT_SHAPE = (3, 12, 12)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every weight and every batch-norm statistic a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, fan_in**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            module.weight.data = torch.rand(channels, generator=generator) + 0.5
            module.bias.data = torch.randn(channels, generator=generator) * 0.1
            module.running_mean = torch.randn(channels, generator=generator) * 0.1
            module.running_var = torch.rand(channels, generator=generator) + 0.5
    return model


class SmallNet(nn.Module):
    """A stem, a residual block of grouped convs (the first one shuffled), pooling and a classifier."""

    def __init__(self, channels: int = 16, groups: int = 4, shuffle: bool = True) -> None:
        super().__init__()
        first = {"groups": groups, "padding": 1, "bias": False}
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        if shuffle:
            self.conv1: nn.Conv2d = ShuffledConv2d(channels, channels, 3, shuffle_groups=groups, **first)
        else:
            self.conv1 = nn.Conv2d(channels, channels, 3, **first)  # type: ignore[arg-type]
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)) + x)
        result: Tensor = self.fc(self.pool(y).flatten(1))
        return result


class TwoHeads(nn.Module):
    """Returns a dictionary, as the segmentation nets of torchvision do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 4, 1, groups=2)
        self.aux = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x).relu()
        return {"out": self.out(x), "aux": self.aux(x)}


def shuffled(channels: int, outputs: int, kernel: int = 3, groups: int = 4) -> nn.Module:
    """Make a grouped conv with a channel shuffle behind it."""
    return ShuffledConv2d(
        channels, outputs, kernel, padding=kernel // 2, groups=groups, bias=False, shuffle_groups=groups
    )
