"""How much flows between channels, and how well a grouped conv can do: what the clustering decides on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from groupify.devices import device_of, with_float64
from groupify.graph.permute import row_channels
from groupify.stats.moments import GroupedMoments, InputMoments, principal_maps
from groupify.stats.samples import SiteSamples
from groupify.structures import SiteRecipe, Structure


def norm_score(conv: nn.Module) -> Tensor:
    """Squared norm of the kernel from each input to each output, shape (O, I)."""
    return conv.get_parameter("weight").detach().flatten(2).square().sum(2)


def data_score(weight: Tensor, covariance: Tensor, variance: Tensor | None = None) -> Tensor:
    """Share of each output's variance that comes through each input, shape (O, I).

    Args:
        weight: shape (O, I, taps).
        covariance: of the taps of each input channel, shape (I, taps, taps).
        variance: of each output, shape (O,); if None, what comes through all inputs, each for itself.
    """
    through = torch.einsum("oia,iab,oib->oi", weight, covariance.float(), weight)
    whole = through.sum(1) if variance is None else variance
    return through / whole.clamp(min=1e-12).unsqueeze(1)


def sampled_score(conv: nn.Module, samples: SiteSamples) -> Tensor:
    """Return the ``data_score`` of a conv from samples of it."""
    moments = InputMoments()
    device = _solving(conv)
    for patches in samples.patches:
        moments.add(patches.to(device))
    outputs = torch.cat([part.to(device).float() for part in samples.patch_outputs])
    weight = conv.get_parameter("weight").detach().flatten(2).to(device)
    return data_score(weight, moments.input_covariance(), outputs.var(0, correction=0))


def _solving(conv: nn.Module) -> torch.device:
    return with_float64(device_of(conv))


def fitted_error(site: SiteRecipe, samples: SiteSamples, conv: nn.Module) -> float:
    """Return the mean relative error of the best grouped conv on the dense model's own inputs.

    Args:
        site: structure and shuffle; a grouped conv, or one with an expand behind it.
        samples: of the conv, in the order of its channels.
        conv: the dense conv.
    """
    if site.structure.expand is not None:
        return _error_behind_expand(site.structure, samples, conv)
    moments = GroupedMoments(precision=torch.float32)  # for a comparison alone
    for patches, outputs in _on(_solving(conv), samples):
        rows = row_channels(outputs.shape[1], site.groups, site.shuffle)
        count = len(patches)
        moments.update(
            patches.reshape(count, site.groups, -1), outputs[:, rows].reshape(count, site.groups, -1)
        )
    return float(moments.fit(ridge=0.01).error.mean())


def _on(device: torch.device, samples: SiteSamples) -> Iterator[tuple[Tensor, Tensor]]:
    """The patches and the outputs there, batch by batch, on a device."""
    for patches, outputs in zip(samples.patches, samples.patch_outputs, strict=True):
        yield patches.to(device), outputs.to(device)


def _error_behind_expand(structure: Structure, samples: SiteSamples, conv: nn.Module) -> float:
    """The same where all outputs read the best directions of every group."""
    assert structure.expand is not None
    groups = structure.groups
    inputs, latents, device = InputMoments(), GroupedMoments(precision=torch.float32), _solving(conv)
    for patches in samples.patches:
        inputs.add(patches.to(device).reshape(len(patches), groups, -1))
    weight = conv.get_parameter("weight").detach().flatten(1).to(device)
    shares = weight.reshape(len(weight), groups, -1).transpose(0, 1).double()
    maps = principal_maps(shares, inputs.input_covariance(), structure.expand // groups).float()
    for patches, outputs in _on(device, samples):
        read = torch.einsum("ngd,grd->ngr", patches.float().reshape(len(patches), groups, -1), maps)
        latents.update(read.flatten(1).unsqueeze(1), outputs.unsqueeze(1))
    return float(latents.fit(ridge=1e-6).error.mean())
