"""The layers a converted model is made of: plain PyTorch, plus a channel shuffle behind a conv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def channel_shuffle(inputs: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` equal blocks.

    Output channel ``j * groups + g`` is input channel ``g * (C / groups) + j``, as in ShuffleNet
    (Zhang, Zhou, Lin and Sun, 2018).

    Args:
        inputs: shape (N, C, *spatial), C divisible by ``groups``.
        groups: number of blocks.

    Returns:
        A tensor of the shape of ``inputs``.
    """
    # Without a look at the shape, which a symbolic trace by torch.fx does not have.
    blocks: Tensor = inputs.unflatten(1, (groups, -1))
    return blocks.transpose(1, 2).flatten(1, 2)


def shuffle_order(channels: int, groups: int) -> Tensor:
    """Return the order with ``channel_shuffle(x, groups) == x[:, order]``; shape (channels,)."""
    return torch.arange(channels).reshape(groups, channels // groups).t().reshape(-1)


class _Shuffled(nn.Module):
    """A grouped conv followed by a channel shuffle over ``shuffle_groups`` blocks.

    It keeps the state-dict keys of a plain conv, so that a converted model has the keys of the dense
    one. Deployment moves the shuffle behind the activation or folds it away.
    """

    def __init__(self, *args: Any, shuffle_groups: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shuffle_groups = shuffle_groups

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Convolve, then shuffle; shapes as in the conv itself."""
        return channel_shuffle(super().forward(input), self.shuffle_groups)

    def extra_repr(self) -> str:
        """Say what ``repr`` shows of this layer."""
        base: str = super().extra_repr()
        return f"{base}, shuffle_groups={self.shuffle_groups}"


class ShuffledConv1d(_Shuffled, nn.Conv1d):
    """A grouped ``Conv1d`` followed by a channel shuffle."""


class ShuffledConv2d(_Shuffled, nn.Conv2d):
    """A grouped ``Conv2d`` followed by a channel shuffle."""


class ShuffledConv3d(_Shuffled, nn.Conv3d):
    """A grouped ``Conv3d`` followed by a channel shuffle."""


SHUFFLED: dict[type[nn.Module], Any] = {
    nn.Conv1d: ShuffledConv1d,
    nn.Conv2d: ShuffledConv2d,
    nn.Conv3d: ShuffledConv3d,
}
