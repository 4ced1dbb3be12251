"""Peak resident memory of a fresh process that runs one ONNX file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from groupify.errors import GroupifyError

# The child imports neither torch nor groupify. On Linux it reads VmHWM, since ru_maxrss survives exec and
# would show the memory of the parent. Windows has its own counters (PROCESS_MEMORY_COUNTERS).
_CHILD = """
import json, sys
import numpy, onnxruntime
def peak_on_windows():
    import ctypes
    from ctypes import wintypes
    sizes = ("PeakWorkingSetSize", "WorkingSetSize", "a", "b", "c", "d", "PagefileUsage", "PeakPagefileUsage")
    class Counters(ctypes.Structure):
        _fields_ = [("cb", wintypes.DWORD), ("PageFaultCount", wintypes.DWORD)]
        _fields_ += [(size, ctypes.c_size_t) for size in sizes]
    counters = Counters(cb=ctypes.sizeof(Counters))
    kernel = ctypes.WinDLL("kernel32")
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    read = kernel.K32GetProcessMemoryInfo
    read.argtypes = (wintypes.HANDLE, ctypes.POINTER(Counters), wintypes.DWORD)
    if not read(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        raise OSError("GetProcessMemoryInfo failed")
    return counters.PeakWorkingSetSize
def peak():
    if sys.platform == "win32":
        return peak_on_windows()
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        import resource
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024
path, shape, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
options.inter_op_num_threads = 1
options.log_severity_level = 3
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
inputs = {session.get_inputs()[0].name: numpy.zeros(shape, dtype=numpy.float32)}
for _ in range(3):
    session.run(None, inputs)
print(json.dumps({"before": before, "peak": peak()}))
"""


@dataclass(frozen=True)
class PeakMemory:
    """Resident memory of a process that only loads ONNX Runtime and runs one model, in bytes."""

    peak_bytes: int
    baseline_bytes: int  # the same process before it opened the model


def peak_memory(
    path: Path | str, *, input_shape: tuple[int, ...], batch_size: int = 1, threads: int = 1
) -> PeakMemory:
    """Measure the peak resident memory of a fresh process that runs an ONNX file three times.

    Args:
        path: the ONNX file.
        input_shape: shape of one input, without the batch dimension.
        batch_size: inputs per run.
        threads: intra-op threads.

    Raises:
        GroupifyError: the process fails.
    """
    shape = json.dumps([batch_size, *input_shape])
    command = [sys.executable, "-c", _CHILD, str(path), shape, str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise GroupifyError(f"cannot run {str(path)!r} on input {shape} to measure its memory: {reason}")
    sizes = json.loads(result.stdout)
    return PeakMemory(peak_bytes=sizes["peak"], baseline_bytes=sizes["before"])
