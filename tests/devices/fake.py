"""A device made of nothing but the CPU, as strict as a GPU: PyTorch's PrivateUse1, operators run by Python.

Its tensors refuse ``.numpy()``; no operator takes tensors of the CPU beside them, but for what a GPU takes
too (tensors without dimensions, indices), and none a generator of the CPU. Where that is asked for it has no
float64, like Apple's MPS. Registering it changes the process for good, so it belongs into one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fake"
_KEY = "PrivateUse1"
_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
_TAKES_CPU_INDICES = ("aten::index", "aten::_unsafe_index", "aten::_index_put_impl_")
_ATEN = torch.ops.aten


def register(*, float64: bool = True) -> torch.device:
    """Make the device known to PyTorch, once in a process."""
    _setup_privateuseone_for_python_backend(NAME)
    _Device(float64).register()
    return torch.device(NAME)


def _is_fake(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def _cpu(tensor: Tensor) -> Tensor:
    """The tensor of the CPU over the same memory as one of the device."""
    storage: Any = tensor.untyped_storage()
    return _over(storage.host, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())


def _over(memory: Any, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(memory, offset, size, stride)


class _Device:
    """The operators. Each tensor of the device has an empty storage, which bears one of the CPU."""

    def __init__(self, float64: bool) -> None:
        self._float64 = float64
        self._libraries: list[torch.library.Library] = []

    def register(self) -> None:
        """Register the operators, and what PyTorch would ask of real memory."""
        every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        every.fallback(self._run, _KEY)
        for name, function in {
            "empty.memory_format": self._empty,
            "empty_strided": self._empty_strided,
            "as_strided": _as_strided,
            "set_.source_Storage_storage_offset": self._set,
            "_copy_from": _copy_from,
            "_copy_from_and_resize": _copy_from,
            "convolution_overrideable": self._convolution,
            "convolution_backward_overrideable": self._convolution_backward,
        }.items():
            own.impl(name, function, _KEY)
        self._libraries += [every, own]
        _give_addresses()
        copy: Any = torch.UntypedStorage.__deepcopy__
        storages: Any = torch.UntypedStorage
        storages.__deepcopy__ = lambda storage, memo: (
            self._copied(storage, memo) if storage.device.type == NAME else copy(storage, memo)
        )

    def _fake(self, values: Tensor) -> Tensor:
        """Return a tensor of the device over the memory of one of the CPU."""
        if values.dtype == torch.float64 and not self._float64:
            raise TypeError(f"cannot make a float64 tensor on {NAME}: it has no float64")
        made: Tensor = torch._C._acc.create_empty_tensor(tuple(values.shape), values.dtype)
        made.untyped_storage().__dict__["host"] = values.untyped_storage()
        return _as_strided(made, values.shape, values.stride(), values.storage_offset())

    def _copied(self, storage: Any, memo: dict[Any, Any]) -> Any:
        known = memo.setdefault("torch", {})
        if storage._cdata not in known:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage.host.clone())
            known[storage._cdata] = self._fake(whole).untyped_storage()
        return known[storage._cdata]

    # operators of their own -----------------------------------------------------------------------

    def _empty(self, size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        layout = memory_format or torch.contiguous_format
        return self._fake(torch.empty(size, dtype=dtype, memory_format=layout))

    def _empty_strided(self, size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return self._fake(torch.empty_strided(size, stride, dtype=dtype))

    def _set(self, tensor: Tensor, source: Any, offset: int, size: Any, stride: Any = ()) -> Tensor:
        tensor.data = self._fake(_over(source.host, tensor.dtype, offset, size, stride))
        return tensor

    def _convolution(self, *args: Any) -> Any:
        return self._run(_ATEN.convolution.default, *args)

    def _convolution_backward(self, gradient: Tensor, inputs: Tensor, weight: Tensor, *args: Any) -> Any:
        return self._run(_ATEN.convolution_backward.default, gradient, inputs, weight, None, *args)

    # all others -----------------------------------------------------------------------------------

    def _run(self, operator: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an operator on the CPU, its inputs checked."""
        _check(operator, args, kwargs)
        given = tuple(map(_as_tensor, operator._schema.arguments, args))
        of_cpu: dict[int, tuple[Tensor, Tensor]] = {}  # id of the one on the CPU → it, and the one here

        def to_cpu(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if not isinstance(value, Tensor) or not _is_fake(value):
                return value
            lent = _cpu(value)
            of_cpu[id(lent)] = lent, value
            return lent

        found = operator(*_map(to_cpu, given), **{key: _map(to_cpu, value) for key, value in kwargs.items()})
        memory = {lent.untyped_storage()._cdata: own for lent, own in of_cpu.values()}

        def back(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in of_cpu:  # written in place, and perhaps resized
                own = of_cpu[id(value)][1]
                if own.shape != value.shape:
                    own.data = self._fake(value)
                return own
            base = memory.get(value.untyped_storage()._cdata)
            if base is None:
                return self._fake(value)
            return _as_strided(base, value.shape, value.stride(), value.storage_offset())  # a view

        return _map(back, found)


def _as_strided(tensor: Tensor, size: Any, stride: Any, storage_offset: Any = None) -> Tensor:
    # The kernel of the meta device does sizes alone, and asks for no memory.
    found: Tensor = _ATEN.as_strided.default.redispatch(_META, tensor, size, stride, storage_offset)
    return found


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    there, here = (_cpu(tensor) if _is_fake(tensor) else tensor for tensor in (to, source))
    there.copy_(here)
    return to


def _check(operator: Any, args: Any, kwargs: Any) -> None:
    """Refuse what a GPU refuses."""
    given = list(_leaves((args, tuple(kwargs.values()))))
    if any(isinstance(value, torch.Generator) and value.device.type != NAME for value in given):
        raise RuntimeError(f"{operator}: expected a generator of {NAME}, found one of the CPU")
    if operator.name().startswith(_TAKES_CPU_INDICES):
        given = [args[0], *args[2:3]]
    if any(isinstance(value, Tensor) and not _is_fake(value) and value.dim() for value in given):
        raise RuntimeError(f"{operator}: expected all tensors to be on {NAME}, found one on the CPU")


def _as_tensor(argument: Any, value: Any) -> Any:
    """Return a number as a tensor where an operator takes one: PyTorch unwraps it for Python."""
    is_number = isinstance(value, (int, float)) and str(argument.type) == "Tensor"
    return torch.tensor(value) if is_number else value


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, item) for item in value)
    return function(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _give_addresses() -> None:
    """Let the tensors have addresses, as those of a GPU do."""
    of_tensor: Any = torch.Tensor.data_ptr
    of_storage: Any = torch.UntypedStorage.data_ptr
    tensors: Any = torch.Tensor
    storages: Any = torch.UntypedStorage
    tensors.data_ptr = lambda own: of_tensor(_cpu(own) if _is_fake(own) else own)
    storages.data_ptr = lambda own: of_storage(own.host if own.device.type == NAME else own)
