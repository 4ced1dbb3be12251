"""Spatial SVD as a structure of groupify, so that its factors get the very same fit.

k×k ≈ k×1 then 1×k (Jaderberg, Vedaldi and Zisserman, 2014). A kh×kw conv I → O is, exactly, a fixed kh×1
conv that lays the kh values of each column side by side as I·kh channels, and a 1×kw conv I·kh → O behind it.
In that one a reduce to R channels is the vertical conv: spatial SVD is its structure (R, 1, –). So it is
converted like any other conv, and the fixed conv is then multiplied into the reduce.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn

from groupify.errors import ConversionError


def in_columns(name: str) -> str:
    """Name of the 1×kw conv that is all there is to convert of a conv laid out in columns."""
    return f"{name}.rows"


def lay_out_columns(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return a copy that computes the same, each named conv being a fixed kh×1 conv and a 1×kw conv.

    Raises:
        ConversionError: one of them is no ``Conv2d`` of one group.
    """
    model = copy.deepcopy(model)
    for name in names:
        conv = model.get_submodule(name)
        check_spatial(name, conv)
        assert isinstance(conv, nn.Conv2d)
        _replace(model, name, nn.Sequential(OrderedDict(columns=_columns(conv), rows=_rows(conv))).eval())
    return model


def merge_columns(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return a copy in which the fixed conv of each named one is multiplied into the reduce behind it."""
    model = copy.deepcopy(model)
    for name in names:
        columns = model.get_submodule(f"{name}.columns")
        reduce, core = model.get_submodule(in_columns(name)).children()
        assert isinstance(columns, nn.Conv2d)
        assert isinstance(reduce, nn.Conv2d)
        _replace(model, name, nn.Sequential(OrderedDict(reduce=_product(columns, reduce), core=core)).eval())
    return model


def check_spatial(name: str, conv: nn.Module) -> None:
    """Refuse layers that have no spatial SVD.

    Raises:
        ConversionError: it is no ``Conv2d`` of one group.
    """
    if type(conv) is not nn.Conv2d:
        raise ConversionError(
            f"layer {name!r} is a {type(conv).__name__}; expected a plain Conv2d, leave it out"
        )
    if conv.groups != 1:
        raise ConversionError(f"layer {name!r} has {conv.groups} groups; expected one, leave it out")


def _columns(conv: nn.Conv2d) -> nn.Conv2d:
    """Channel i·kh + a is row a of the kernel's column on channel i."""
    channels, height = conv.in_channels, conv.kernel_size[0]
    columns = nn.Conv2d(
        channels, channels * height, (height, 1), (conv.stride[0], 1), _padding(conv, 0),
        (conv.dilation[0], 1), channels, bias=False, padding_mode=conv.padding_mode,
    )  # fmt: skip
    with torch.no_grad():
        columns.weight.copy_(torch.eye(height).repeat(channels, 1).reshape(columns.weight.shape))
    return columns.requires_grad_(False)


def _rows(conv: nn.Conv2d) -> nn.Conv2d:
    height, width = conv.kernel_size
    rows = nn.Conv2d(
        conv.in_channels * height, conv.out_channels, (1, width), (1, conv.stride[1]), _padding(conv, 1),
        (1, conv.dilation[1]), bias=conv.bias is not None, padding_mode=conv.padding_mode,
    )  # fmt: skip
    with torch.no_grad():
        rows.weight.copy_(conv.weight.flatten(1, 2).unsqueeze(2))
        if rows.bias is not None and conv.bias is not None:
            rows.bias.copy_(conv.bias)
    return rows


def _product(columns: nn.Conv2d, reduce: nn.Conv2d) -> nn.Conv2d:
    """One conv in the place of a columns' and of the 1×1 conv behind it."""
    channels, height = columns.in_channels, columns.kernel_size[0]
    padding: str | tuple[int, int] = "same"
    if not isinstance(columns.padding, str):
        across = 0 if isinstance(reduce.padding, str) else reduce.padding[1]
        padding = columns.padding[0], across
    elif columns.padding != "same":
        padding = columns.padding
    product = nn.Conv2d(
        channels, reduce.out_channels, (height, 1), (columns.stride[0], reduce.stride[1]), padding,
        (columns.dilation[0], 1), bias=False, padding_mode=columns.padding_mode,
    )  # fmt: skip
    weight = reduce.weight.detach().reshape(reduce.out_channels, channels, height)
    with torch.no_grad():
        laid_out = columns.weight.reshape(channels, height, height)
        product.weight.copy_(torch.einsum("rij,ija->ria", weight, laid_out).unsqueeze(3))
    return product


def _padding(conv: nn.Conv2d, axis: int) -> str | tuple[int, int]:
    if isinstance(conv.padding, str):
        return conv.padding
    return (conv.padding[0], 0) if axis == 0 else (0, conv.padding[1])


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
