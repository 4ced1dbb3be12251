"""A file is written whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from groupify.files import write_aside


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_aside(tmp_path / "a" / "b.txt", "Größe\n")
    write_aside(tmp_path / "a" / "c.bin", b"\xff")
    assert (tmp_path / "a" / "b.txt").read_text("utf-8") == "Größe\n"
    assert (tmp_path / "a" / "c.bin").read_bytes() == b"\xff"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    write_aside(target, "earlier")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_aside(target, "later")
    assert target.read_text("utf-8") == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
