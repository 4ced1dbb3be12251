"""A forward pass that leaves no trace on the modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# What every module has, which no forward pass changes.
_INTERNAL = frozenset(vars(nn.Module()))
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass leaves in buffers and attributes: counts, caches, activations, memories."""
    modules = (module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule))
    kept = [_State(module) for module in modules]
    try:
        yield
    finally:
        for state in kept:
            state.restore()


class _State:
    """What one module holds, but for its parameters and its children."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = dict(module._buffers)
        self._attributes = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
        held = list(self._attributes.values())
        collections = [value for value in held if type(value) in (list, dict, set)]
        # Hugging Face's models put hooks on themselves when they first run, and note that they have.
        collections += [getattr(module, name) for name in _HOOKS]
        self._collections = [(value, copy.copy(value)) for value in collections]
        self._tensors = [
            (tensor, tensor._version, tensor.detach().clone())
            for tensor in (*self._buffers.values(), *held)
            if isinstance(tensor, Tensor) and not tensor.is_inference()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        own: dict[str, Any] = vars(self._module)
        for name in [name for name in own if name not in _INTERNAL and name not in self._attributes]:
            del own[name]
        own.update(self._attributes)
        self._module._buffers.clear()
        self._module._buffers.update(self._buffers)
        for collection, before in self._collections:
            collection.clear()
            collection.extend(before) if isinstance(collection, list) else collection.update(before)
        for tensor, version, value in self._tensors:
            if tensor._version != version:
                tensor.copy_(value)
