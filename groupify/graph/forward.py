"""A model run as it is: in evaluation mode, on an example, and its outputs compared with another's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groupify.errors import ConversionError, GroupifyError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a while, then give every module its training mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def run_once(model: nn.Module, example: Tensor) -> Any:
    """Run one forward pass in inference mode without gradients; the training mode is put back.

    Raises:
        ConversionError: the model does not run on an input of that shape.
    """
    try:
        with evaluating(model), torch.no_grad():
            return model(example)
    except (GroupifyError, MemoryError):
        raise
    except Exception as error:  # the user's model can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(
            f"the model does not run on an input of shape {tuple(example.shape)}: {reason}; "
            "give the shape that it expects with --input-size C,H,W"
        ) from error


@torch.no_grad()
def same_outputs(model: nn.Module, other: nn.Module, example: Tensor) -> bool:
    """Whether two models give the same outputs up to rounding."""
    return equal_outputs(model(example.clone()), other(example.clone()))


def equal_outputs(one: Any, other: Any) -> bool:
    """Whether the tensors in two outputs are the same up to rounding."""
    ours, theirs = _leaves(one), _leaves(other)
    if [value.shape for value in ours] != [value.shape for value in theirs]:
        return False
    for a, b in zip(ours, theirs, strict=True):
        scale = float(torch.nan_to_num(a, nan=0.0, posinf=0.0, neginf=0.0).abs().max()) if a.numel() else 0.0
        # An overflow, which is reported later, is no difference.
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, scale), equal_nan=True):
            return False
    return True


def _leaves(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping):  # a class of the user's own, which torch does not look into
            tensors += _leaves(list(leaf.values()))
        elif is_dataclass(leaf):
            tensors += _leaves([getattr(leaf, field.name) for field in fields(leaf)])
    return tensors
