"""Files for any height and width: which axes these are, and another size that the model takes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from groupify.errors import ConversionError, SpecError
from groupify.graph.call import Call, Example, shape_of
from groupify.graph.forward import evaluating

# Names of the open axes, by the number of dimensions of an input with its batch.
_AXES: Mapping[int, tuple[str, ...]] = {
    3: ("length",),
    4: ("height", "width"),
    5: ("depth", "height", "width"),
}
# Nets that halve their maps n times and put them together again take multiples of 2 to the n.
_STEPS = (1, 2, 4, 8, 16, 32, 64)


def image_shape(example: Example) -> tuple[int, ...]:
    """Return the shape of one image that a model is called with.

    Raises:
        SpecError: it is not called with one tensor of (C, L), (C, H, W) or (C, D, H, W) alone.
    """
    alone = not isinstance(example, Call) or (len(example.args), len(example.leaves)) == (1, 1)
    shape = shape_of(example)
    if not alone or len(shape) + 1 not in _AXES:
        shown = example.shapes() if isinstance(example, Call) else shape
        raise SpecError(
            f"any height and width is for models called with one tensor of images (C, H, W), and this one is "
            f"called with {shown}: leave out dynamic_size (--dynamic-size)"
        )
    return shape


def open_axes(example: Example) -> dict[int, str]:
    """Return the axes that a file leaves open besides its batch, and their names.

    Raises:
        SpecError: as :func:`image_shape`.
    """
    return dict(enumerate(_AXES[len(image_shape(example)) + 1], start=2))


def other_shape(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the nearest larger shape of one input that a model takes too; the sides grow differently.

    Args:
        model: run in evaluation mode, and left as it was.
        input_shape: shape of one input that it takes, without the batch dimension.

    Raises:
        ConversionError: it takes none, such as one that flattens its maps into a linear layer; says which
            module fails, and why.
    """
    image_shape(input_shape)
    first: ConversionError | None = None
    for step in _STEPS:
        shape = _grown(input_shape, step)
        try:
            _run(model, shape)
        except ConversionError as error:
            first = first or error
        else:
            return shape
    assert first is not None
    raise first


def _grown(input_shape: tuple[int, ...], step: int) -> tuple[int, ...]:
    """Sides that grow by odd multiples of the step, each by another one."""
    channels, *sides = input_shape
    return (channels, *(side + (2 * number + 1) * step for number, side in enumerate(sides)))


def _run(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Run a model on a batch of one, and say which of its modules does not take it."""
    parameter = next(model.parameters(), torch.empty(0))
    inside: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(functools.partial(_enter, inside, name)))
        handles.append(module.register_forward_hook(functools.partial(_leave, inside)))
    try:
        with evaluating(model), torch.no_grad():
            Call((torch.zeros(1, *shape, device=parameter.device),)).run(model)
    except ConversionError as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ConversionError(
            f"{type(model).__name__} takes inputs of one size only: on {shape} {_named(model, inside)} fails "
            f"({cause}); leave out dynamic_size (--dynamic-size), or put what takes any size in its place, "
            "such as an adaptive pooling in front of a linear layer"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _enter(inside: list[str], name: str, *_: Any) -> None:
    inside.append(name)


def _leave(inside: list[str], *_: Any) -> None:
    inside.pop()


def _named(model: nn.Module, inside: list[str]) -> str:
    name = inside[-1] if inside else ""
    return f"{name!r} ({type(model.get_submodule(name)).__name__})" if name else "its forward"
