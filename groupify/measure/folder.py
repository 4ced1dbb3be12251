"""Time a converted model against the dense one, interleaved in one run."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from groupify.artefact import load, read_recipe
from groupify.errors import GroupifyWarning
from groupify.graph.call import example_input
from groupify.machine import Machine, describe_machine
from groupify.measure.benchmarks import (
    SECONDS,
    Latency,
    benchmark_onnx,
    benchmark_pytorch,
    check_settings,
    speed_up,
)
from groupify.measure.memory import peak_memory
from groupify.models.sources import build_model
from groupify.onnx.exporting import export_onnx
from groupify.onnx.runtime import BlockedConvs, count_blocked_convs, open_session
from groupify.recipe import RECIPE_HASH
from groupify.scores import measure_cost
from groupify.structures import Change

ONNX, PYTORCH, TRAINING = "ONNX Runtime", "PyTorch eager", "PyTorch training step"
INT8_FILE = "model.int8.onnx"


@dataclass(frozen=True)
class Int8Latency:
    """The folder's int8 file in one setting, timed in the same run.

    Attributes:
        median_ms: milliseconds per batch.
        spread_ms: 10th and 90th percentile.
        images_per_second: at the median.
        speed_up: over the dense float model.
        speed_up_over_float: over the grouped float model.
    """

    median_ms: float
    spread_ms: tuple[float, float]
    images_per_second: float
    speed_up: float
    speed_up_over_float: float


@dataclass(frozen=True)
class BenchRow:
    """Dense against grouped in one setting.

    Attributes:
        engine: what ran it.
        threads, batch_size: the setting.
        median_ms: milliseconds per batch.
        spread_ms: 10th and 90th percentile, dense and grouped.
        images_per_second: at the median.
        speed_up: median over rounds in which both ran side by side.
        efficiency: speed-up ÷ MAC ratio.
        int8: the folder's int8 file in this setting; None where there is none, or PyTorch ran.
    """

    engine: str
    threads: int
    batch_size: int
    median_ms: Change[float]
    dense_spread_ms: tuple[float, float]
    grouped_spread_ms: tuple[float, float]
    images_per_second: Change[float]
    speed_up: float
    efficiency: float
    int8: Int8Latency | None = None


@dataclass(frozen=True)
class BenchResult:
    """All settings, and what does not depend on them.

    Attributes:
        folder: the converted model.
        macs: for one image.
        mac_ratio: dense ÷ grouped.
        rows: one for each engine and setting.
        blocked_convs: how many convs ONNX Runtime runs in its blocked kernel, ``dense`` and ``grouped``.
        peak_memory_bytes: peak resident memory of a fresh process that runs the ONNX file.
        machine: where it ran.
        int8_peak_memory_bytes: the same for the folder's int8 file; None where there is none.
        int8_blocked_convs: the same for the folder's int8 file; None where there is none.
        notes: what the reader should know.
    """

    folder: str
    macs: Change[int]
    mac_ratio: float
    rows: tuple[BenchRow, ...]
    blocked_convs: Mapping[str, BlockedConvs]
    peak_memory_bytes: Change[int]
    machine: Machine
    int8_peak_memory_bytes: int | None = None
    int8_blocked_convs: BlockedConvs | None = None
    notes: tuple[str, ...] = ()


def bench_folder(
    folder: str | Path,
    *,
    threads: Sequence[int] = (1,),
    batch_sizes: Sequence[int] = (1,),
    seconds: float = SECONDS,
    pytorch: bool = False,
    trust: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> BenchResult:
    """Export the model of an output folder and its dense original, and time both.

    Latency depends on shapes, not on weights, so the dense model is built with random ones. The folder's int8
    file is timed with them, if it belongs to the folder's recipe and takes the batch sizes.

    A setting in which the grouped model is slower than the dense one is warned of.

    Args:
        folder: output folder of a conversion.
        threads: numbers of threads to try.
        batch_sizes: batch sizes to try.
        seconds: measuring time per setting.
        pytorch: time PyTorch eager and a training step as well.
        trust: let the recipe import the code that it names.
        seed: seed of the random inputs.
        progress: show bars on stderr.

    Raises:
        GroupifyError: a setting is below 1, the folder cannot be read, or a model cannot be exported or run.
    """
    check_settings(threads, batch_sizes)
    recipe = read_recipe(folder)
    shape = recipe.model.input_shape
    models = {"dense": build_model(recipe.model, trust=trust), "grouped": load(folder, trust=trust)}
    example = example_input(shape, like=models["dense"])
    macs = Change(*(measure_cost(model, example).macs for model in models.values()))
    settings: dict[str, Any] = {
        "input_shape": shape,
        "threads": threads,
        "batch_sizes": batch_sizes,
        "seconds": seconds,
        "seed": seed,
        "progress": progress,
    }
    with tempfile.TemporaryDirectory(prefix="groupify-") as aside:
        files = {name: _export(model, name, Path(aside), shape) for name, model in models.items()}
        int8, notes = _int8_file(Path(folder), recipe.sha256, batch_sizes)
        files |= {} if int8 is None else {"int8": int8}
        rows = _rows(ONNX, benchmark_onnx(files, **settings), macs, models=len(files))
        blocked = {name: count_blocked_convs(file) for name, file in files.items()}
        memory = {name: _peak_bytes(file, shape, batch_sizes[0], threads[0]) for name, file in files.items()}
    if pytorch:
        rows += _rows(PYTORCH, benchmark_pytorch(models, **settings), macs)
        rows += _rows(TRAINING, benchmark_pytorch(models, training=True, **settings), macs)
    return BenchResult(
        folder=str(folder),
        macs=macs,
        mac_ratio=macs.ratio,
        rows=tuple(rows),
        int8_blocked_convs=blocked.pop("int8", None),
        blocked_convs=blocked,
        int8_peak_memory_bytes=memory.pop("int8", None),
        peak_memory_bytes=Change(**memory),
        machine=describe_machine(),
        notes=notes + _slow_notes(rows),
    )


def _export(model: nn.Module, name: str, folder: Path, input_shape: tuple[int, ...]) -> Path:
    return export_onnx(model, folder / f"{name}.onnx", input_shape=input_shape).path


def _peak_bytes(file: Path, input_shape: tuple[int, ...], batch_size: int, threads: int) -> int:
    return peak_memory(file, input_shape=input_shape, batch_size=batch_size, threads=threads).peak_bytes


def _int8_file(
    folder: Path, recipe_sha256: str | None, batch_sizes: Sequence[int]
) -> tuple[Path | None, tuple[str, ...]]:
    """Return the folder's int8 file if it can be timed, and else why not."""
    path = folder / INT8_FILE
    if not path.is_file():
        return None, ()
    session = open_session(path)
    if session.get_modelmeta().custom_metadata_map.get(RECIPE_HASH) != recipe_sha256:
        return None, (f"{INT8_FILE} was made for another recipe, so it is not timed",)
    fixed = session.get_inputs()[0].shape[0]
    if isinstance(fixed, int) and set(batch_sizes) != {fixed}:
        return None, (f"{INT8_FILE} takes batches of {fixed} only, so it is not timed",)
    return path, ()


def _slow_notes(rows: Sequence[BenchRow]) -> tuple[str, ...]:
    """Warn of what does not pay, and return it as notes."""
    notes = []
    for row in rows:
        setting = f"{row.engine}, threads {row.threads}, batch {row.batch_size}"
        if row.speed_up < 1:
            notes.append(f"slower than the dense model: speed-up {row.speed_up:.2f} ({setting})")
            if row.engine == ONNX:  # what a plan promises; PyTorch itself gains less, as is known
                warnings.warn(notes[-1], GroupifyWarning, stacklevel=3)
        if row.int8 is not None and row.int8.speed_up_over_float < 1:
            gain = row.int8.speed_up_over_float
            notes.append(f"grouped int8 is slower than grouped float: {gain:.2f}× its speed ({setting})")
    return tuple(notes)


def _rows(engine: str, latencies: Sequence[Latency], macs: Change[int], *, models: int = 2) -> list[BenchRow]:
    rows = []
    for start in range(0, len(latencies), models):
        dense, grouped, *others = latencies[start : start + models]
        gain = speed_up(dense, grouped)
        rows.append(
            BenchRow(
                engine=engine,
                threads=dense.threads,
                batch_size=dense.batch_size,
                median_ms=Change(dense.median_ms, grouped.median_ms),
                dense_spread_ms=(dense.p10_ms, dense.p90_ms),
                grouped_spread_ms=(grouped.p10_ms, grouped.p90_ms),
                images_per_second=Change(dense.throughput, grouped.throughput),
                speed_up=gain,
                efficiency=gain / macs.ratio,
                int8=_int8_latency(dense, grouped, others[0]) if others else None,
            )
        )
    return rows


def _int8_latency(dense: Latency, grouped: Latency, int8: Latency) -> Int8Latency:
    return Int8Latency(
        median_ms=int8.median_ms,
        spread_ms=(int8.p10_ms, int8.p90_ms),
        images_per_second=int8.throughput,
        speed_up=speed_up(dense, int8),
        speed_up_over_float=speed_up(grouped, int8),
    )


def bench_document(result: BenchResult) -> dict[str, Any]:
    """Return a result as plain JSON values."""
    return asdict(result)
