"""ONNX Runtime with the session settings that are used everywhere."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as runtime

from groupify.errors import GroupifyError

BLOCKED_DOMAIN = "com.microsoft.nchwc"
_ERRORS_ONLY = 3


def open_session(
    model: Path | str | bytes,
    *,
    threads: int = 1,
    optimise: bool = True,
    save_optimised: Path | None = None,
    profile_prefix: Path | None = None,
) -> Any:
    """Open an ``onnxruntime.InferenceSession`` on the CPU.

    Sequential execution and one inter-op thread. Worker threads may spin during a run, as in a default
    session, but stop when it ends: two sessions timed in turn would otherwise steal each other's cores.

    Args:
        model: an ONNX file, or a serialised model.
        threads: intra-op threads.
        optimise: all graph optimisations, or none at all.
        save_optimised: where to write the graph that ONNX Runtime really runs.
        profile_prefix: start the session's profiler; its file name begins with this.

    Raises:
        GroupifyError: ONNX Runtime refuses the model.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    level = runtime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if save_optimised is not None:
        options.optimized_model_filepath = str(save_optimised)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises bare pybind classes of its own
        name = "the model" if isinstance(model, bytes) else f"{str(model)!r}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GroupifyError(f"ONNX Runtime cannot open {name}: {reason}; export it again") from error


@dataclass(frozen=True)
class BlockedConvs:
    """How many of a model's convs ONNX Runtime runs in its blocked (NCHWc) kernel on this machine."""

    blocked: int
    total: int


def count_blocked_convs(path: Path | str) -> BlockedConvs:
    """Count the convs that ONNX Runtime moves to its blocked kernel, read from its optimised graph.

    Raises:
        GroupifyError: ONNX Runtime refuses the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        open_session(path, save_optimised=optimised)
        graph = onnx.load(str(optimised), load_external_data=False).graph
    convs = [node for node in graph.node if node.op_type in ("Conv", "FusedConv", "QLinearConv")]
    return BlockedConvs(sum(node.domain == BLOCKED_DOMAIN for node in convs), len(convs))
