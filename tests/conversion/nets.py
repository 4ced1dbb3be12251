"""Small nets for the conversion tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from groupify.graph.plain_layers import Conv
from groupify.planning.sites import describe
from groupify.structures import Plan, SiteRecipe, Structure

SHAPE = (3, 8, 8)

Model = TypeVar("Model", bound=nn.Module)


def randomise(model: Model, seed: int = 0) -> Model:
    """Weights of a usual size, and batch-norm statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.dim() > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5 * 1.4)
        else:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise - 0.5 if name.endswith(("bias", "mean")) else noise + 0.5)
    return model


class Residual(nn.Module):
    """A stem, two residual blocks and a classifier."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, stride=2)
        self.skip = nn.Conv2d(channels, channels, 1, stride=2)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + x)
        x = torch.relu(self.conv3(x) + self.skip(x))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


class Chain(nn.Module):
    """Convs one after the other, with batch norm or without."""

    def __init__(self, channels: int = 16, norm: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv(torch.relu(self.conv(x))))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.bn(self.conv(x)))
        if x.sum() > 1e9:
            x = x * 0
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def make_block_diagonal(conv: Conv, groups: int) -> None:
    """Cut a dense conv's weight down to what ``groups`` groups can hold."""
    mask = torch.zeros(conv.out_channels, conv.in_channels)
    rows, columns = conv.out_channels // groups, conv.in_channels // groups
    for group in range(groups):
        mask[group * rows : (group + 1) * rows, group * columns : (group + 1) * columns] = 1
    conv.weight.data *= mask.reshape(*mask.shape, *[1] * (conv.weight.dim() - 2))


def images(count: int = 32, shape: Sequence[int] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def plan_of(model: nn.Module, *names: str, groups: int = 4, shuffle: bool = False) -> Plan:
    recipes = [SiteRecipe(name, Structure(groups=groups), shuffle) for name in names]
    return describe(model, recipes, SHAPE, "any")


def relative_error(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = model(x), reference(x)
    return float((a - b).square().mean() / b.var())
