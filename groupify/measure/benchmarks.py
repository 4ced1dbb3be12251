"""How fast ONNX files run in ONNX Runtime and modules in PyTorch, timed against each other."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from groupify.errors import GroupifyError
from groupify.graph.call import Call, one_example
from groupify.onnx.feeds import random_feed
from groupify.onnx.providers import CPU
from groupify.onnx.runtime import open_session, run_feed, session_feed

SECONDS = 4.0
QUICK_SECONDS = 1.0
SESSIONS = 3
_BURST_SECONDS = 0.03
_MIN_ROUNDS = 5
_MAX_BURST = 50
# The percentile of runs that is taken where nothing is timed beside them: on a busy machine more than half
# of them may have been interrupted.
UNDISTURBED = 25


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one callable, in milliseconds."""

    runs_ms: tuple[float, ...]
    rounds_ms: tuple[float, ...]  # the median of each round; round k of two callables ran side by side

    @property
    def median_ms(self) -> float:
        """The median over all runs."""
        return statistics.median(self.runs_ms)

    @property
    def p10_ms(self) -> float:
        """The time that one run in ten stays under."""
        return percentile(self.runs_ms, 10)

    @property
    def p90_ms(self) -> float:
        """The time that nine runs in ten stay under."""
        return percentile(self.runs_ms, 90)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile by linear interpolation; ``values`` must not be empty."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def time_interleaved(callables: Mapping[str, Callable[[], object]], *, seconds: float) -> dict[str, Timing]:
    """Time callables in turns, so that a change of the machine's speed hits all of them alike.

    Each round gives every callable one unmeasured call, which refills the caches that the others emptied,
    and then a short burst of measured ones. The order of the callables turns from round to round.

    Args:
        callables: what to time, by name.
        seconds: about how long to measure in all; at least five rounds are run whatever it takes.
    """
    bursts = {name: _burst_length(function) for name, function in callables.items()}
    runs: dict[str, list[float]] = {name: [] for name in callables}
    rounds: dict[str, list[float]] = {name: [] for name in callables}
    names = list(callables)
    deadline = time.perf_counter() + seconds
    turn = 0
    while turn < _MIN_ROUNDS or time.perf_counter() < deadline:
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            function = callables[name]
            function()
            burst = [_run_ms(function) for _ in range(bursts[name])]
            runs[name].extend(burst)
            rounds[name].append(statistics.median(burst))
        turn += 1
    return {name: Timing(tuple(runs[name]), tuple(rounds[name])) for name in names}


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """Return how many times longer ``numerator`` takes: the median of the ratios round by round."""
    pairs = zip(numerator.rounds_ms, denominator.rounds_ms, strict=True)
    return statistics.median(long / short for long, short in pairs)


def median_range(values: Sequence[float]) -> tuple[float, float]:
    """Return an interval that holds the median of more such values with 95%, whatever their distribution.

    Its ends are two of the values, by the binomial distribution of how many lie below the median; of less
    than six values they are the least and the greatest, which hold it with less.
    """
    ordered, place = sorted(values), 0
    below = 0.5 ** len(ordered)
    while True:
        below += math.comb(len(ordered), place + 1) * 0.5 ** len(ordered)
        if below > 0.025 or 2 * place + 3 > len(ordered):
            return ordered[place], ordered[-1 - place]
        place += 1


def _burst_length(function: Callable[[], object]) -> int:
    function()
    estimate = min(_run_ms(function) for _ in range(2))
    return max(1, min(_MAX_BURST, round(_BURST_SECONDS * 1000 / max(estimate, 1e-3))))


def _run_ms(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one model at one number of threads and one batch size."""

    model: str
    threads: int
    batch_size: int
    timing: Timing

    @property
    def median_ms(self) -> float:
        """The median, in milliseconds per batch."""
        return self.timing.median_ms

    @property
    def p10_ms(self) -> float:
        """The 10th percentile, in milliseconds per batch."""
        return self.timing.p10_ms

    @property
    def p90_ms(self) -> float:
        """The 90th percentile, in milliseconds per batch."""
        return self.timing.p90_ms

    @property
    def throughput(self) -> float:
        """Images per second at the median."""
        return self.batch_size * 1000 / self.median_ms


def speed_up(dense: Latency, grouped: Latency) -> float:
    """Return how many times faster ``grouped`` is, from the rounds in which both ran side by side.

    Divided by the MAC ratio this is the efficiency of the conversion.

    Raises:
        GroupifyError: the two were not timed at the same threads and batch size.
    """
    if (dense.threads, dense.batch_size) != (grouped.threads, grouped.batch_size):
        raise GroupifyError(
            f"cannot compare {dense.threads} threads, batch {dense.batch_size} with "
            f"{grouped.threads} threads, batch {grouped.batch_size}: compare rows of one setting"
        )
    return paired_ratio(dense.timing, grouped.timing)


def speed_up_range(dense: Latency, grouped: Latency) -> tuple[float, float]:
    """Return between what the median speed-up of more rounds lies, with 95%; see :func:`median_range`."""
    pairs = zip(dense.timing.rounds_ms, grouped.timing.rounds_ms, strict=True)
    return median_range([long / short for long, short in pairs])


def speed_ups(
    models: Mapping[str, Path],
    reference: str,
    *,
    input_shape: tuple[int, ...],
    threads: int = 1,
    sessions: int = SESSIONS,
    seconds: float = QUICK_SECONDS,
    progress: bool = False,
) -> dict[str, float]:
    """Return how many times faster each file runs than one of them, batch 1; the median over sessions.

    Where a session's weights come to lie in memory changes the time of a small model, so that a single
    session misjudges it.

    Args:
        models: files by name.
        reference: name of the one to compare with.
        input_shape: shape of one input, without the batch dimension.
        threads: intra-op threads.
        sessions: how often all files are opened anew and timed.
        seconds: measuring time of each, for all models together.
        progress: show a bar on standard error.

    Raises:
        GroupifyError: ONNX Runtime cannot run a file.
    """
    found: dict[str, list[float]] = {name: [] for name in models if name != reference}
    for _ in range(sessions):
        rows = benchmark_onnx(
            models, input_shape=input_shape, threads=(threads,), seconds=seconds, progress=progress
        )
        named = {row.model: row for row in rows}
        for name, ratios in found.items():
            ratios.append(speed_up(named[reference], named[name]))
    return {name: statistics.median(ratios) for name, ratios in found.items()}


def benchmark_onnx(
    models: Mapping[str, Path],
    *,
    input_shape: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    threads: Sequence[int] = (1,),
    batch_sizes: Sequence[int] = (1,),
    seconds: float = SECONDS,
    provider: str = CPU,
    seed: int = 0,
    progress: bool = False,
) -> list[Latency]:
    """Time ONNX files in ONNX Runtime, interleaved in one run.

    Args:
        models: files by name.
        input_shape: shape of one input, without the batch dimension; None = as each file says.
        example_inputs: in its place, what the models are called with; see ``export``.
        threads: numbers of intra-op threads to try.
        batch_sizes: batch sizes to try.
        seconds: measuring time per setting, for all models together (at least five rounds).
        provider: short name of the execution provider, see ``onnx.providers``.
        seed: of the random inputs.
        progress: show a bar on standard error.

    Returns:
        One row per setting and model, settings in the order given.

    Raises:
        SpecError: the installed ONNX Runtime has no such provider.
        GroupifyError: a setting is below 1, or ONNX Runtime cannot run a file.
    """

    call = None
    if example_inputs is not None:
        call = one_example(input_shape, example_inputs)

    def prepare(size: int, count: int) -> dict[str, Callable[[], object]]:
        runs = {}
        for name, path in models.items():
            session = open_session(path, threads=count, provider=provider)
            if isinstance(call, Call):
                feed: Mapping[str, Any] = session_feed(session, path, call.of_size(size))
            else:
                feed = random_feed(session, str(path), size, input_shape, seed=seed)
            runs[name] = _onnx_call(session, path, feed)
        return runs

    return _benchmark(models, prepare, threads, batch_sizes, seconds, progress)


def benchmark_pytorch(
    models: Mapping[str, nn.Module],
    *,
    input_shape: tuple[int, ...],
    threads: Sequence[int] = (1,),
    batch_sizes: Sequence[int] = (1,),
    training: bool = False,
    seconds: float = SECONDS,
    seed: int = 0,
    progress: bool = False,
) -> list[Latency]:
    """Time modules in PyTorch eager on the CPU, interleaved in one run; they are left untouched.

    With ``training`` a call is a forward and a backward pass in training mode (of the sum of the outputs'
    squares), otherwise a forward pass in evaluation mode without gradients. For the other arguments, the
    result and the errors see :func:`benchmark_onnx`.
    """
    copies = {name: copy.deepcopy(model).cpu().train(training) for name, model in models.items()}
    before = torch.get_num_threads()

    def prepare(size: int, count: int) -> dict[str, Callable[[], object]]:
        torch.set_num_threads(count)
        batch = torch.randn(size, *input_shape, generator=torch.Generator().manual_seed(seed))
        call = _training_step if training else _forward
        return {name: call(model, batch) for name, model in copies.items()}

    try:
        return _benchmark(models, prepare, threads, batch_sizes, seconds, progress)
    finally:
        torch.set_num_threads(before)


def check_settings(threads: Sequence[int], batch_sizes: Sequence[int]) -> None:
    """Refuse lists of settings that cannot be timed.

    Raises:
        GroupifyError: a list is empty, or a number is below 1.
    """
    for what, values in (("threads", threads), ("batch sizes", batch_sizes)):
        if not values or min(values) < 1:
            raise GroupifyError(f"{what} {tuple(values)}: expected one or more numbers, each at least 1")


def _benchmark(
    models: Mapping[str, object],
    prepare: Callable[[int, int], dict[str, Callable[[], object]]],
    threads: Sequence[int],
    batch_sizes: Sequence[int],
    seconds: float,
    progress: bool,
) -> list[Latency]:
    if not models:
        raise GroupifyError("no model to time: give at least one")
    check_settings(threads, batch_sizes)
    rows: list[Latency] = []
    settings = [(count, size) for count in threads for size in batch_sizes]
    for count, size in tqdm(settings, desc="timing", disable=None if progress else True, leave=False):
        timings = time_interleaved(prepare(size, count), seconds=seconds)
        rows.extend(Latency(name, count, size, timing) for name, timing in timings.items())
    return rows


def _onnx_call(session: Any, path: Path, feed: Mapping[str, Any]) -> Callable[[], object]:
    run_feed(session, path, feed)  # so that what does not run is said once, in a line
    return lambda: session.run(None, feed)


def _forward(model: nn.Module, batch: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return model(batch)

    return call


def _training_step(model: nn.Module, batch: Tensor) -> Callable[[], object]:
    def call() -> object:
        model.zero_grad(set_to_none=True)
        outputs = model(batch)
        if isinstance(outputs, Mapping):
            outputs = tuple(outputs.values())
        elif isinstance(outputs, Tensor):
            outputs = (outputs,)
        loss = torch.stack([output.square().sum() for output in outputs]).sum()
        torch.autograd.backward(loss)
        return loss

    return call
