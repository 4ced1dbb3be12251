"""Convs that read channels which moved, were mixed with pixels, or are more or fewer than a conv made."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.nets import lively, noise, relative_error
from tests.cases.small import (
    TINY,
    Between,
    Function,
    convert_small,
    follows,
    hidden,
    right_from_weights,
    stays,
    together,
)

Middle = tuple[Function | nn.Module, int]  # and how many channels come out of it


class Learned(nn.Module):
    """Adds a learned map of some shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        count = torch.Size(shape).numel()
        self.map = nn.Parameter(torch.sin(torch.arange(count).float()).reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map


class Ordered(nn.Module):
    """Takes channels in the order of a buffer."""

    order: Tensor

    def __init__(self, take: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(x, self.order)


def space_to_depth(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)], 1)


def channel_shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def gathered(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.reshape(1, -1, 1, 1).expand_as(x))


def warped(x: Tensor) -> Tensor:
    corners = torch.tensor([[[0.5, 0.0, 0.1], [0.0, 1.0, 0.0]]])
    grid = F.affine_grid(corners.expand(x.shape[0], -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


# Whatever happens between them, the channels of the first conv may change places.
ALIKE: dict[str, Middle] = {
    "concatenation along the height": (lambda x: torch.cat([x, x.flip(2)], 2), 8),
    "concatenation along the width": (lambda x: torch.cat([F.relu(x), F.tanh(x)], -1), 8),
    "roll": (lambda x: x.roll((1, 2), (2, 3)), 8),
    "flip": (lambda x: x.flip(-1), 8),
    "rotated": (lambda x: x.rot90(1, (2, 3)), 8),
    "upsampled": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 8),
    "padded by reflection": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 8),
    "stacked and summed": (lambda x: torch.stack([x, x.flip(-1)]).sum(0), 8),
}  # fmt: skip
# Channels that are told apart, or joined with pixels.
TOLD_APART: dict[str, Middle] = {
    "map for all channels": (Learned(1, 1, 8, 8), 8),
    "learned map": (Learned(1, 8, 8, 8), 8),
    "learned row": (Learned(8, 1, 8), 8),
    "pixel shuffle": (lambda x: F.pixel_shuffle(torch.cat([x] * 4, 1), 2), 8),
    "pixel shuffle of the conv's own": (lambda x: F.pixel_shuffle(x, 2), 2),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 32),
    "space to depth": (space_to_depth, 32),
    "channel shuffle": (channel_shuffle, 8),
    "native channel shuffle": (lambda x: F.channel_shuffle(x, 2), 8),
    "channels flipped": (lambda x: x.flip(1), 8),
    "channels rolled": (lambda x: x.roll(1, 1), 8),
    "channels repeated": (lambda x: x.repeat_interleave(2, 1), 16),
    "channels twice": (lambda x: x.repeat(1, 2, 1, 1), 16),
    "channels indexed": (Ordered(lambda x, order: x[:, order]), 8),
    "index_select": (Ordered(lambda x, order: x.index_select(1, order)), 8),
    "gather": (Ordered(gathered), 8),
    "every other channel": (lambda x: x[:, ::2], 4),
    "sorted channels": (lambda x: x.sort(1).values, 8),
    "maximum of pairs": (lambda x: x.reshape(x.shape[0], 4, 2, 8, 8).amax(2), 4),
    "pooled over channels": (lambda x: F.max_pool3d(x[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0], 8),
    "channels become rows": (lambda x: x.transpose(1, 2), 8),
    "unfolded and folded": (lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2), 8),
    "warped": (warped, 8),
    "cumulative sum": (lambda x: x.cumsum(1), 8),
}


def made(middle: Middle, *, second: bool) -> Between:
    """The net, grouped already; ``second``: the channels in front of the middle are reordered, too."""
    between, read = middle
    return hidden(Between(copy.deepcopy(between), read), second=second)


def test_channels_that_all_fare_alike_change_places() -> None:
    together({name: made(middle, second=True) for name, middle in ALIKE.items()}, follows)


def test_channels_that_are_told_apart_keep_their_places() -> None:
    together({name: made(middle, second=False) for name, middle in TOLD_APART.items()}, stays)


BOTH = ALIKE | TOLD_APART
SHOWN = ("concatenation along the height", "learned map", "pixel shuffle", "pixel unshuffle", "gather")


@pytest.mark.parametrize("shuffle", ["none", "all"])
def test_a_dense_net_is_converted_with_shuffles_and_without(shuffle: str) -> None:
    def check(net: nn.Module) -> None:
        conversion = convert_small(net, shuffle=shuffle)
        assert 1e-3 < relative_error(conversion.model, net, noise(8, TINY, 9)) < 1

    together({name: lively(Between(copy.deepcopy(BOTH[name][0]), BOTH[name][1])) for name in SHOWN}, check)


def test_pixels_are_moved_without_images() -> None:
    together({name: made(BOTH[name], second=False) for name in SHOWN}, right_from_weights)
