"""A captured graph that planning leaves to the conversion, for as long as the model stays the same.

Capturing a deep model takes seconds. A plan therefore carries the graph that was captured for it, with a
record of everything that the model held then: modules, tensors, attributes, hooks. A conversion compares that
with what the model holds now, and captures anew where anything differs or cannot be compared.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from groupify.graph.call import Call
from groupify.graph.channels import Channels
from groupify.graph.model_graph import ModelGraph

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, Enum)
_SEQUENCES = (list, tuple, set, frozenset)
_BY_IDENTITY = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.ModuleType,
)  # fmt: skip
_TORCH_AND_PYTHON = ("torch", "builtins", "collections", "enum", "abc", "typing")
_METHODS = (types.FunctionType, classmethod, staticmethod, property)
# ``training`` does not matter: a model is captured in evaluation mode.
_MODE = "training"
# A model of a thousand layers refers to a tenth of that; one that refers to more, to a data set maybe, is not
# worth the time.
_MOST_OBJECTS = 300_000


@dataclass(frozen=True)
class KeptGraph:
    """The graph of a model, its permutation classes, and what the model held when it was captured.

    A copy of it is None, since a copied or unpickled plan goes with another model.

    Attributes:
        graph: the graph, over no module: neither it nor the record keeps the model alive.
        channels: its permutation classes.
    """

    graph: ModelGraph
    channels: Channels
    _record: Any
    _types: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, graph: ModelGraph, channels: Channels, call: Call) -> KeptGraph | None:
        """Keep the graph of a model as it is now.

        Args:
            graph: over the caller's own model.
            channels: its permutation classes.
            call: what it was captured with.

        Returns:
            None where the model computes in other types than float32, in which it is converted, or holds
            something of which it cannot be said whether it is still the same.
        """
        model = graph.model
        tensors = (*model.parameters(), *model.buffers())
        if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors):
            return None
        record = _record(model)
        if record is None:
            return None
        return cls(replace(graph, model=nn.Module()), channels, record, _types(call))

    def holds_for(self, model: nn.Module, call: Call) -> bool:
        """Whether a model is the very one that was captured, and called with inputs of the same kind.

        Args:
            model: the caller's own.
            call: how it is called now; of any batch size.
        """
        return _types(call) == self._types and bool(_record(model) == self._record)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Leave it behind."""
        return _nothing, ()


def _nothing() -> None:
    return None


def _types(call: Call) -> tuple[torch.dtype, ...]:
    return tuple(tensor.dtype for tensor in call.tensors)


class _NotComparableError(Exception):
    """A value of which it cannot be said whether it is the same later."""


class _Same:
    """Equal to another of its kind if both stand for one object, which it does not keep alive if it can."""

    def __init__(self, value: Any) -> None:
        try:
            self._get: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._get = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._get() is not None and self._get() is other._get()

    __hash__ = None  # type: ignore[assignment]


def _record(model: nn.Module) -> Any:
    """Return what a model holds, to be compared with what it holds later; None where that cannot be said."""
    try:
        return _Recorder().of(model)
    except (_NotComparableError, RecursionError):
        return None


class _Recorder:
    """Walks through everything that an object refers to, once."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no two objects have the same id

    def of(self, value: Any) -> Any:
        """Return what a value holds, itself and its type included.

        Raises:
            _NotComparableError: it is, or refers to, something that no rule here is for.
        """
        if isinstance(value, _VALUES):
            return type(value), value
        if id(value) in self._numbers:
            return self._numbers[id(value)]
        if len(self._alive) == _MOST_OBJECTS:
            raise _NotComparableError("too many objects")
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        return type(value), self._parts(value)

    def _parts(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, functools.partial):
            return self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, _BY_IDENTITY) or type(value).__module__ == "torch._ops":
            return _Same(value)
        held = self._attributes(value)
        if isinstance(value, Mapping):
            return held, [(self.of(key), self.of(item)) for key, item in value.items()]
        if isinstance(value, _SEQUENCES):
            return held, [self.of(item) for item in value]
        if held is None:
            raise _NotComparableError(type(value))
        return _Same(value), self.of(type(value)), held

    def _tensor(self, tensor: Tensor) -> Any:
        if tensor.is_inference() or tensor.layout != torch.strided or tensor.is_meta:
            raise _NotComparableError(type(tensor))  # nothing counts what is written into it
        where = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        return _Same(tensor), tensor._version, where

    def _attributes(self, value: Any) -> Any:
        """What an object has in its own namespace; None where it has none."""
        own = getattr(value, "__dict__", None)
        slots = [
            name
            for kind in type(value).__mro__
            for name in (kind.__dict__.get("__slots__") or ())
            if name not in ("__dict__", "__weakref__")
        ]
        if own is None and not slots:
            return None
        held = {**(own or {}), **{name: getattr(value, name) for name in slots if hasattr(value, name)}}
        if isinstance(value, nn.Module):
            held.pop(_MODE, None)
        return [(name, self.of(item)) for name, item in held.items()]

    def _class(self, kind: type) -> Any:
        """A class and, where it is not torch's or Python's, what it holds: its attributes may be settings."""
        if kind.__module__.partition(".")[0] in _TORCH_AND_PYTHON or issubclass(kind, Enum):
            return _Same(kind)
        own = [(name, item) for name, item in vars(kind).items() if not name.startswith(("__", "_abc_"))]
        held = [(name, _Same(item) if isinstance(item, _METHODS) else self.of(item)) for name, item in own]
        return _Same(kind), [self.of(base) for base in kind.__bases__], held

    def _function(self, function: types.FunctionType) -> Any:
        try:
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # not filled yet
            raise _NotComparableError(function) from None
        held = [self.of(item) for item in (cells, function.__defaults__, function.__kwdefaults__)]
        return _Same(function), _Same(function.__code__), held
