"""Where tensors are: the device of a model, the one that a user names, and where float64 is to be had."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

from groupify.errors import SpecError

AUTO = "auto"
_CPU = torch.device("cpu")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return _CPU if first is None else first.device


def find_device(name: str) -> torch.device:
    """Return the device of a name as PyTorch has them: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.

    ``"auto"`` is the present GPU of CUDA or ROCm, or else the CPU.

    Raises:
        SpecError: it is not here; says what is.
    """
    present = _present()
    if name == AUTO:
        if not torch.cuda.is_available():
            return _CPU
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and device.index is None and any(device.type == one.type for one in present):
        return device
    if device in present:
        return device
    there = ", ".join(map(str, present))
    raise SpecError(f"--device {name}: PyTorch sees no such device here; expected auto or one of {there}")


def _present() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [_CPU]
    count = torch.accelerator.device_count()
    return [_CPU, *(torch.device(accelerator.type, index) for index in range(count))]


def with_float64(device: torch.device) -> torch.device:
    """Return the device itself if it computes in float64, else the CPU: Apple's MPS does not."""
    return device if _has_float64(device.type) else _CPU


@functools.cache
def _has_float64(kind: str) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that it was given, so that a clock shows what it took."""
    if device.type != _CPU.type:
        torch.accelerator.synchronize(device)


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its own device or, where that has none, on the CPU."""
    return tensor.to(with_float64(tensor.device), torch.float64)
