"""Small problems for decompositions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from groupify.decomposition.factors import Factors
from groupify.decomposition.moments import Moments
from groupify.structures import ConvShape, Structure


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(inputs: int, seed: int, groups: int = 1, samples: int | None = None) -> Tensor:
    """Of inputs whose variances span a factor of hundreds, shape (groups, inputs, inputs)."""
    mixed = random(groups, samples or 4 * inputs, inputs, seed=seed) @ random(
        groups, inputs, inputs, seed=seed + 1
    )
    mixed = mixed * torch.logspace(0, -1, inputs, dtype=torch.float64)
    mixed = mixed - mixed.mean(1, keepdim=True)
    return mixed.transpose(1, 2) @ mixed / mixed.shape[1]


def problem(conv: ConvShape, seed: int = 0) -> tuple[Moments, Tensor]:
    """Moments of a random conv, and its weight."""
    width = conv.in_channels // conv.groups
    weight = random(conv.out_channels, width, *conv.kernel_size, seed=seed)
    return Moments.of_weight(weight, covariance(width * conv.positions, seed + 1, conv.groups)), weight


def random_factors(conv: ConvShape, structure: Structure, seed: int = 0) -> Factors:
    """Factors of a structure, of weights that are all about 1."""
    width, ones = conv.in_channels // conv.groups, [1] * len(conv.kernel_size)
    reads, writes = structure.reduce or conv.in_channels, structure.expand or conv.out_channels
    reduce = random(reads, width, *ones, seed=seed) if structure.reduce else None
    core = random(writes, reads // structure.groups, *conv.kernel_size, seed=seed + 1)
    expand = (
        random(conv.out_channels, writes // conv.groups, *ones, seed=seed + 2) if structure.expand else None
    )
    return Factors(reduce, core, expand, structure.groups, conv.groups, 0.0)


def planted(conv: ConvShape, structure: Structure, seed: int = 0) -> Tensor:
    """A weight that a structure computes exactly."""
    return random_factors(conv, structure, seed).weight()


def left_over(weight: Tensor, wanted: Tensor, moments: Moments, scale: Tensor | None = None) -> float:
    """Relative error of a weight in place of the wanted one, from its definition."""
    groups, inputs, _ = moments.covariance.shape
    weights = torch.ones(len(weight), dtype=torch.float64) if scale is None else scale
    off, whole = (
        (maps.flatten(1) * weights[:, None]).reshape(groups, -1, inputs) for maps in (weight - wanted, wanted)
    )
    energy = [torch.einsum("goi,gij,goj->", maps, moments.covariance, maps) for maps in (off, whole)]
    return float(energy[0] / energy[1])


def run(factors: Factors, images: Tensor) -> Tensor:
    """The convs of the factors, one after the other, without padding."""
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[images.dim()]
    if factors.reduce is not None:
        images = conv(images, factors.reduce, groups=factors.conv_groups)
    images = conv(images, factors.core, groups=factors.groups)
    if factors.expand is not None:
        images = conv(images, factors.expand, groups=factors.conv_groups)
    return images
