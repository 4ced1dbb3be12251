"""The factors that replace a conv's weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rounds of scaling: each brings the norms of two neighbours nearer to each other by a factor of about 3.
_ROUNDS = 12


@dataclass(frozen=True)
class Factors:
    """Weights of up to three convs in a row, for a conv with g groups.

    Attributes:
        reduce: 1×1, in g groups, shape (R, I/g); None where absent.
        core: k×k, in ``groups`` groups, shape (S, R/groups, *kernel).
        expand: 1×1, in g groups, shape (O, S/g); None where absent.
        groups: number of groups of the core.
        conv_groups: g.
        error: mean squared error of the outputs ÷ their variance, on the moments, each output weighted.
    """

    reduce: Tensor | None
    core: Tensor
    expand: Tensor | None
    groups: int
    conv_groups: int
    error: float

    def weight(self) -> Tensor:
        """Return the weight of the one conv that computes the same, shape (O, I/g, *kernel)."""
        outputs, width, *kernel = self.core.shape
        own = self.groups // self.conv_groups  # groups of the core in each group of the conv
        core = self.core.reshape(self.conv_groups, own, outputs // self.groups, width, -1)
        if self.reduce is None:
            blocks = core.new_zeros(self.conv_groups, own, core.shape[2], own, width, core.shape[4])
            index = torch.arange(own)
            blocks[:, index, :, index] = core.transpose(0, 1)
            maps = blocks.reshape(self.conv_groups, -1, own * width, core.shape[4])
        else:
            reduce = self.reduce.reshape(self.conv_groups, own, width, -1)
            maps = torch.einsum("gosrk,gori->gosik", core, reduce).flatten(1, 2)
        if self.expand is not None:
            expand = self.expand.reshape(self.conv_groups, -1, maps.shape[1])
            maps = torch.einsum("gbs,gsik->gbik", expand, maps)
        return maps.reshape(-1, maps.shape[2], *kernel)

    def scaled(self, scale: Tensor) -> Factors:
        """Return factors whose outputs are multiplied, each by its number of ``scale``, shape (O,)."""
        if self.expand is None:
            return replace(self, core=_scale_outputs(self.core, scale))
        return replace(self, expand=_scale_outputs(self.expand, scale))

    def balanced(self) -> Factors:
        """Return factors that compute the same, with equal norms on both sides of each latent channel.

        Training with one learning rate, weight decay, and int8 with one scale per tensor all ask for that.
        A latent that reads or feeds nothing stays as it is.
        """
        reduce, core, expand = self.reduce, self.core, self.expand
        for _ in range(_ROUNDS):
            if reduce is not None:
                scale = _equaliser(reduce, core, self.groups)
                reduce, core = _scale_outputs(reduce, scale), _scale_inputs(core, 1 / scale, self.groups)
            if expand is not None:
                scale = _equaliser(core, expand, self.conv_groups)
                core, expand = _scale_outputs(core, scale), _scale_inputs(expand, 1 / scale, self.conv_groups)
        return replace(self, reduce=reduce, core=core, expand=expand)


def _equaliser(writing: Tensor, reading: Tensor, groups: int) -> Tensor:
    """What to multiply the writing side of each latent by, and divide the reading side by."""
    written = torch.linalg.vector_norm(writing.flatten(1), dim=1)
    read = torch.linalg.vector_norm(_by_output(reading, groups), dim=(1, 3)).flatten()
    usable = (written > 0) & (read > 0)
    return torch.sqrt(read / written.where(usable, 1.0)).where(usable, 1.0)


def _by_output(weight: Tensor, groups: int) -> Tensor:
    """A conv's weight by group, output, input of the group and position."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _scale_outputs(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.flatten(1) * scale[:, None]).reshape(weight.shape)


def _scale_inputs(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    return (_by_output(weight, groups) * scale.reshape(groups, 1, -1, 1)).reshape(weight.shape)
