"""An output file appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, then rename it; missing parents are made, nothing half-written stays.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
