"""Orders of channels: those of permutation classes, put into the weights, and those of channel shuffles."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from groupify.graph.atoms import along
from groupify.graph.channels import Channels
from groupify.graph.copying import copy_of
from groupify.graph.labelling import ChannelUse
from groupify.graph.model_graph import named_tensor


def apply_orders(model: nn.Module, channels: Channels, orders: Mapping[int, Tensor]) -> nn.Module:
    """Return a copy of ``model`` with reordered channels, which computes the same outputs.

    Args:
        model: the model whose classes were found; left untouched.
        channels: its uses and classes.
        orders: class index → order, shape (size,): the channel at place ``i`` of the class is
            replaced by the one that was at place ``order[i]``.
    """
    permuted = copy_of(model)
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
    """Return the orders of the inputs and the outputs of a conv or linear layer."""
    inputs = outputs = None
    for index, use in enumerate(channels.uses):
        if use.name == f"{name}.weight" and use.dim == 1:
            inputs = use_order(channels, index, orders)
        elif use.name == f"{name}.weight" and use.dim == 0:
            outputs = use_order(channels, index, orders)
    return inputs, outputs


def input_factors(name: str, channels: Channels, orders: Mapping[int, Tensor]) -> Tensor:
    """Return by what constants made in ``forward`` change the reordered inputs of a layer, shape (I,)."""
    for index, use in enumerate(channels.uses):
        if use.name == f"{name}.weight" and use.dim == 1:
            return use.factors / use.factors[use_order(channels, index, orders)]
    return torch.ones(1)


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
    tensor = named_tensor(model, use.name)
    if use.dim is None:
        tensor.copy_(tensor.reshape(-1)[order].reshape(tensor.shape))
    elif use.dim == 0 or use.blocks == 1:
        made_up_for = along(use.factors[order] / use.factors, use.dim, tensor.shape).to(tensor)
        tensor.copy_(tensor.index_select(use.dim, order.to(tensor.device)) * made_up_for)
    else:
        _permute_inside_blocks(tensor, use.blocks, order)


def _permute_inside_blocks(weight: Tensor, groups: int, order: Tensor) -> None:
    """Reorder the inputs of a grouped conv, weight (O, I / groups, *kernel), each group by itself."""
    width, rows = weight.shape[1], weight.shape[0] // groups
    for group in range(groups):
        inside = order[group * width : (group + 1) * width] - group * width
        block = weight[group * rows : (group + 1) * rows]
        block.copy_(block[:, inside].clone())
