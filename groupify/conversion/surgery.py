"""Replace the convolutions of a model by grouped ones, by name, in a copy.

A converted model is made of plain PyTorch layers, plus a channel shuffle behind a conv where asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from groupify.conversion.replaceable import shared_weights, why_not_replaceable
from groupify.errors import ConversionError, near_names
from groupify.graph.copying import copy_of
from groupify.graph.permute import row_channels
from groupify.graph.plain_layers import CONVS, Conv, conv_kind
from groupify.models.wrappers import unwrapped
from groupify.structures import GROUPED, GROUPED_POINTWISE, KINDS, SiteRecipe


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


def _group(conv: Conv, site: SiteRecipe) -> None:
    """Turn a dense conv into its replacement, with truncated weights.

    It stays the same object, so that it keeps its hooks, attributes, children and flags, and whatever else
    refers to it (a list, a hook of another layer) goes on to.
    """
    if site.kind == GROUPED_POINTWISE:
        _become_pair(conv, site.groups)
        return
    if site.shuffle and conv.bias is not None:
        rows = row_channels(conv.out_channels, site.groups, shuffle=True).to(conv.bias.device)
        conv.bias = _parameter(conv.bias.detach()[rows], like=conv.bias)
    conv.weight = _parameter(
        block_diagonal(conv.weight.detach(), site.groups, shuffle=site.shuffle), like=conv.weight
    )
    conv.groups = site.groups
    if site.shuffle:
        conv.__class__ = SHUFFLED[_kind(conv)]
        conv.shuffle_groups = site.groups  # type: ignore[assignment]


def _become_pair(conv: Conv, groups: int) -> None:
    """Turn a conv into a sequence of a grouped and a pointwise one; it keeps its sizes as attributes."""
    channels, device, dtype = conv.out_channels, conv.weight.device, conv.weight.dtype
    biased = conv.bias is not None
    # Built on the meta device: random initial weights would only be thrown away, and would draw from the
    # global generator.
    first = _kind(conv)(
        conv.in_channels, channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, groups, False,  # type: ignore[arg-type]
        conv.padding_mode, device="meta", dtype=dtype,
    )  # fmt: skip
    pointwise = _kind(conv)(channels, channels, 1, bias=biased, device="meta", dtype=dtype)
    first.weight = _parameter(block_diagonal(conv.weight.detach(), groups), like=conv.weight)
    identity = torch.eye(channels, device=device, dtype=dtype)
    pointwise.weight = _parameter(identity.reshape(pointwise.weight.shape), like=conv.weight)
    if conv.bias is not None:
        pointwise.bias = conv.bias
    for name in ("weight", "bias"):
        del conv._parameters[name]
    conv.groups = groups
    conv.__class__ = nn.Sequential  # type: ignore[assignment]
    conv.add_module("grouped", first.train(conv.training))
    conv.add_module("pointwise", pointwise.train(conv.training))


def _kind(conv: Conv) -> type[Conv]:
    kind = conv_kind(conv)
    assert kind is not None
    return kind


def _parameter(values: Tensor, *, like: Tensor) -> nn.Parameter:
    """Return a parameter that is trained, and laid out in memory, as another one."""
    if like.dim() == 4 and not like.is_contiguous():
        values = values.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(values, requires_grad=like.requires_grad)


def _find(name: str, model: nn.Module) -> Conv:
    modules = dict(model.named_modules(remove_duplicate=False))
    module = modules.get(name)
    if module is None:
        convs = [name for name, child in modules.items() if isinstance(child, CONVS)]
        raise ConversionError(
            f"the model has no layer {name!r}, so it is not the model that the plan was made for"
            f"{near_names(name, convs)}"
        )
    if not isinstance(module, CONVS):
        raise ConversionError(
            f"layer {name!r} is a {type(module).__name__}, expected a plain Conv1d, Conv2d or Conv3d"
        )
    return module


def _check(site: SiteRecipe, conv: Conv, shared: Mapping[str, str]) -> None:
    """Refuse what cannot be done to a conv."""
    found = why_not_replaceable(conv)
    reason = shared.get(site.name) if found is None else found.reason
    if reason is not None:
        raise ConversionError(f"layer {site.name!r} cannot be replaced: {reason}")
    if conv.groups != 1:
        raise ConversionError(f"layer {site.name!r} has {conv.groups} groups already, expected a dense conv")
    if site.kind not in KINDS:
        raise ConversionError(
            f"layer {site.name!r}: unknown kind {site.kind!r}, expected one of {', '.join(KINDS)}"
        )
    if site.groups < 2 or conv.in_channels % site.groups or conv.out_channels % site.groups:
        raise ConversionError(
            f"layer {site.name!r}: {site.groups} groups do not divide its "
            f"{conv.in_channels} → {conv.out_channels} channels"
        )
    if site.shuffle and site.kind != GROUPED:
        raise ConversionError(f"layer {site.name!r}: a shuffle needs kind 'grouped', not {site.kind!r}")
    if site.kind == GROUPED_POINTWISE and conv._modules:
        raise ConversionError(f"layer {site.name!r} {why_no_pair(conv)}; expected kind 'grouped'")


def why_no_pair(conv: Conv) -> str | None:
    """Say why a conv cannot become a sequence of two, although it can be grouped; None where it can."""
    children = ", ".join(conv._modules)
    return f"has layers of its own ({children}), which a pair of convs would run" if children else None


def restructure(model: nn.Module, sites: Sequence[SiteRecipe]) -> nn.Module:
    """Return a copy of ``model`` in which the named convs are replaced by grouped ones.

    The new weights are the diagonal blocks of the dense ones (truncation). A shared conv is replaced under
    every name that it has. Wrappers for data parallelism and compilation are gone.

    Args:
        model: a dense model; it is left untouched.
        sites: what to replace.

    Raises:
        ConversionError: a site does not name a dense conv that can be replaced, or its groups do not
            divide the channels.
    """
    converted = copy_of(unwrapped(model))
    shared = shared_weights(converted) if sites else {}
    for site in sites:
        conv = _find(site.name, converted)
        _check(site, conv, shared)
        _group(conv, site)
    return converted
