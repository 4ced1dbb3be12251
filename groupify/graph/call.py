"""How a model is called: the arguments of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groupify.errors import ConversionError, GroupifyError
from groupify.graph.undisturbed import undisturbed


@dataclass(frozen=True)
class Call:
    """Arguments of one forward pass.

    Attributes:
        args: positional arguments, nested as the model wants them.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Any) -> Call:
        """Return the call that example inputs stand for.

        Args:
            inputs: a tensor; a tuple of positional arguments; a dict of keyword arguments; or a tuple
                of these two.
        """
        if isinstance(inputs, Call):
            return inputs
        if isinstance(inputs, Mapping):
            return Call((), dict(inputs))
        if isinstance(inputs, tuple):
            if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
                return Call(inputs[0], dict(inputs[1]))
            return Call(inputs)
        return Call((inputs,))

    def run(self, model: nn.Module) -> Any:
        """Call the model with copies of the tensors, and undo what that leaves on its modules.

        Raises:
            ConversionError: the model raises something, which is its cause.
        """
        with undisturbed(model):
            return self.run_for_good(model)

    def run_for_good(self, model: nn.Module, *, copy: bool = True) -> Any:
        """Do the same without undoing anything; ``copy=False``: on the very tensors."""
        fresh = self.map(Tensor.clone) if copy else self  # the model may work on them in place
        try:
            return model(*fresh.args, **fresh.kwargs)
        except (GroupifyError, MemoryError):
            raise
        except Exception as error:  # the user's model can raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConversionError(
                f"the model does not run on an input of shape {self.shapes()}: {reason}"
            ) from error

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """Return the call with every tensor replaced."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (tuple(self.args), dict(self.kwargs)))
        return Call(args, kwargs)

    @property
    def leaves(self) -> list[Any]:
        """All arguments, flattened; those by keyword in the order of their names."""
        return pytree.tree_leaves((tuple(self.args), dict(sorted(self.kwargs.items()))))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def batch_size(self) -> int:
        """Length of the first dimension of the first tensor that has one; 1 if there is none."""
        return next((len(tensor) for tensor in self.tensors if tensor.dim()), 1)

    def head(self, count: int) -> Call:
        """Return the call for the first ``count`` examples of the batch."""
        size = self.batch_size
        return self.map(lambda tensor: tensor[:count] if tensor.dim() and len(tensor) == size else tensor)

    def channels_last(self) -> Call:
        """Return the call with images in the memory format of oneDNN's fast path."""
        return self.map(
            lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()
        )

    def shapes(self) -> str:
        """Name the shapes of the tensors, for messages."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors) or "no tensors"


def example_input(
    input_shape: tuple[int, ...], *, batch: int = 1, like: nn.Module | None = None
) -> torch.Tensor:
    """Return seeded noise of shape (batch, *input_shape) on the device and in the dtype of ``like``."""
    values = torch.randn((batch, *input_shape), generator=torch.Generator().manual_seed(0))
    reference = (
        next((p for p in like.parameters() if p.is_floating_point()), None) if like is not None else None
    )
    return values if reference is None else values.to(device=reference.device, dtype=reference.dtype)
