"""A copy of a model, whatever its modules keep besides their weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from groupify.errors import ConversionError


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a model.

    Activations that its modules have kept from a training step come without their history, which
    ``copy.deepcopy`` refuses to copy.

    Args:
        model: left untouched.
        memo: copies of parts, by the ``id`` of the part; as for ``copy.deepcopy``.

    Raises:
        ConversionError: something in it cannot be copied; names the first such attribute.
    """
    memo = {} if memo is None else memo
    memo.update({id(tensor): tensor.detach().clone() for tensor in _with_history(model)})
    known = dict(memo)
    try:
        return copy.deepcopy(model, memo)
    except MemoryError:
        raise
    except Exception as error:  # what a module keeps can raise anything
        found = _first_that_cannot_be_copied(model, known)
        where = "something in it" if found is None else f"its attribute {found!r}"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(
            f"the model cannot be copied, since {where} cannot ({reason}): a conversion works on a copy; "
            "keep such things outside of the model"
        ) from error


def on_cpu(model: nn.Module) -> nn.Module:
    """Return the model itself where all of it is on the CPU, else a copy there."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return model if all(tensor.device.type == "cpu" for tensor in tensors) else copy_of(model).cpu()


def copy_around_tensors(model: nn.Module) -> nn.Module:
    """Return a copy with the model's very parameters and buffers, which takes no memory.

    What runs the copy may change its attributes without the model noticing.

    Raises:
        ConversionError: something in the model cannot be copied.
    """
    return copy_of(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _with_history(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that modules keep and that autograd has made."""
    seen: set[int] = set()
    stack: list[Any] = [vars(module) for module in model.modules()]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (nn.Module, type)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, Mapping):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack.extend(value)
        elif not callable(value):
            stack.extend(getattr(value, "__dict__", {}).values())


def _first_that_cannot_be_copied(model: nn.Module, memo: dict[int, Any]) -> str | None:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                return f"{name}.{key}" if name else key
    return None
