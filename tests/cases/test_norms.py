"""Norms of every kind, the user's own among them: channels are reordered in front of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from tests.cases.nets import grouped_already, noise, relative_error, with_statistics
from tests.cases.small import (
    CHANNELS,
    PAIRS,
    TINY,
    assert_free,
    assert_same,
    convert_from_weights,
    convert_small,
    hidden,
    together,
)

Norm = Callable[[int], nn.Module]
# Statistics are those of all images, and images are half of what the norms were given.
TOLERANCE = 2e-2


class Defaults(nn.BatchNorm2d):
    """Sets other defaults, and nothing else."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.01)


class Guarded(nn.BatchNorm2d):
    """Its own forward, which hands on."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and x.numel() == 0 else super().forward(x)


class InSinglePrecision(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


class Clipped(nn.BatchNorm2d):
    """Does more than a batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-2, 2)


class Centred(nn.BatchNorm2d):
    """Its weight is kept less one."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight + 1, self.bias, eps=self.eps)


class Frozen(nn.Module):
    """Folds its buffers before it applies them."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class ByFunction(nn.Module):
    """Calls the function with the tensors of a batch norm that it keeps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)


class ReadElsewhere(nn.Module):
    """Its weight scales once more behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x) * self.norm.weight.reshape(1, -1, 1, 1)
        return result


class ChannelsLastNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Unbiased(nn.Module):
    """A root-mean-square norm over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma
        return result


class Normed(nn.Module):
    """A stem and two convs, each of the two with a norm; and a classifier."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False)
        self.c1, self.n1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), norm(CHANNELS)
        self.c2, self.n2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), norm(CHANNELS)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n1(self.c1(torch.relu(self.stem(x)))))
        result: Tensor = self.head(torch.relu(self.n2(self.c2(x))).mean((2, 3)))
        return result


def tensors_of(norm: nn.Module) -> list[Tensor]:
    """What a norm keeps for each channel."""
    kept: Iterable[Any] = (*norm.parameters(), *norm.buffers())
    return [tensor for tensor in kept if tensor.numel() == CHANNELS]


def normed(norm: Norm) -> Normed:
    """The net, grouped already behind reordered channels, with statistics and affine maps that matter."""
    net = grouped_already(Normed(norm), PAIRS)
    generator = torch.Generator().manual_seed(2)
    for module in net.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            for name, tensor in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                if tensor.dim() and tensor.is_floating_point():
                    low = -0.2 if name in ("bias", "running_mean") else 0.6
                    nn.init.uniform_(tensor.data, low, low + 0.4, generator=generator)
    with_statistics(net, TINY)
    hidden(net, tensors_of(net.n1))
    return net


# Those that apply to each channel what belongs to it.
UNDERSTOOD: dict[str, Norm] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "other defaults": Defaults,
    "super().forward": Guarded,
    "in single precision": InSinglePrecision,
    "clipped": Clipped,
    "weight less one": Centred,
    "with activation": lambda c: BatchNormAct2d(c, apply_act=False),
    "with ReLU": BatchNormAct2d,
    "frozen": Frozen,
    "torchvision's frozen": FrozenBatchNorm2d,
    "not affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "average of all batches": lambda c: nn.BatchNorm2d(c, momentum=None),
    "synchronised": nn.SyncBatchNorm,
    "by function": ByFunction,
    "read elsewhere": ReadElsewhere,
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "instance, with statistics": lambda c: nn.InstanceNorm2d(c, track_running_stats=True),
    "one group": lambda c: nn.GroupNorm(1, c),
    "layer": ChannelsLastNorm,
    "two": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.BatchNorm2d(c)),
    "none": lambda c: nn.Identity(),
}


def converts(net: nn.Module) -> None:
    conversion = convert_small(net, noise(64, TINY))
    assert_same(conversion.model, net, tolerance=TOLERANCE)


def test_channels_are_reordered_in_front_of_a_norm() -> None:
    def check(net: nn.Module) -> None:
        assert_free(net, "stem", "c1")
        converts(net)

    together({name: normed(norm) for name, norm in UNDERSTOOD.items()}, check)


# Those that compute with channels together, in front of which an order may be kept.
TOGETHER: dict[str, Norm] = {"root mean square": Unbiased, "two groups": lambda c: nn.GroupNorm(2, c)}


def test_norms_over_channels_are_right() -> None:
    def net(norm: Norm) -> nn.Module:
        return hidden(grouped_already(Normed(norm), PAIRS), second=False)

    together({name: net(norm) for name, norm in TOGETHER.items()}, converts)


def test_norms_are_right_without_images() -> None:
    def check(net: nn.Module) -> None:
        assert_same(convert_from_weights(net).model, net, tolerance=TOLERANCE)

    names = ("BatchNorm2d", "clipped", "frozen", "layer")
    together({name: normed(UNDERSTOOD[name]) for name in names}, check)


def test_a_norm_that_uses_the_statistics_of_each_batch_is_converted_batch_by_batch() -> None:
    net = normed(lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    conversion = convert_small(net, noise(64, TINY))
    for count in (2, 8):
        assert relative_error(conversion.model, net, noise(count, TINY, 9)) < TOLERANCE


def test_norms_left_in_training_mode_come_back_so_and_are_judged_in_evaluation() -> None:
    net = normed(nn.BatchNorm2d)
    assert isinstance(net.n1, nn.BatchNorm2d)
    net.n1.train()
    before = copy.deepcopy(net.state_dict())
    model = convert_small(net, noise(64, TINY)).model
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in model.modules()] == [module.training for module in net.modules()]
    assert relative_error(model, net, noise(8, TINY, 9)) < TOLERANCE
