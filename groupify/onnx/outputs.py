"""The tensors that a model returns, by name, whatever it nests them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from groupify.errors import ConversionError

OUTPUT_NAME = "output"


def named_outputs(value: Any) -> dict[str, Tensor]:
    """Return the tensors in what a model returned, in its order, under the names that an ONNX file gives
    them.

    A tensor alone is ``output``; mappings and dataclasses give their keys, joined by dots; the entries of
    tuples and lists are numbered, ``output_0`` or ``boxes_1``. None, numbers and strings, which do not depend
    on the input, are left out.

    Raises:
        ConversionError: there is no tensor, or anything else beside those above.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in _walk(value, ""):
        number = 0
        free = name
        while free in found:
            number += 1
            free = f"{name}_{number}"
        found[free] = tensor
    if not found:
        raise _not_tensors(value, "")
    return found


def _walk(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path or OUTPUT_NAME, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _walk(entry, f"{path}.{key}" if path else str(key))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _walk({field.name: getattr(value, field.name) for field in fields(value)}, path)
    elif isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            yield from _walk(entry, f"{path or OUTPUT_NAME}_{index}")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise _not_tensors(value, path)


def _not_tensors(value: Any, path: str) -> ConversionError:
    where = f" in {path!r}" if path else ""
    return ConversionError(
        f"cannot export a model that returns {type(value).__name__}{where}: expected tensors, alone or in "
        "dicts, tuples, lists or dataclasses; wrap the model in one that returns these"
    )
