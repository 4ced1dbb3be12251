"""Orders of channels: those of permutation classes, put into the weights, and those of channel shuffles."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from groupify.graph.channels import (
    CONV_INPUT,
    CONV_OUTPUT,
    LINEAR_INPUT,
    LINEAR_OUTPUT,
    Channels,
    ChannelUse,
)


def apply_orders(model: nn.Module, channels: Channels, orders: Mapping[int, Tensor]) -> nn.Module:
    """Return a copy of ``model`` with reordered channels, which computes the same outputs.

    Args:
        model: the model whose classes were found; left untouched.
        channels: its uses and classes.
        orders: class index → order, shape (size,): the channel at place ``i`` of the class is
            replaced by the one that was at place ``order[i]``.
    """
    permuted = copy.deepcopy(model)
    for index, use in enumerate(channels.uses):
        order = use_order(channels, index, orders)
        if not torch.equal(order, torch.arange(len(order))):
            _permute(permuted, use, order)
    return permuted


def use_order(channels: Channels, index: int, orders: Mapping[int, Tensor]) -> Tensor:
    """Return the order of one use that the orders of its classes amount to, shape (length,)."""
    order = torch.arange(len(channels.uses[index].atoms))
    for class_index, class_order in orders.items():
        places = channels.classes[class_index].places.get(index)
        if places is not None:
            order[places.reshape(-1)] = places[class_order].reshape(-1)
    return order


def layer_orders(
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


def shuffle_order(channels: int, groups: int) -> Tensor:
    """Return the order with ``channel_shuffle(x, groups) == x[:, order]``; shape (channels,)."""
    return torch.arange(channels).reshape(groups, channels // groups).t().reshape(-1)


def row_channels(out_channels: int, groups: int, shuffle: bool) -> Tensor:
    """Return, for each filter of a grouped conv, the output channel that it computes; shape (O,)."""
    if not shuffle:
        return torch.arange(out_channels)
    return torch.argsort(shuffle_order(out_channels, groups))


@torch.no_grad()
def _permute(model: nn.Module, use: ChannelUse, order: Tensor) -> None:
    owner = _module_or_none(model, use.name)
    if owner is None:
        parameter = _tensor_or_none(model, use.name)
        if parameter is not None:  # a functional norm without a module has nothing of its own to permute
            parameter.copy_(parameter.reshape(-1)[order].reshape(parameter.shape))
    elif use.kind == CONV_INPUT:
        _permute_conv_input(owner, order)
    elif use.kind == LINEAR_INPUT:
        weight = owner.get_parameter("weight")
        weight.copy_(weight[:, order])
    elif use.kind in (CONV_OUTPUT, LINEAR_OUTPUT):
        for parameter in owner.parameters(recurse=False):
            parameter.copy_(parameter[order])
    else:
        for tensor in (*owner.parameters(recurse=False), *owner.buffers(recurse=False)):
            if tensor.dim() == 1 and len(tensor) == len(order):
                tensor.copy_(tensor[order])


def _permute_conv_input(conv: nn.Module, order: Tensor) -> None:
    weight = conv.get_parameter("weight")
    groups: int = conv.groups  # type: ignore[assignment]
    width = weight.shape[1]
    if width == 1 and groups > 1:
        return  # depthwise: the rows carry the order
    rows = weight.shape[0] // groups
    for group in range(groups):
        inside = order[group * width : (group + 1) * width] - group * width
        block = weight[group * rows : (group + 1) * rows]
        block.copy_(block[:, inside].clone())


def _module_or_none(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _tensor_or_none(model: nn.Module, name: str) -> Tensor | None:
    owner, _, attribute = name.rpartition(".")
    module = _module_or_none(model, owner)
    tensor = getattr(module, attribute, None)
    return tensor if isinstance(tensor, Tensor) else None
