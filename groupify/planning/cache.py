"""Numbers that took long to measure, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from groupify.documents import is_finite, parse
from groupify.errors import ArtefactError
from groupify.files import write_aside


def cache_folder() -> Path:
    """Return ``$GROUPIFY_CACHE``, else ``groupify`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("GROUPIFY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "groupify")


class NumberCache:
    """Finite numbers by name in one JSON file, which is written whole with each change.

    A file that is missing or damaged counts as empty: everything in it can be measured again.

    Args:
        path: the file; None = nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.numbers: dict[str, float] = {}
        if path is None:
            return
        try:
            document = parse(path.read_text())
        except (OSError, UnicodeDecodeError, ArtefactError):
            return
        if isinstance(document, dict):
            self.numbers = {name: float(value) for name, value in document.items() if is_finite(value)}

    def add(self, numbers: Mapping[str, float]) -> None:
        """Keep some more numbers."""
        self.numbers |= numbers
        if self._path is not None:
            write_aside(self._path, json.dumps(self.numbers, indent=1) + "\n")


def fingerprint(texts: Iterable[str], tensors: Iterable[Tensor] = ()) -> str:
    """Return a hash of texts and of the values of tensors, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text};".encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]
