from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groupify import memory
from groupify.errors import SpecError
from groupify.memory import default_limit, free_bytes, parse_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2 << 30), ("1.5MB", 1_500_000), (".5 KiB", 512), ("3B", 3), (" 1TiB ", 1 << 40)],
)
def test_amounts_of_memory_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "2", "GiB", "-1GiB", "2 gib", "1e3B", "2GiB more"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"is no amount of memory: expected .* like 2GiB"):
        parse_bytes(text)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the kernel of Linux says")
def test_free_memory_is_what_the_kernel_says() -> None:
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 0 < free_bytes(CPU) <= total
    assert default_limit(CPU) < total


_VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                1000.
Pages active:                            200000.
Pages inactive:                             500.
Pages speculative:                           24.
"""


def test_free_memory_of_a_mac_is_what_vm_stat_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(sys, "platform", "darwin")
    told = subprocess.CompletedProcess(["vm_stat"], 0, stdout=_VM_STAT)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: told)
    assert free_bytes(CPU) == 1524 * 16384


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_a_system_that_does_not_tell_counts_as_small(
    platform: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no such program")

    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(subprocess, "run", fail)
    if sys.platform == "win32" and hasattr(ctypes, "windll"):
        monkeypatch.delattr(ctypes, "windll")
    assert free_bytes(CPU) == 4 * 2**30


def test_a_container_with_less_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_bytes(CPU) == 2000
    assert default_limit(CPU) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 2000
