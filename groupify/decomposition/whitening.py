"""Coordinates of a conv's inputs in which their covariance is close to the identity.

There truncations by singular values are nearly optimal, single precision is enough, and the curvature
of a fit is that of the factors alone. The maps must keep the structure: where all channels are mixed
by a 1×1 conv, any map of the channels does, and any of the kernel's positions; where groups read
their own channels, any map inside a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from groupify.decomposition.cholesky import cholesky_with_ridge
from groupify.decomposition.eigen import eigh
from groupify.devices import double

# Directions of less variance than this part of the mean are not blown up to one.
_FLOOR = 1e-4
# Added to the variance of every direction in a regression: the least known would only mislead a start.
_START_RIDGE = 1e-2
# Part of the mean variance that is added to every input: keeps a singular covariance solvable.
_RIDGE = 1e-6


@dataclass(frozen=True)
class ByChannel:
    """Inputs whitened by a map of the channels and one of the kernel's positions.

    Attributes:
        covariance: in these coordinates, ordered by position and then channel, shape (K·I, K·I).
        channels: original weights = weights here · this, shape (I, I).
        positions: the same for the kernel's positions, shape (K, K).
        root_channels, root_positions: the inverses.
    """

    covariance: Tensor
    channels: Tensor
    positions: Tensor

    @classmethod
    def of(cls, covariance: Tensor, channels: int) -> ByChannel:
        """Whiten a covariance, shape (I·K, I·K)."""
        count = covariance.shape[0] // channels
        table = covariance.reshape(channels, count, channels, count)
        of_channels = _inverse_root(table.diagonal(dim1=1, dim2=3).sum(2))
        of_positions = _inverse_root(table.diagonal(dim1=0, dim2=2).sum(2))
        # What rounds before it is blown up a thousandfold is no longer positive.
        exact = cls(double(covariance), double(of_channels), double(of_positions))
        full = exact.inputs(exact.inputs(exact.covariance).T.contiguous()).to(covariance)
        scale = full.diagonal().mean().clamp(min=torch.finfo(full.dtype).tiny)
        full.div_(scale)
        full.diagonal().add_(_RIDGE)
        return cls(full, of_channels / scale.sqrt(), of_positions)

    def regression(self, cross: Tensor) -> Tensor:
        """Return the least squares of the outputs on the inputs here, hardly damped, shape (O, K, I).

        Args:
            cross: ``E[x yᵀ]`` in these coordinates, shape (K·I, O).
        """
        weight = torch.cholesky_solve(cross, cholesky_with_ridge(self.covariance, _START_RIDGE))
        return weight.T.reshape(-1, len(self.positions), len(self.channels))

    def inputs(self, rows: Tensor) -> Tensor:
        """Map the rows of a matrix, shape (I·K, m), from the original inputs to these, shape (K·I, m)."""
        channels, positions = len(self.channels), len(self.positions)
        mixed = self.channels @ rows.reshape(channels, -1)
        mixed = self.positions @ mixed.reshape(channels, positions, -1)
        return mixed.transpose(0, 1).reshape(channels * positions, -1)


@dataclass(frozen=True)
class ByGroup:
    """Inputs of each group whitened by themselves.

    Attributes:
        covariance: in these coordinates, shape (G, m, G·m), m = inputs of a group; its diagonal blocks are 1.
        maps: original weights of each group = weights here · this, shape (G, m, m).
    """

    covariance: Tensor
    maps: Tensor

    @classmethod
    def of(cls, covariance: Tensor, groups: int) -> ByGroup:
        """Whiten a covariance, shape (G·m, G·m)."""
        width = covariance.shape[0] // groups
        blocks = covariance.reshape(groups, width, groups, width)
        maps = torch.stack([_inverse_root(blocks[group, :, group]) for group in range(groups)])
        exact = double(maps)
        half = exact @ double(covariance).reshape(groups, width, -1)
        half = half.reshape(groups * width, groups, width)
        full = torch.einsum("ngw,gvw->ngv", half, exact).reshape(groups * width, -1).to(covariance)
        full.diagonal().add_(_RIDGE)
        return cls(full.reshape(groups, width, -1), maps)

    def inputs(self, rows: Tensor) -> Tensor:
        """Map the rows of a matrix, shape (G·m, c), from the original inputs to those here."""
        return (self.maps @ rows.reshape(*self.maps.shape[:2], -1)).reshape(rows.shape)


def _inverse_root(covariance: Tensor) -> Tensor:
    """A map M with M Cov Mᵀ = 1, but for directions of hardly any variance."""
    values, vectors = eigh(covariance.double())
    least = (_FLOOR * values.mean()).clamp(min=torch.finfo(torch.float32).tiny)
    root: Tensor = (vectors * torch.rsqrt(values.clamp(min=least))).T.to(covariance.dtype)
    return root.contiguous()
