"""Where the time of one ONNX file goes: operator by operator, and site by site of the network in it."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
from pydantic import Field

from groupify.measure.benchmarks import UNDISTURBED, benchmark_onnx, percentile
from groupify.onnx.runtime import open_session

_KERNEL = "_kernel_time"
_WARM_UP = 2
# What ONNX Runtime fuses into the conv in front.
_FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Add", "Sum", "Identity")
# What ONNX Runtime adds to the name of a conv that it moves to the blocked kernel, or to that of int8.
_RENAMED = re.compile(r"_nchwc$|_token_\d+$")
_SECONDS = 2.0

Milliseconds = Annotated[float, Field(ge=0, le=1e7)]


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
        times = _kernel_events(Path(session.end_profiling()))
    return {kernel: durations[-runs:] for kernel, durations in times.items()}


def _kernel_events(profile: Path) -> dict[tuple[str, str], list[float]]:
    """Read the milliseconds of each kernel from a profile, by operator and name."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(profile.read_text("utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            name = event["name"].removesuffix(_KERNEL)
            times[event["args"]["op_name"], name].append(event["dur"] / 1000)
    return times


@dataclass(frozen=True)
class NetworkTime:
    """How long a network runs; milliseconds for one image.

    Attributes:
        total_ms: all of it.
        convs_ms: its sites, as far as they can be told from the profile.
        overhead_ms: what each kernel takes longer alone, as a latency table times it, than in this network.
    """

    total_ms: Milliseconds
    convs_ms: Mapping[str, Milliseconds]
    overhead_ms: Milliseconds = 0.0


def time_network(
    path: Path,
    sites: Sequence[str],
    *,
    input_shape: tuple[int, ...],
    threads: int = 1,
    rounds: int = 24,
) -> NetworkTime:
    """Time a file that ``export_onnx`` wrote, as a whole and site by site, with one image per run.

    Args:
        path: the file.
        sites: qualified module names.
        input_shape: shape of one input, without the batch dimension.
        threads: intra-op threads.
        rounds: profiled runs.

    Raises:
        GroupifyError: ONNX Runtime refuses the file.
    """
    (whole,) = benchmark_onnx({"": path}, input_shape=input_shape, threads=(threads,), seconds=_SECONDS)
    total = percentile(whole.timing.runs_ms, UNDISTURBED)
    kernels = {
        kernel: percentile(durations, UNDISTURBED)
        for kernel, durations in kernel_times(path, threads, rounds, input_shape=(1, *input_shape)).items()
    }
    # Shares only: the speed of the machine may have changed in between, and the profiler takes time itself.
    share = total / sum(kernels.values())
    return NetworkTime(total, {site: share * time for site, time in _by_site(path, sites, kernels).items()})


def mean_time(one: NetworkTime, other: NetworkTime) -> NetworkTime:
    """Return the mean of two measurements of one network."""
    convs = {site: (time + other.convs_ms[site]) / 2 for site, time in one.convs_ms.items()}
    return NetworkTime((one.total_ms + other.total_ms) / 2, convs)


def site_times(
    path: Path,
    sites: Sequence[str],
    *,
    input_shape: tuple[int, ...],
    threads: int,
    batch_size: int,
    runs: int = 10,
) -> dict[str, float]:
    """Profile a file that ``export_onnx`` wrote; return milliseconds per batch by site.

    A site is a module of the exported model; the time of all its convs is added up, with the activation or
    sum that ONNX Runtime fused into them. A site that the profile does not name is left out.

    Args:
        path: the file.
        sites: qualified module names.
        input_shape: shape of one input, without the batch dimension.
        threads: intra-op threads.
        batch_size: inputs per run.
        runs: how often to run it.

    Raises:
        GroupifyError: ONNX Runtime refuses the file.
    """
    return _by_site(path, sites, node_times(path, input_shape, threads, batch_size, runs, seed=0))


def _by_site(path: Path, sites: Sequence[str], times: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Add up the times of kernels, by operator and name, by the site that they belong to."""
    graph = onnx.load(str(path), load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    nodes = {node.name: node for node in graph.node}
    timed = {_RENAMED.sub("", name) for _, name in times}
    found: dict[str, float] = {}
    for (operator, name), milliseconds in times.items():
        if "Conv" not in operator:
            continue
        # The blocked kernels are named after their output, the others after their node.
        own = _RENAMED.sub("", name).removeprefix("fused ")
        node = producers.get(own) or nodes.get(own)
        label = "" if node is None else _weight_behind(node, producers, timed)
        site = next((site for site in sites if label.startswith(f"{site}.")), None)
        if site is not None:
            found[site] = found.get(site, 0.0) + milliseconds
    return found


def _weight_behind(node: Any, producers: dict[str, Any], timed: set[str]) -> str:
    """Return the name of the weight of the conv that a fused output comes from; empty if there is none."""
    waiting, seen = [node], 0
    while waiting and seen < 16:
        node, seen = waiting.pop(), seen + 1
        if node.op_type == "Conv":
            return str(node.input[1])
        if node.op_type in _FUSED:
            # The other term of a sum is a value of its own, with a time of its own.
            waiting += [producers[name] for name in node.input if name in producers and name not in timed]
    return ""
