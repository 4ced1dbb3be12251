"""Replace the convolutions of a model by their structures, by name, in a copy.

A converted model is made of plain PyTorch layers, plus a channel shuffle behind a conv where asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from groupify.conversion.replaceable import shared_weights, why_not_replaceable
from groupify.errors import ConversionError, PlanError, near_names
from groupify.graph.copying import copy_of
from groupify.graph.permute import row_channels
from groupify.graph.plain_layers import CONVS, Conv, conv_kind
from groupify.models.wrappers import unwrapped
from groupify.structures import ConvShape, SiteRecipe, Structure


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


def _replace(conv: Conv, site: SiteRecipe) -> None:
    """Turn a conv into its replacement, with truncated weights.

    It stays the same object, so that it keeps its hooks, attributes, children and flags, and whatever else
    refers to it (a list, a hook of another layer) goes on to.
    """
    if site.structure.is_one_conv:
        _group(conv, site.groups, shuffle=site.shuffle)
    else:
        _become_sequence(conv, site.structure)


def _group(conv: Conv, groups: int, *, shuffle: bool) -> None:
    if shuffle and conv.bias is not None:
        rows = row_channels(conv.out_channels, groups, shuffle=True).to(conv.bias.device)
        conv.bias = _parameter(conv.bias.detach()[rows], like=conv.bias)
    weight = _truncated(conv.weight.detach(), conv.groups, groups, shuffle=shuffle)
    conv.weight = _parameter(weight, like=conv.weight)
    conv.groups = groups
    if shuffle:
        conv.__class__ = SHUFFLED[_kind(conv)]
        conv.shuffle_groups = groups  # type: ignore[assignment]


def _truncated(weight: Tensor, groups: int, wanted: int, *, shuffle: bool = False) -> Tensor:
    """The blocks of the weight of a conv with some groups that a conv with more of them keeps."""
    own = weight.chunk(groups)
    return torch.cat([block_diagonal(part, wanted // groups, shuffle=shuffle) for part in own])


def _become_sequence(conv: Conv, structure: Structure) -> None:
    """Turn a conv into a sequence of up to three; it keeps its sizes as attributes.

    Its weights are truncated to the first latents of each group, which the 1×1 convs pass on.
    """
    reads, writes = structure.reduce or conv.in_channels, structure.expand or conv.out_channels
    own, like = conv.groups, conv.weight
    # What a 1×1 conv would not compute, for its stride, need not be reduced.
    reduces = structure.reduce is not None and set(conv.kernel_size) == {1}
    layers = {}
    if structure.reduce is not None:
        reduce = (_in_place_of if reduces else _pointwise)(conv, conv.in_channels, reads, own)
        reduce.weight = _parameter(_passing_on(reads, conv.in_channels, own, like), like=like)
        layers["reduce"] = reduce
    core = (_pointwise if reduces else _in_place_of)(conv, reads, writes, structure.groups)
    weight = _resized(like.detach(), own, writes // own, reads // own)
    core.weight = _parameter(_truncated(weight, own, structure.groups), like=like)
    layers["core"] = core
    if structure.expand is not None:
        expand = _pointwise(conv, writes, conv.out_channels, own)
        expand.weight = _parameter(_passing_on(conv.out_channels, writes, own, like), like=like)
        layers["expand"] = expand
    last = list(layers.values())[-1]
    last.bias = conv.bias
    for name in ("weight", "bias"):
        del conv._parameters[name]
    conv.groups = structure.groups
    conv.__class__ = nn.Sequential  # type: ignore[assignment]
    for name, layer in layers.items():
        conv.add_module(name, layer.train(conv.training))


def _in_place_of(conv: Conv, inputs: int, outputs: int, groups: int) -> Conv:
    """A conv without bias of the same kernel, stride, padding and dilation, its weights still to be set.

    Built on the meta device: random initial weights would only be thrown away, and would draw from the
    global generator.
    """
    return _kind(conv)(
        inputs, outputs, conv.kernel_size, conv.stride, conv.padding, conv.dilation, groups, False,  # type: ignore[arg-type]
        conv.padding_mode, device="meta", dtype=conv.weight.dtype,
    )  # fmt: skip


def _pointwise(conv: Conv, inputs: int, outputs: int, groups: int) -> Conv:
    """A 1×1 conv without bias, its weights still to be set."""
    return _kind(conv)(inputs, outputs, 1, groups=groups, bias=False, device="meta", dtype=conv.weight.dtype)


def _resized(weight: Tensor, groups: int, outputs: int, inputs: int) -> Tensor:
    """The first outputs and inputs of each group, shape (groups·outputs, inputs, *kernel); zeros beyond."""
    kernel = weight.shape[2:]
    resized = weight.new_zeros(groups, outputs, inputs, *kernel)
    kept = weight.reshape(groups, -1, weight.shape[1], *kernel)[:, :outputs, :inputs]
    resized[:, : kept.shape[1], : kept.shape[2]] = kept
    return resized.flatten(0, 1)


def _passing_on(outputs: int, inputs: int, groups: int, like: Tensor) -> Tensor:
    """The weight of a 1×1 conv that passes the first channels of each group on."""
    identity = torch.eye(outputs // groups, inputs // groups, device=like.device, dtype=like.dtype)
    return identity.repeat(groups, 1).reshape(outputs, -1, *[1] * (like.dim() - 2))


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
    shape = conv_shape(conv)
    try:
        site.structure.check(shape)
    except PlanError as error:
        raise ConversionError(f"layer {site.name!r}: {error}") from error
    if site.structure == Structure(groups=conv.groups):
        raise ConversionError(f"layer {site.name!r}: {site.structure} is the conv as it is; leave it out")
    if site.shuffle and not (site.structure.is_one_conv and conv.groups == 1):
        raise ConversionError(
            f"layer {site.name!r}: a shuffle is for a dense conv that becomes one grouped conv, and this is "
            f"{site.structure} for a {shape}"
        )
    if not site.structure.is_one_conv and conv._modules:
        raise ConversionError(
            f"layer {site.name!r} {why_not_several(conv)}; expected a structure of one conv"
        )


def conv_shape(conv: Conv) -> ConvShape:
    """Return what a conv's weight says of it."""
    return ConvShape(conv.in_channels, conv.out_channels, tuple(conv.kernel_size), conv.groups)


def why_not_several(conv: Conv) -> str | None:
    """Say why a conv cannot become a sequence of several, although it can be grouped; None where it can."""
    children = ", ".join(conv._modules)
    return f"has layers of its own ({children}), which a sequence of convs would run" if children else None


def restructure(model: nn.Module, sites: Sequence[SiteRecipe]) -> nn.Module:
    """Return a copy of ``model`` in which the named convs are replaced.

    The new weights are what is left of the old ones where channels and blocks are cut away (truncation).
    A shared conv is replaced under every name that it has. Wrappers for data parallelism and compilation are
    gone.

    Args:
        model: a dense model; it is left untouched.
        sites: what to replace.

    Raises:
        ConversionError: a site does not name a conv that can be replaced, or its structure does not suit it.
    """
    converted = copy_of(unwrapped(model))
    shared = shared_weights(converted) if sites else {}
    for site in sites:
        conv = _find(site.name, converted)
        _check(site, conv, shared)
        _replace(conv, site)
    return converted
