"""The machine a number was measured on, the block of its convolution kernel, work in parts that fit."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from groupify.errors import SpecError, near_names

# ONNX Runtime's MlasNchwcGetBlockSize: 8 by default on x86-64, 16 where it finds AVX-512F, and 16 in arm64
# builds that have the NEON kernels.
_BLOCKS = {"avx2": 8, "avx512": 16, "arm64": 16, "any": 16, "baseline": 8}
CPUS = ("avx2", "avx512", "arm64", "any", "auto")
KNOWN_CPUS = tuple(_BLOCKS)  # what "auto" may stand for


Item = TypeVar("Item")


@dataclass(frozen=True)
class Machine:
    """What a reader needs to judge a timing."""

    cpu: str
    simd: str  # "avx512" | "avx2" | "arm64" | "baseline"
    cores: int  # that this process may use
    system: str
    python: str
    torch: str
    onnxruntime: str | None
    onnx: str | None

    def __str__(self) -> str:
        cores = f"{self.cores} core" + ("s" if self.cores != 1 else "")
        versions = f"Python {self.python}, torch {self.torch}, onnxruntime {self.onnxruntime or 'missing'}"
        return f"{self.cpu} ({self.simd}, {cores}), {self.system}, {versions}"


def describe_machine() -> Machine:
    """Describe the machine at hand: CPU, vector unit, usable cores and versions."""
    return Machine(
        cpu=_cpu_name(),
        simd=_simd(),
        cores=_usable_cores(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=package_version("torch") or "missing",
        onnxruntime=package_version("onnxruntime"),
        onnx=package_version("onnx"),
    )


def find_cpu(cpu: str = "auto") -> str:
    """Return the processor that a name stands for: that of this machine for "auto", else the name itself.

    >>> find_cpu("avx2")
    'avx2'

    Raises:
        SpecError: the name is unknown.
    """
    if cpu == "auto":
        return _simd()
    if cpu not in _BLOCKS:
        raise SpecError(f"unknown CPU {cpu!r}: expected one of {', '.join(CPUS)}{near_names(cpu, CPUS)}")
    return cpu


def blocked_width(cpu: str = "auto") -> int:
    """Return the channels per block of ONNX Runtime's blocked convolution kernel.

    A grouped conv runs in that kernel, at the machine's peak, only where its input and output channels
    per group are multiples of this block; narrower groups are slower than fewer, wider ones.

    Args:
        cpu: "auto" (the CPU at hand), "avx512", "avx2", "arm64", or "any" (safe everywhere).

    Example:
        >>> blocked_width("avx2"), blocked_width("avx512")
        (8, 16)

    Raises:
        SpecError: the CPU is unknown.
    """
    return _BLOCKS[find_cpu(cpu)]


def int8_dot_products() -> bool:
    """Whether the CPU multiplies 8-bit numbers without overflow (VNNI on x86-64; any arm64)."""
    return _simd() == "arm64" or bool({"avx512vnni", "avxvnni"} & _cpu_flags())


def bfloat16_is_slow() -> bool:
    """Whether PyTorch computes in bfloat16 slower than in float32: on x86-64 without instructions for it.

    A training step of the demo's net takes 2.1 times as long on an Ice Lake core, which has AVX-512 alone.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and not {"avx512bf16", "amxbf16", "avxneconvert"} & _cpu_flags()


def package_version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # Linux has it
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """The names of the CPU's extensions, without underscores, which only Linux writes.

    Linux and macOS tell all of them; elsewhere, as on Windows, those that PyTorch looks for.
    """
    words = _cpuinfo("flags", "Features")
    if sys.platform == "darwin":
        words = _sysctl("machdep.cpu.leaf7_features")
    return frozenset(words.lower().replace("_", "").split()) or _flags_of_torch()


def _flags_of_torch() -> frozenset[str]:
    import torch

    questions = {
        "_is_avx2_supported": ("avx2",),
        "_is_avx512_supported": ("avx512f", "avx512bw"),
        "_is_avx512_bf16_supported": ("avx512bf16",),
        "_is_amx_tile_supported": ("amxbf16",),
        "_is_vnni_supported": ("avx512vnni",),
    }
    # No public names for this in the oldest torch that groupify runs with.
    return frozenset(
        flag for name, flags in questions.items() for flag in flags if getattr(torch.cpu, name, bool)()
    )


def _simd() -> str:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    flags = _cpu_flags()
    for name, flag in (("avx512", "avx512f"), ("avx2", "avx2")):
        if flag in flags:
            return name
    return "baseline"


def _cpu_name() -> str:
    name = _sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else _cpuinfo("model name")
    return name or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """Return the first value of one of the keys in Linux's table of CPUs; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), "")


def _sysctl(key: str) -> str:
    """Return a value of macOS's kernel; empty where it cannot be had."""
    try:
        result = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip()


def chunks(items: Iterable[Item], size_of: Callable[[Item], float], limit: float) -> Iterator[list[Item]]:
    """Cut a sequence into parts whose sizes add up to at most a limit; what is larger alone is a part alone.

    Args:
        items: what to cut, in its order.
        size_of: the size of one item.
        limit: the most that a part may have.
    """
    chunk: list[Item] = []
    used = 0.0
    for item in items:
        size = size_of(item)
        if chunk and used + size > limit:
            yield chunk
            chunk, used = [], 0.0
        chunk.append(item)
        used += size
    if chunk:
        yield chunk
