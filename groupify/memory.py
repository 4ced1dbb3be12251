"""How much memory is free, and amounts of it as people write them."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from groupify.errors import SpecError

BYTE_UNITS = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+) ?([A-Za-z]+)", re.ASCII)
_CGROUPS = Path("/sys/fs/cgroup")
_SHARE = 0.5
_UNKNOWN = 4 * 2**30  # what a system that does not tell is taken to have free


def parse_bytes(text: str) -> int:
    """Return the number of bytes that a text like ``"2GiB"`` means.

    >>> parse_bytes("2GiB"), parse_bytes("1.5 MB")
    (2147483648, 1500000)

    Raises:
        SpecError: it is none of these.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or match[2] not in BYTE_UNITS:
        raise SpecError(
            f"{text!r} is no amount of memory: expected a number and a unit, like 2GiB; "
            f"units are {', '.join(BYTE_UNITS)}"
        )
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def show_bytes(count: float) -> str:
    """Return a number of bytes for people.

    >>> show_bytes(700), show_bytes(3 * 2**20), show_bytes(1.24 * 2**30)
    ('700 B', '3.0 MiB', '1.2 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def default_limit(device: torch.device) -> int:
    """Return half of the memory that is free where a device has its tensors, in bytes."""
    return int(_SHARE * free_bytes(device))


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free where a device has its tensors, in bytes.

    Where the system's own limit for this process (a container's) is less, that counts.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    try:
        system = _of_system()
    except (OSError, AttributeError, IndexError, StopIteration, subprocess.SubprocessError):
        system = _UNKNOWN
    return min([system, *_of_cgroups()])


def _of_system() -> int:
    if sys.platform == "win32":
        return _on_windows()
    if sys.platform == "darwin":
        return _on_macos()
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _of_cgroups() -> Iterator[int]:
    """What the groups that the process is in have left, of either version."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = ((_CGROUPS / name).read_text("ascii").strip() for name in (limit, used))
        except OSError:
            continue
        if most != "max":
            yield max(0, int(most) - int(now))


def _on_windows() -> int:
    """GlobalMemoryStatusEx, whose fourth field is the physical memory that is available."""
    fields = ("total", "free", "a", "b", "c", "d", "e")

    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in fields),
        ]

    status = Status(length=ctypes.sizeof(Status))
    library: object = getattr(ctypes, "windll").kernel32  # noqa: B009 (there on Windows alone)
    if not library.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        raise OSError("GlobalMemoryStatusEx failed")
    return int(status.free)


def _on_macos() -> int:
    """``vm_stat``: free pages, and those that nobody has read for a while."""
    told = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
    size = int(re.findall(r"page size of (\d+) bytes", told)[0])
    pages = re.findall(r"^Pages (?:free|inactive|speculative): +(\d+)\.", told, re.MULTILINE)
    return size * sum(map(int, pages))
