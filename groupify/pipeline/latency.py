"""Time what was exported against the dense model, and say so where it did not pay."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from groupify.errors import GroupifyWarning
from groupify.measure.benchmarks import QUICK_SECONDS, benchmark_onnx, speed_up
from groupify.measure.site_times import site_times
from groupify.onnx.exporting import ExportedModel, export_onnx
from groupify.pipeline.int8 import int8_notes, int8_path
from groupify.pipeline.requests import OutputRequest
from groupify.reporting.results import Int8File, LatencyChange
from groupify.structures import Change

# 90th over 10th percentile of the times; above it, something else kept the processor busy.
_STEADY = 2.0


@dataclass(frozen=True)
class Timed:
    """Latencies from one interleaved run.

    Attributes:
        latency: dense against grouped.
        dense_file: the dense model's export, gone by now.
        int8: as given, with its latency.
        site_milliseconds: each conv's share in a profiled run, dense and grouped.
        other_milliseconds: of the other files.
    """

    latency: LatencyChange
    dense_file: ExportedModel
    int8: Int8File | None
    site_milliseconds: Mapping[str, Change[float]] = field(default_factory=dict)
    other_milliseconds: Mapping[Path, float] = field(default_factory=dict)


def time_against_dense(
    dense: nn.Module,
    grouped: ExportedModel,
    int8: Int8File | None,
    input_shape: tuple[int, ...],
    request: OutputRequest,
    sites: Sequence[str] = (),
    others: Collection[Path] = (),
    *,
    progress: bool,
) -> Timed:
    """Export the dense model aside and time all files in ONNX Runtime, interleaved; then profile the sites.

    Args:
        dense: the dense model.
        grouped: the converted model's file.
        int8: what is known of the int8 file beside it; None where there is none.
        input_shape: (C, H, W) of one image.
        request: threads and batch size.
        sites: names of the convs to profile, dense and grouped.
        others: more files to time in the same run.
        progress: show a bar on stderr.
    """
    batch, threads = request.static_batch or 1, request.threads
    with tempfile.TemporaryDirectory(prefix="groupify-") as aside:
        dense_file = export_onnx(
            dense, Path(aside) / "dense.onnx", input_shape=input_shape, static_batch=request.static_batch
        )
        files = {"dense": dense_file.path, "grouped": grouped.path}
        if int8 is not None:
            files["int8"] = int8_path(grouped.path)
        files |= {str(path): path for path in others}
        rows = benchmark_onnx(
            files,
            input_shape=input_shape,
            threads=(threads,),
            batch_sizes=(batch,),
            seconds=QUICK_SECONDS * len(files) / 2,
            progress=progress,
        )
        profiles = [
            site_times(path, sites, input_shape=input_shape, threads=threads, batch_size=batch)
            for path in (dense_file.path, grouped.path)
        ]
    profile = {
        name: Change(profiles[0][name], profiles[1][name])
        for name in sites
        if all(name in p for p in profiles)
    }
    by_name = {row.model: row for row in rows}
    first, second = by_name["dense"], by_name["grouped"]
    steady = all(row.p90_ms < _STEADY * row.p10_ms for row in rows)
    times = Change(first.median_ms, second.median_ms)
    if int8 is not None:
        third = by_name["int8"]
        int8 = dataclasses.replace(
            int8,
            milliseconds=third.median_ms,
            speed_up=speed_up(first, third),
            speed_up_over_float=speed_up(second, third),
        )
    latency = LatencyChange(times, speed_up(first, second), threads, batch, steady)
    return Timed(latency, dense_file, int8, profile, {path: by_name[str(path)].median_ms for path in others})


def latency_notes(timed: Timed) -> tuple[str, ...]:
    """Return where it did not pay: slower than dense, which is warned of too, or int8 slower than float."""
    notes = []
    latency = timed.latency
    if latency.speed_up < 1 and latency.steady:  # on a busy machine it would be a matter of luck
        note = (
            f"slower than the dense model on this machine: speed-up {latency.speed_up:.2f} in ONNX Runtime; "
            "give fewer groups, or leave out narrow layers with --min-group-width auto or --exclude"
        )
        warnings.warn(note, GroupifyWarning, stacklevel=2)
        notes.append(note)
    return (*notes, *int8_notes(timed.int8))
