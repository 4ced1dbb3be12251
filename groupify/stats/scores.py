"""How much flows between channels, and how well a grouped conv can do: what the clustering decides on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from groupify.conversion.surgery import row_channels
from groupify.graph.channels import Channels
from groupify.graph.permute import use_order
from groupify.graph.uses import CONV_INPUT, CONV_OUTPUT, LINEAR_INPUT, LINEAR_OUTPUT
from groupify.stats.moments import GroupedMoments
from groupify.stats.samples import SiteSamples
from groupify.structures import GROUPED, SiteRecipe


def norm_score(conv: nn.Module) -> Tensor:
    """Squared norm of the kernel from each input to each output, shape (O, I)."""
    return conv.get_parameter("weight").detach().flatten(2).square().sum(2)


def data_score(conv: nn.Module, samples: SiteSamples) -> Tensor:
    """Share of each output's variance that comes through each input, shape (O, I)."""
    weight = conv.get_parameter("weight").detach().flatten(2)
    patches = torch.cat([part.float() for part in samples.patches])
    outputs = torch.cat([part.float() for part in samples.patch_outputs])
    count = len(patches)
    by_channel = (patches - patches.sum(0) / count).transpose(0, 1)  # (I, n, k)
    covariance = by_channel.transpose(1, 2) @ by_channel / count
    through = torch.einsum("oia,iab,oib->oi", weight, covariance, weight)
    variance = (outputs - outputs.sum(0) / count).square().sum(0) / count
    return through / variance.clamp(min=1e-12).unsqueeze(1)


def permuted_samples(
    samples: SiteSamples, name: str, channels: Channels, orders: Mapping[int, Tensor]
) -> SiteSamples:
    """Return the samples that the layer ``name`` would have given in another channel order."""
    inputs, outputs = site_orders(name, channels, orders)
    return replace(
        samples,
        patches=[part[:, inputs] for part in samples.patches],
        patch_outputs=[part[:, outputs] for part in samples.patch_outputs],
        outputs=[part[:, outputs] for part in samples.outputs],
        sums=[part[:, outputs] for part in samples.sums],
    )


def site_orders(
    name: str, channels: Channels, orders: Mapping[int, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the orders of the inputs and the outputs of the layer ``name``."""
    inputs = outputs = None
    for index, use in enumerate(channels.uses):
        if use.name == name and use.kind in (CONV_INPUT, LINEAR_INPUT):
            inputs = use_order(channels, index, orders)
        elif use.name == name and use.kind in (CONV_OUTPUT, LINEAR_OUTPUT):
            outputs = use_order(channels, index, orders)
    return inputs, outputs


def fitted_error(site: SiteRecipe, samples: SiteSamples) -> float:
    """Return the mean relative error of the best grouped conv on the dense model's own inputs."""
    moments = GroupedMoments()
    for patches, outputs in zip(samples.patches, samples.patch_outputs, strict=True):
        rows = row_channels(outputs.shape[1], site.groups, site.kind == GROUPED and site.shuffle)
        count = len(patches)
        moments.update(
            patches.reshape(count, site.groups, -1), outputs[:, rows].reshape(count, site.groups, -1)
        )
    return float(moments.fit(ridge=0.01).error.mean())
