"""Measured latencies: of every conv a model has or could get, and of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from groupify.documents import Document, Text
from groupify.errors import ArtefactError, PlanError
from groupify.files import cache_folder, fingerprint
from groupify.graph.plain_layers import Conv, conv_of
from groupify.machine import describe_machine
from groupify.measure.conv_timing import TimedConv, time_convs
from groupify.measure.kernel_overhead import Alone, Replaced, find_overhead
from groupify.measure.profiling import Milliseconds, NetworkTime, mean_time, time_network
from groupify.measure.timed_files import DenseFiles, share_of_dense
from groupify.stats.positions import padding_amounts
from groupify.structures import FLOAT32, INT8, Candidate, Choices, Observed, Plan, Precision

Times = Annotated[Mapping[str, Milliseconds], Field(max_length=100_000)]
Row = Sequence[TimedConv | None]  # what one conv may become; None where it never runs or has no choice


@dataclass(frozen=True)
class LatencyTable(Document):
    """Milliseconds for one image, in each precision that was asked for.

    Attributes:
        machine: where it was measured.
        threads: intra-op threads of ONNX Runtime.
        convs: shape of a conv, what replaces it and its precision → time with its activation.
        networks: fingerprint of a dense network and its precision → time of all of it, of each of its convs
            in it, and what single times exceed those in it by.
    """

    what: ClassVar[str] = "latency table"
    remedy: ClassVar[str] = "make one with groupify bench MODEL --table FILE"

    format: Literal["groupify latency table"] = field(default="groupify latency table", kw_only=True)
    schema_version: Literal[6] = field(default=6, kw_only=True)
    machine: Text
    threads: Annotated[int, Field(ge=1, le=65_536)] = 1
    convs: Times = field(default_factory=dict)
    networks: Mapping[str, NetworkTime] = field(default_factory=dict)


@dataclass(frozen=True)
class Latencies:
    """What a table says of one model.

    Attributes:
        rest_ms: what no plan changes.
        convs_ms: each candidate of each conv, the dense one first, over all its calls.
        dense_float32_ms: the whole dense model in float32, whatever the precision of the rest.
    """

    rest_ms: float
    convs_ms: tuple[tuple[float, ...], ...]
    dense_float32_ms: float

    @property
    def dense_ms(self) -> float:
        """The whole dense model, in the precision of the plan."""
        return self.total((0,) * len(self.convs_ms))

    def total(self, chosen: Sequence[int]) -> float:
        """Return the predicted latency of a plan, milliseconds for one image."""
        return self.rest_ms + sum(times[index] for times, index in zip(self.convs_ms, chosen, strict=True))


def timed_conv(candidate: Candidate, conv: Conv, run: Observed, precision: Precision) -> TimedConv:
    """Return what decides the latency of a candidate."""
    amounts = padding_amounts(conv)[::-1]  # behind and in front, the first dimension first
    site = candidate.site
    return TimedConv(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        dilation=tuple(conv.dilation),
        padding=(*amounts[1::2], *amounts[::2]),
        input_size=run.input_size,
        groups=site.groups_before,
        structure=site.structure,
        shuffle=site.shuffle,
        precision=precision,
    )


class Stopwatch:
    """Times the convs of a model and the whole of it in ONNX Runtime on this machine.

    Args:
        model: the dense model; latency does not depend on its weights.
        input_shape: (C, H, W) of one image.
        threads: intra-op threads.
        progress: show a bar on stderr.
    """

    def __init__(
        self, model: nn.Module, input_shape: tuple[int, ...], *, threads: int = 1, progress: bool = False
    ) -> None:
        self._model, self._shape = model, input_shape
        self._threads, self._progress = threads, progress
        self._dense = DenseFiles(model, input_shape)

    def convs(self, shapes: Sequence[TimedConv]) -> Iterator[Mapping[TimedConv, float]]:
        """Give the milliseconds of convs, some at a time."""
        return time_convs(shapes, threads=self._threads, progress=self._progress)

    def network(self, sites: Sequence[str], precision: Precision) -> NetworkTime:
        """Return how long the dense model runs, and its sites in it."""
        return time_network(self._dense[precision], sites, threads=self._threads, input_shape=self._shape)

    def share(self, plan: Plan) -> float:
        """Return the latency of the model with a plan ÷ that of the dense one."""
        return share_of_dense(self._model, self._dense[plan.precision], plan, threads=self._threads)


def measure_table(
    model: nn.Module, choices: Choices, known: LatencyTable | None = None, *, threads: int = 1,
    progress: bool = False, stopwatch: Stopwatch | None = None,
    keep: Callable[[LatencyTable], None] = lambda _: None,
) -> LatencyTable:  # fmt: skip
    """Time all that a table lacks of a model: its convs, their candidates, and the whole of it.

    The dense model is timed in float32 as well, whatever the precision of the plan.

    Args:
        model: the dense model.
        choices: what may become of each conv, and the precision.
        known: an earlier table of this machine.
        threads: intra-op threads.
        progress: show a bar on stderr.
        stopwatch: what takes the times; None = ONNX Runtime on this machine.
        keep: is given the table so far, again and again: an interrupted measurement goes on from there.
    """
    if stopwatch is None:
        stopwatch = Stopwatch(model, choices.input_shape, threads=threads, progress=progress)
    table = LatencyTable(str(describe_machine()), threads) if known is None else known
    rows = _shapes(model, choices)
    shapes = [shape for row in rows for shape in row if shape is not None]
    precisions = dict.fromkeys((choices.precision, FLOAT32))
    names = {precision: network_fingerprint(model, choices, precision) for precision in precisions}
    missing = [shape for shape in shapes if str(shape) not in table.convs]
    if missing or not all(name in table.networks for name in names.values()):
        sites = [options[0].site.name for options, row in zip(choices.sites, rows, strict=True) if row[0]]
        # In front and behind: the convs take minutes, in which the speed of a machine may change.
        before = {precision: stopwatch.network(sites, precision) for precision in names}
        for times in stopwatch.convs(missing) if missing else ():
            table = replace(table, convs={**table.convs, **_by_text(times)})
            keep(table)
        networks = {
            name: mean_time(before[precision], stopwatch.network(sites, precision))
            for precision, name in names.items()
        }
        planned = names[choices.precision]
        overhead = _overhead(networks[planned], table, choices, rows, stopwatch)
        networks[planned] = replace(networks[planned], overhead_ms=overhead)
        table = replace(table, networks={**table.networks, **networks})
        keep(table)
    return table


def _overhead(
    network: NetworkTime, table: LatencyTable, choices: Choices, rows: Sequence[Row], stopwatch: Stopwatch
) -> float:
    """Time the network of which every conv has the fewest MACs; return what that says of single times."""
    thin = tuple(
        min(range(len(options)), key=lambda index: options[index].site.macs.grouped)
        for options in choices.sites
    )
    convs = [
        replaced[index]
        for replaced, index in zip(_replaced(network, table, choices, rows), thin, strict=True)
        if index
    ]
    if not convs:
        return 0.0
    saved = (1 - stopwatch.share(choices.plan(thin))) * network.total_ms
    return find_overhead(convs, sum(conv.inside_ms for conv in convs) - saved)


def _by_text(times: Mapping[TimedConv, float]) -> dict[str, float]:
    return {str(shape): time for shape, time in times.items()}


def cached_table(
    model: nn.Module,
    choices: Choices,
    *,
    threads: int = 1,
    cache: Path | None = None,
    progress: bool = False,
    stopwatch: Stopwatch | None = None,
) -> LatencyTable:
    """Return a table of this machine that knows all of a model; what is missing is measured and kept.

    The file in the cache folder is that of the machine, of the ONNX Runtime and of the number of threads.
    """
    path = _cached(threads, cache)
    return measure_table(
        model, choices, _known(path), threads=threads, progress=progress, stopwatch=stopwatch,
        keep=lambda table: table.write(path),
    )  # fmt: skip


def count_missing(model: nn.Module, choices: Choices, *, threads: int = 1, cache: Path | None = None) -> int:
    """Return how many convs and candidates of a model the cached table of this machine lacks."""
    known = _known(_cached(threads, cache))
    shapes = {str(shape) for row in _shapes(model, choices) for shape in row if shape is not None}
    return len(shapes - (set() if known is None else known.convs.keys()))


def _cached(threads: int, cache: Path | None) -> Path:
    return (cache_folder() if cache is None else cache) / f"latency-{machine_fingerprint(threads)}.json"


def _known(path: Path) -> LatencyTable | None:
    """Return the table in a file; None where there is none, or a damaged one: it can be measured again."""
    try:
        return LatencyTable.read(path)
    except ArtefactError:
        return None


def machine_fingerprint(threads: int) -> str:
    """Return a hash of what a latency depends on besides the model: processor, ONNX Runtime, threads."""
    machine = describe_machine()
    return fingerprint((machine.cpu, machine.simd, machine.system, str(machine.onnxruntime), str(threads)))


def look_up(table: LatencyTable, model: nn.Module, choices: Choices) -> Latencies:
    """Find the convs and candidates of a model in a table.

    Args:
        table: what was measured.
        model: the dense model.
        choices: what may become of each conv.

    Raises:
        PlanError: the table was made for another model, or for other options.
    """
    names = [network_fingerprint(model, choices, precision) for precision in (choices.precision, FLOAT32)]
    if not all(name in table.networks for name in names):
        raise PlanError(
            f"the latency table (of {table.machine}) does not know this model in {choices.precision}: "
            "make it with groupify bench MODEL --table FILE on that machine, with the same --model-args, "
            "--input-size and --precision"
        )
    network, dense_float32 = (table.networks[name] for name in names)
    replaced = _replaced(network, table, choices, _shapes(model, choices))
    convs = tuple(tuple(conv.predicted_ms(network.overhead_ms) for conv in options) for options in replaced)
    rest = network.total_ms - sum(options[0].inside_ms for options in replaced)
    return Latencies(max(0.0, rest), convs, dense_float32.total_ms)


def _replaced(
    network: NetworkTime, table: LatencyTable, choices: Choices, rows: Sequence[Row]
) -> list[list[Replaced]]:
    """Each candidate of each conv beside the conv itself; what never runs or has no choice takes no time."""
    found = []
    for options, shapes in zip(choices.sites, rows, strict=True):
        alone = [Alone(0.0, 1) if s is None else Alone(_find(table, s), s.kernels) for s in shapes]
        site = options[0].site.name
        calls = 0 if shapes[0] is None else choices.observed[site].calls
        inside = network.convs_ms.get(site, calls * alone[0].without(network.overhead_ms))
        found.append([Replaced(inside, alone[0], one) for one in alone])
    return found


def _find(table: LatencyTable, shape: TimedConv) -> float:
    if str(shape) not in table.convs:
        raise PlanError(
            f"the latency table (of {table.machine}) has no conv {str(shape)!r}: make it with the "
            "options of this plan, groupify bench MODEL --table FILE, on that machine"
        )
    return table.convs[str(shape)]


def _shapes(model: nn.Module, choices: Choices) -> list[Row]:
    """The shape of each candidate of each conv; None where the conv never runs or has no choice."""
    rows: list[Row] = []
    for options in choices.sites:
        run = choices.observed.get(options[0].site.name)
        conv = conv_of(model, options[0].site.name)
        if run is None or len(options) == 1:
            rows.append([None] * len(options))
        else:
            rows.append([timed_conv(option, conv, run, choices.precision) for option in options])
    return rows


# How files of a precision are made, where that has changed: older times of them are void.
_MADE: Mapping[str, tuple[str, ...]] = {INT8: ("images in blocks of pixels",)}


def network_fingerprint(model: nn.Module, choices: Choices, precision: Precision) -> str:
    """A fingerprint of what decides the latency of a dense model: its convs, parameters and precision."""
    convs = [options[0].site for options in choices.sites]
    shapes = [
        (c.name, c.in_channels, c.out_channels, c.kernel_size, c.stride, c.output_size, c.groups_before)
        for c in convs
    ]
    params = sum(parameter.numel() for parameter in model.parameters())
    made = _MADE.get(precision, ())
    return fingerprint((repr(shapes), repr(choices.input_shape), str(params), precision, *made))
