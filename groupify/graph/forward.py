"""A model run as it is: in evaluation mode, on an example, and its outputs compared with another's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groupify.errors import ConversionError
from groupify.graph.call import Call


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


def run_once(model: nn.Module, call: Call | Tensor, *, copy: bool = True) -> Any:
    """Run one forward pass in inference mode without gradients; the training mode is put back.

    Args:
        model: the model.
        call: how it is called.
        copy: whether it gets copies of the tensors, since it may work on them in place.

    Raises:
        ConversionError: the model does not run on inputs like these.
    """
    call = Call.of(call)
    try:
        with evaluating(model), torch.no_grad():
            return call.run(model) if copy else call.run_for_good(model, copy=False)
    except ConversionError as error:
        if error.__cause__ is None:  # not of the model's own
            raise
        raise ConversionError(f"{error}; {_advice(model, call)}") from error.__cause__


def _advice(model: nn.Module, call: Call) -> str:
    missing = call.missing(model)
    if missing:
        return (
            f"it needs {' and '.join(map(repr, missing))} too: give example_inputs, and inputs for data, in "
            "Python; the command line takes models of one input"
        )
    if len(call.leaves) > 1 or call.kwargs:
        return "give example_inputs that it runs on"
    return "give the shape that it expects with --input-size C,H,W"


@torch.no_grad()
def same_outputs(model: nn.Module, other: nn.Module, call: Call) -> bool:
    """Whether two models give the same outputs up to rounding."""
    return equal_outputs(call.run(model), call.run(other))


def equal_outputs(one: Any, other: Any, *, tolerance: float = 1e-3) -> bool:
    """Whether the tensors in two outputs are the same up to rounding.

    Args:
        one, other: outputs of any nesting.
        tolerance: relative error; a tenth of it, relative to the largest value, is allowed everywhere.
    """
    ours, theirs = output_tensors(one), output_tensors(other)
    if [value.shape for value in ours] != [value.shape for value in theirs]:
        return False
    return all(_equal(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))


# Share of labels, masks or places that rounding may turn over.
_TURNED_OVER = 0.01


def _equal(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.is_complex() and b.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not (a.is_floating_point() and b.is_floating_point()):
        return a.numel() == 0 or float((a != b).float().mean()) <= _TURNED_OVER
    a, b = (
        a.to(torch.promote_types(a.dtype, torch.float32)),
        b.to(torch.promote_types(b.dtype, torch.float32)),
    )
    scale = float(torch.nan_to_num(a, nan=0.0, posinf=0.0, neginf=0.0).abs().max()) if a.numel() else 0.0
    # An overflow, which is reported later, is no difference.
    return torch.allclose(
        a, b.to(a.dtype), rtol=tolerance, atol=tolerance / 10 * max(1.0, scale), equal_nan=True
    )


def output_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an output of any nesting, in order."""
    tensors: list[Tensor] = []
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping):  # a class of the user's own, which torch does not look into
            tensors += output_tensors(list(leaf.values()))
        elif is_dataclass(leaf):
            tensors += output_tensors([getattr(leaf, field.name) for field in fields(leaf)])
    return tensors
