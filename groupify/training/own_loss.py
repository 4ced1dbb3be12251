"""A loss of the user's own: what it is, and what it says of a batch and of each image in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from groupify.errors import GroupifyError, SpecError

Loss: TypeAlias = Callable[[Any, Tensor], Tensor]
"""What a model puts out for a batch of n images, and their labels, (n, …) → how wrong it is: a number, the
mean over the images, or one for each image, shape (n,). Lower is better."""


def loss_name(loss: Loss) -> str:
    """Return what a loss is called."""
    return str(getattr(loss, "__name__", type(loss).__name__))


def loss_of_batch(loss: Loss, outputs: Any, targets: Tensor) -> Tensor:
    """Return what a loss says of a batch: a number, or one for each image, shape (n,).

    Args:
        loss: the user's.
        outputs: what the model gives; half precision comes to the loss as float32.
        targets: the labels, shape (n, …), on the device of the outputs.

    Raises:
        SpecError: it fails, or gives something else.
    """
    name = loss_name(loss)
    try:
        value: Any = loss(in_full(outputs), targets)
    except (GroupifyError, MemoryError):
        raise
    except Exception as error:  # any Python code may run here
        reason = " ".join(str(error).split())
        raise SpecError(
            f"the loss {name!r} fails on labels of shape {tuple(targets.shape)}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    found = f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.shape in ((), (1,), (len(targets),)):
            return value if value.shape == (len(targets),) else value.reshape(())
        found = f"{value.dtype} of shape {tuple(value.shape)}"
    raise SpecError(
        f"the loss {name!r} gives {found}: expected a tensor of floats, a number or one for each image, "
        f"({len(targets)},); average over pixels and channels"
    )


def losses_of_images(loss: Loss, outputs: Any, targets: Tensor) -> Tensor:
    """Return a loss of each image, shape (n,): one that gives a number is asked image by image.

    Raises:
        SpecError: as :func:`loss_of_batch`.
    """
    together, count = loss_of_batch(loss, outputs, targets), len(targets)
    if together.shape == (count,):
        return together
    each = [
        loss_of_batch(loss, _one_of(outputs, index, count), targets[index : index + 1])
        for index in range(count)
    ]
    return torch.stack([value.reshape(()) for value in each])


def _one_of(outputs: Any, index: int, count: int) -> Any:
    def part(values: Tensor) -> Tensor:
        return values[index : index + 1] if values.dim() and len(values) == count else values

    return pytree.tree_map_only(Tensor, part, outputs)


def in_full(outputs: Any) -> Any:
    """Return outputs with half precision made float32."""
    halves = (torch.bfloat16, torch.float16)
    return pytree.tree_map_only(Tensor, lambda x: x.float() if x.dtype in halves else x, outputs)
