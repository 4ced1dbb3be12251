"""Replace the convolutions of a model by grouped ones, by name, in a copy.

A converted model is made of plain PyTorch layers, plus a channel shuffle behind a conv where asked for.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from groupify.errors import ConversionError, near_names
from groupify.graph.operations import CONVS, Conv, conv_kind
from groupify.graph.permute import row_channels
from groupify.structures import GROUPED, KINDS, SiteRecipe


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


def block_diagonal(weight: Tensor, groups: int, *, shuffle: bool = False) -> Tensor:
    """Return the blocks of a dense weight that a grouped conv keeps (truncation).

    Args:
        weight: dense weight, shape (O, I, *kernel).
        groups: number of groups; divides O and I.
        shuffle: whether the grouped conv is followed by a channel shuffle.

    Returns:
        Shape (O, I / groups, *kernel).
    """
    out_channels, in_channels = weight.shape[:2]
    rows = weight[row_channels(out_channels, groups, shuffle).to(weight.device)]
    blocks = rows.reshape(groups, out_channels // groups, groups, in_channels // groups, *weight.shape[2:])
    return torch.cat([blocks[group, :, group] for group in range(groups)])


def _new_conv(dense: Conv, groups: int, shuffle: bool, *, bias: bool) -> Conv:
    options: dict[str, Any] = {
        # Built on the meta device: random initial weights would only be thrown away, and would draw
        # from the global generator.
        "device": "meta",
        "in_channels": dense.in_channels,
        "out_channels": dense.out_channels,
        "kernel_size": dense.kernel_size,
        "stride": dense.stride,
        "padding": dense.padding,
        "dilation": dense.dilation,
        "groups": groups,
        "bias": bias,
        "padding_mode": dense.padding_mode,
        "dtype": dense.weight.dtype,
    }
    kind = conv_kind(dense)
    assert kind is not None
    conv: Conv = SHUFFLED[kind](shuffle_groups=groups, **options) if shuffle else kind(**options)
    return conv.to_empty(device=dense.weight.device)


def _replacement(dense: Conv, site: SiteRecipe) -> nn.Module:
    """Build the module that takes the place of ``dense``, with truncated weights."""
    has_bias = dense.bias is not None
    replacement: nn.Module
    if site.kind == GROUPED:
        conv = _new_conv(dense, site.groups, site.shuffle, bias=has_bias)
        with torch.no_grad():
            conv.weight.copy_(block_diagonal(dense.weight, site.groups, shuffle=site.shuffle))
            if conv.bias is not None and dense.bias is not None:
                rows = row_channels(dense.out_channels, site.groups, site.shuffle).to(dense.bias.device)
                conv.bias.copy_(dense.bias[rows])
        replacement = conv
    else:
        conv = _new_conv(dense, site.groups, shuffle=False, bias=False)
        channels = dense.out_channels
        kind = conv_kind(dense)
        assert kind is not None
        pointwise = kind(
            channels, channels, 1, bias=has_bias, device="meta", dtype=dense.weight.dtype
        ).to_empty(device=dense.weight.device)
        with torch.no_grad():
            conv.weight.copy_(block_diagonal(dense.weight, site.groups))
            pointwise.weight.copy_(torch.eye(dense.out_channels).reshape(pointwise.weight.shape))
            if pointwise.bias is not None and dense.bias is not None:
                pointwise.bias.copy_(dense.bias)
        replacement = nn.Sequential(OrderedDict([("grouped", conv), ("pointwise", pointwise)]))
    for parameter in replacement.parameters():
        parameter.requires_grad_(dense.weight.requires_grad)
    return replacement.train(dense.training)


def _check(site: SiteRecipe, model: nn.Module) -> Conv:
    modules = dict(model.named_modules(remove_duplicate=False))
    module = modules.get(site.name)
    if module is None:
        convs = [name for name, child in modules.items() if isinstance(child, CONVS)]
        raise ConversionError(
            f"the model has no layer {site.name!r}, so it is not the model that the plan was made for"
            f"{near_names(site.name, convs)}"
        )
    if not isinstance(module, CONVS) or conv_kind(module) is None:
        raise ConversionError(
            f"layer {site.name!r} is a {type(module).__name__}, expected a plain Conv1d, Conv2d or Conv3d"
        )
    if module.groups != 1:
        raise ConversionError(
            f"layer {site.name!r} has {module.groups} groups already, expected a dense conv"
        )
    if site.kind not in KINDS:
        raise ConversionError(
            f"layer {site.name!r}: unknown kind {site.kind!r}, expected one of {', '.join(KINDS)}"
        )
    if site.groups < 2 or module.in_channels % site.groups or module.out_channels % site.groups:
        raise ConversionError(
            f"layer {site.name!r}: {site.groups} groups do not divide its "
            f"{module.in_channels} → {module.out_channels} channels"
        )
    if site.shuffle and site.kind != GROUPED:
        raise ConversionError(f"layer {site.name!r}: a shuffle needs kind 'grouped', not {site.kind!r}")
    return module


def restructure(model: nn.Module, sites: Sequence[SiteRecipe]) -> nn.Module:
    """Return a copy of ``model`` in which the named convs are replaced by grouped ones.

    The new weights are the diagonal blocks of the dense ones (truncation). Every name under which
    a shared conv is known gets the same replacement.

    Args:
        model: a dense model; it is left untouched.
        sites: what to replace.

    Raises:
        ConversionError: a site does not name a dense conv, or its groups do not divide the channels.
    """
    converted = copy.deepcopy(model)
    for site in sites:
        dense = _check(site, converted)
        replacement = _replacement(dense, site)
        aliases = [
            name
            for name, module in converted.named_modules(remove_duplicate=False)
            if module is dense and name
        ]
        if not aliases:
            return replacement
        for alias in aliases:
            parent, _, attribute = alias.rpartition(".")
            setattr(converted.get_submodule(parent), attribute, replacement)
    return converted
