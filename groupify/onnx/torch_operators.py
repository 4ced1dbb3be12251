"""PyTorch reads the source of its hundreds of ONNX operators anew for every export; once is enough.

A small model's export takes half as long then.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

_READ: dict[Any, Any] = {}


@contextlib.contextmanager
def operators_read_once() -> Iterator[None]:
    """Let exports take the operators that an earlier one has read.

    The place is private to PyTorch: where it is not what it is in torch 2.9 to 2.14, nothing is changed.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    registries: Any = ONNXRegistry
    own, read = vars(registries).get("from_torchlib"), getattr(registries, "from_torchlib", None)
    if own is None or read is None:
        yield
        return
    registries.from_torchlib = staticmethod(_once(read))
    try:
        yield
    finally:
        registries.from_torchlib = own


def _once(read: Callable[..., Any]) -> Callable[..., Any]:
    def once(*given: Any, **named: Any) -> Any:
        key = given, tuple(sorted(named.items()))
        if key not in _READ:
            found = read(*given, **named)
            if not isinstance(getattr(found, "functions", None), dict):
                return found
            _READ[key] = found
        # To a registry of its own an export may add operators.
        own = copy.copy(_READ[key])
        own.functions = {name: list(functions) for name, functions in own.functions.items()}
        return own

    return once
