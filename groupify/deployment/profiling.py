"""Where the time of one ONNX file goes, operator by operator."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from groupify.deployment.runtime import open_session

_KERNEL = "_kernel_time"


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
        runs: how often to run it; the first two, which warm up, weigh nothing in the median.
        seed: of the random inputs.

    Raises:
        GroupifyError: ONNX Runtime is missing or refuses the file.
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
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(batch_size, *input_shape, generator=generator).numpy()
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, threads=threads, profile_prefix=Path(folder) / "profile")
        feed = {session.get_inputs()[0].name: batch}
        for _ in range(runs + 2):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            name = event["name"].removesuffix(_KERNEL)
            times[event["args"]["op_name"], name].append(event["dur"] / 1000)
    return {node: statistics.median(durations) for node, durations in times.items()}
