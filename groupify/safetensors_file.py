"""Reading safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, on the CPU, and its metadata.

    Raises:
        OSError: the file cannot be read.
        safetensors.SafetensorError: it is damaged.
    """
    # Not safetensors' own load_file: an interrupt in it is lost, and comes out as a ValueError.
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    return load(path.read_bytes()), metadata
