"""The inputs of an ONNX file: their names and order, and what a call of the model feeds them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groupify.errors import GroupifyError
from groupify.graph.call import Call, path_name

INPUT_NAME = "input"


def input_places(model: nn.Module, call: Call) -> dict[str, int]:
    """Return the names of a file's inputs, in their order, and which of the call's tensors each is.

    A tensor alone is ``input``; several have the names of the parameters of the model's forward.
    """
    count = itertools.count()
    numbered = call.map(lambda _: torch.tensor(next(count))).named_tensors(model)
    places = {name: int(number) for name, number in numbered.items()}
    return {INPUT_NAME: 0} if len(places) == 1 else places


def feed(names: Sequence[str], call: Call, file: str) -> dict[str, Tensor]:
    """Return the tensors of a call by the names of a file's inputs.

    Positional ones take the inputs in their order, those by keyword the input of that name; what is nested
    in them is told by its keys.

    Raises:
        GroupifyError: the file has other inputs.
    """
    if len(names) == 1 and len(call.tensors) == 1:
        return {names[0]: call.tensors[0]}
    free, fed = list(names), {}
    for name, tensor in _named(call.kwargs):
        if name in free:
            free.remove(name)
            fed[name] = tensor
    for suffix, tensor in itertools.chain(*(_paths(value) for value in call.args)):
        found = next((name for name in free if name.endswith(suffix)), None)
        if found is not None:
            free.remove(found)
            fed[found] = tensor
    if free or len(fed) != len(call.tensors):
        raise GroupifyError(
            f"{file!r} has the inputs {', '.join(names)}, and was called with tensors of shapes "
            f"{call.shapes()}: give one for each of them, in this order or by these names"
        )
    return fed


def _named(kwargs: object) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix("."), tensor) for name, tensor in _paths(kwargs)]


def _paths(value: object) -> list[tuple[str, Tensor]]:
    leaves = pytree.tree_flatten_with_path(value)[0]
    return [(path_name(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
