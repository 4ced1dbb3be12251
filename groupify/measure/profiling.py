"""Where the time of one ONNX file goes, operator by operator."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groupify.onnx.runtime import open_session

_KERNEL = "_kernel_time"
_WARM_UP = 2


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one kind in ONNX Runtime's optimised graph."""

    operator: str
    nodes: int
    milliseconds: float  # per run: the sum of the nodes' medians


def profile_onnx(
    path: Path | str,
    *,
    input_shape: tuple[int, ...],
    threads: int = 1,
    batch_size: int = 1,
    runs: int = 20,
    seed: int = 0,
) -> tuple[OperatorTime, ...]:
    """Run ONNX Runtime's profiler and add up its kernel times by operator, longest first.

    Args:
        path: the ONNX file.
        input_shape: shape of one input, without the batch dimension.
        threads: intra-op threads.
        batch_size: inputs per run.
        runs: how often to run it, behind two runs that warm up.
        seed: of the random inputs.

    Raises:
        GroupifyError: ONNX Runtime refuses the file.
    """
    operators: dict[str, list[float]] = defaultdict(list)
    for (operator, _), milliseconds in node_times(path, input_shape, threads, batch_size, runs, seed).items():
        operators[operator].append(milliseconds)
    totals = [OperatorTime(name, len(nodes), sum(nodes)) for name, nodes in operators.items()]
    return tuple(sorted(totals, key=lambda total: total.milliseconds, reverse=True))


def node_times(
    path: Path | str, input_shape: tuple[int, ...], threads: int, batch_size: int, runs: int, seed: int
) -> dict[tuple[str, str], float]:
    """Return the median kernel time of each node of the optimised graph, by operator and name, in ms.

    Args and errors are those of ``profile_onnx``.
    """
    times = kernel_times(path, threads, runs, input_shape=(batch_size, *input_shape), seed=seed)
    return {node: statistics.median(durations) for node, durations in times.items()}


def kernel_times(
    model: Path | str | bytes,
    threads: int,
    runs: int,
    *,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
    save_optimised: Path | None = None,
) -> dict[tuple[str, str], list[float]]:
    """Return the milliseconds of each kernel in each run behind two that warm up, by operator and name.

    Args:
        model: an ONNX file, or a serialised model.
        threads: intra-op threads.
        runs: how many to return.
        input_shape: of the one input, batch dimension included; None = as the file gives it.
        seed: of the random inputs.
        save_optimised: where to write the graph that ONNX Runtime really runs.

    Raises:
        GroupifyError: ONNX Runtime refuses the model.
    """
    generator = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="groupify-") as folder:
        session = open_session(
            model, threads=threads, save_optimised=save_optimised, profile_prefix=Path(folder, "profile")
        )
        feed = {
            source.name: generator.standard_normal(input_shape or source.shape, dtype=np.float32)
            for source in session.get_inputs()
        }
        for _ in range(_WARM_UP + runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            name = event["name"].removesuffix(_KERNEL)
            times[event["args"]["op_name"], name].append(event["dur"] / 1000)
    return {kernel: durations[-runs:] for kernel, durations in times.items()}
