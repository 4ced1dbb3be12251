"""The random generators that a training run draws from: torch's, Python's and NumPy's global ones."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed all global generators."""
    torch.manual_seed(seed)  # of every device
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def own_random_states(device: torch.device, generators: list[torch.Generator]) -> Iterator[None]:
    """Give all generators, the given ones too, their states back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def torch_states(device: torch.device, augmentation: torch.Generator) -> list[Tensor]:
    """Return the states of torch's generators, each uint8 of shape (n,)."""
    states = [torch.get_rng_state(), augmentation.get_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_torch_states(states: list[Tensor], device: torch.device, augmentation: torch.Generator) -> None:
    """Put ``torch_states`` back."""
    torch.set_rng_state(states[0])
    augmentation.set_state(states[1])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[2], device)


def library_states() -> dict[str, Any]:
    """Return the states of Python's and NumPy's generators, as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
    }


def set_library_states(states: dict[str, Any]) -> None:
    """Put ``library_states`` back."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
