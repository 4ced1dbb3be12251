"""How a model is called: the arguments of one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groupify.errors import ConversionError, GroupifyError, SpecError
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

    def apply(self, model: Callable[..., Any]) -> Any:
        """Call the model with the very tensors; what it raises comes as it is."""
        return model(*self.args, **self.kwargs)

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
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as a graph has them: those by keyword in the order of their names."""
        return tuple(self.args), dict(sorted(self.kwargs.items()))

    @property
    def leaves(self) -> list[Any]:
        """All arguments, flattened; those by keyword in the order of their names."""
        return pytree.tree_leaves(self.arguments)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def tensors_in_order(self) -> list[Tensor]:
        """The tensors among the arguments in the order in which ``map`` comes to them."""
        leaves = pytree.tree_leaves((tuple(self.args), dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def batch_size(self) -> int:
        """Length of the first dimension of the first tensor that has one; 1 if there is none."""
        return next((len(tensor) for tensor in self.tensors if tensor.dim()), 1)

    def head(self, count: int) -> Call:
        """Return the call for the first ``count`` examples of the batch."""
        return self.part(slice(count))

    def part(self, index: slice | Tensor) -> Call:
        """Return the call for some examples of the batch.

        Tensors whose first dimension has another length than the batch are the same for all examples.
        """
        size = self.batch_size
        return self.map(lambda tensor: tensor[index] if tensor.dim() and len(tensor) == size else tensor)

    @staticmethod
    def joined(calls: Sequence[Call]) -> Call:
        """Return one call for the examples of several, which differ in nothing else."""
        flat = [pytree.tree_flatten((tuple(call.args), dict(call.kwargs))) for call in calls]
        leaves = [
            torch.cat(values) if _is_of_examples(values, calls) else values[0]
            for values in zip(*(found for found, _ in flat), strict=True)
        ]
        return Call(*pytree.tree_unflatten(leaves, flat[0][1]))

    def of_size(self, count: int) -> Call:
        """Return a call for ``count`` examples: the first ones, or all of them again and again."""
        size = self.batch_size
        return self if size == count else self.part(torch.arange(count) % size)

    def split(self, parts: int) -> list[Call]:
        """Return the call in parts of nearly equal numbers of examples, as ``Tensor.tensor_split`` does."""
        if parts == 1:
            return [self]
        return [self.part(index) for index in torch.arange(self.batch_size).tensor_split(parts)]

    def floats(self, function: Callable[[Tensor], Tensor]) -> Call:
        """Return the call with every floating-point tensor replaced."""
        return self.map(lambda tensor: function(tensor) if tensor.is_floating_point() else tensor)

    def on(self, model: nn.Module) -> Call:
        """Return the call with its tensors on the device of a model."""
        parameter = next(model.parameters(), None)
        return self if parameter is None else self.map(lambda tensor: tensor.to(parameter.device))

    def named_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors under the names of the parameters of a model's forward, in their order.

        What is nested in a mapping or a sequence gets its key or number behind that: ``batch.image``,
        ``images_0``.
        """
        found: dict[str, Tensor] = {}
        for name, value in self._named(model).items():
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                if isinstance(leaf, Tensor):
                    found[name + path_name(path)] = leaf
        return found

    def _named(self, model: nn.Module) -> dict[str, Any]:
        signature = _signature(model)
        try:
            bound = signature.bind_partial(*self.args, **self.kwargs).arguments
        except TypeError:  # more arguments than it has; running the model will say so
            bound = {**{f"input_{i}": value for i, value in enumerate(self.args)}, **self.kwargs}
        spread = [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]
        named: dict[str, Any] = {}
        for name, value in bound.items():
            named |= value if name in spread else {name: value}
        return named

    def missing(self, model: nn.Module) -> list[str]:
        """Names of the arguments that a model's forward needs besides."""
        signature = _signature(model)
        try:
            bound = signature.bind_partial(*self.args, **self.kwargs).arguments
        except TypeError:
            return []
        needed = [
            n for n, p in signature.parameters.items() if p.default is p.empty and p.kind not in _SPREAD
        ]
        return [name for name in needed if name not in bound]

    def channels_last(self) -> Call:
        """Return the call with images in the memory format of oneDNN's fast path."""
        return self.map(
            lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()
        )

    def shapes(self) -> str:
        """Name the shapes of the tensors, for messages."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors) or "no tensors"


def _is_of_examples(values: Sequence[Any], calls: Sequence[Call]) -> bool:
    """Whether an argument of several calls is a tensor with an entry for each example."""
    return all(
        isinstance(value, Tensor) and value.dim() > 0 and len(value) == call.batch_size
        for value, call in zip(values, calls, strict=True)
    )


def _signature(model: nn.Module) -> inspect.Signature:
    """Return what a model's forward takes; nothing where Python cannot tell."""
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return inspect.Signature()


_SPREAD = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def path_name(path: Sequence[Any]) -> str:
    """Return what a name gets behind it for the place of a tensor in it: ``.image``, ``_0``."""
    return "".join(
        f"_{key.idx}" if isinstance(key, pytree.SequenceKey) else f".{getattr(key, 'key', key)}"
        for key in path
    )


Example: TypeAlias = Call | tuple[int, ...]
"""How a model is called: the shape of one example of its only input, (C, H, W) for images; or a call."""


def one_example(input_shape: tuple[int, ...] | None, example_inputs: Any) -> Example:
    """Return whichever a caller of the API has given.

    Args:
        input_shape: shape of one example, without the batch dimension.
        example_inputs: see ``Call.of``.

    Raises:
        SpecError: neither or both, something that is no shape, or inputs without a tensor.
    """
    if (input_shape is None) == (example_inputs is None):
        given = "neither" if input_shape is None else "both"
        raise SpecError(
            f"{given} of input_shape and example_inputs given: expected one of them, the shape of one image "
            "(C, H, W), or what the model is called with (a tensor, a tuple of arguments, a dict of keywords)"
        )
    if input_shape is not None:
        if isinstance(input_shape, Tensor | Call) or not all(isinstance(size, int) for size in input_shape):
            raise SpecError(
                f"input_shape is a {type(input_shape).__name__}: expected the sizes of one image, (C, H, W); "
                "give tensors as example_inputs"
            )
        return tuple(input_shape)
    call = Call.of(example_inputs)
    if not call.tensors or call.batch_size == 0:
        raise SpecError(
            f"example_inputs is a {type(example_inputs).__name__} of {call.shapes()}: expected a tensor with "
            "at least one example, or a tuple or dict with such tensors"
        )
    return call


def as_call(example: Example, model: nn.Module, *, batch: int = 2) -> Call:
    """Return how a model is called with ``batch`` examples, on its device."""
    if isinstance(example, Call):
        return example.on(model).of_size(batch)
    return Call((example_input(example, batch=batch, like=model),))


def shape_of(example: Example) -> tuple[int, ...]:
    """Return the shape of one example of the first tensor."""
    return tuple(example.tensors[0].shape[1:]) if isinstance(example, Call) else tuple(example)


def example_input(
    input_shape: tuple[int, ...], *, batch: int = 1, like: nn.Module | None = None
) -> torch.Tensor:
    """Return seeded noise of shape (batch, *input_shape) on the device and in the dtype of ``like``."""
    values = torch.randn((batch, *input_shape), generator=torch.Generator().manual_seed(0))
    reference = (
        next((p for p in like.parameters() if p.is_floating_point()), None) if like is not None else None
    )
    return values if reference is None else values.to(device=reference.device, dtype=reference.dtype)
