"""Time a converted model against the dense one, interleaved in one run, in float32, in int8 or in both."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    speed_up_range,
)
from groupify.measure.memory import peak_memory
from groupify.measure.timed_files import export_for_timing
from groupify.models.sources import build_model
from groupify.onnx.runtime import BlockedConvs, count_blocked_convs, open_session
from groupify.recipe import RECIPE_HASH
from groupify.scores import measure_cost
from groupify.structures import FLOAT32, INT8, PRECISIONS, Change, Precision, check_precision

ONNX, PYTORCH, TRAINING = "ONNX Runtime", "PyTorch eager", "PyTorch training step"
DENSE, GROUPED = "dense", "grouped"
INT8_FILE = "model.int8.onnx"
_SLOWER = 0.995  # a speed-up below this, which is shown as less than 1


@dataclass(frozen=True)
class BenchRow:
    """One model in one precision and one setting.

    Attributes:
        engine: what ran it.
        threads, batch_size: the setting.
        model: ``"dense"`` or ``"grouped"``.
        precision: what it computed in.
        median_ms: milliseconds per batch.
        spread_ms: 10th and 90th percentile.
        images_per_second: at the median.
        speed_up: over the dense model in the same precision; like the others the median over rounds in which
            both ran side by side.
        speed_up_over_float32: over the dense float32 model.
        speed_up_over_best: over the dense model in the precision in which that is fastest here.
        speed_up_range, speed_up_over_float32_range: between what two of these lie with 95%.
    """

    engine: str
    threads: int
    batch_size: int
    model: str
    precision: Precision
    median_ms: float
    spread_ms: tuple[float, float]
    images_per_second: float
    speed_up: float
    speed_up_over_float32: float
    speed_up_over_best: float
    speed_up_range: tuple[float, float] | None = None
    speed_up_over_float32_range: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """``dense int8``."""
        return f"{self.model} {self.precision}"

    @property
    def setting(self) -> str:
        """Engine, threads and batch size in words."""
        return f"{self.engine}, threads {self.threads}, batch {self.batch_size}"


@dataclass(frozen=True)
class BenchResult:
    """All settings, and what does not depend on them.

    Attributes:
        folder: the converted model.
        macs: for one image.
        mac_ratio: dense ÷ grouped; a speed-up divided by it is the efficiency of the conversion.
        rows: for each engine and setting one of each model and precision, the dense ones first.
        blocked_convs: how many convs of the float32 files ONNX Runtime runs in its blocked kernel, ``dense``
            and ``grouped``.
        peak_memory_bytes: peak resident memory of a fresh process that runs the ONNX file, ``dense float32``
            and so on.
        machine: where it ran.
        notes: what the reader should know.
    """

    folder: str
    macs: Change[int]
    mac_ratio: float
    rows: tuple[BenchRow, ...]
    blocked_convs: Mapping[str, BlockedConvs]
    peak_memory_bytes: Mapping[str, int]
    machine: Machine
    notes: tuple[str, ...] = ()


class _Variant(NamedTuple):
    """One of the models in one precision."""

    model: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.model} {self.precision}"


def bench_folder(
    folder: str | Path,
    *,
    precisions: Sequence[Precision] | None = None,
    threads: Sequence[int] = (1,),
    batch_sizes: Sequence[int] = (1,),
    seconds: float = SECONDS,
    pytorch: bool = False,
    trust: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> BenchResult:
    """Export the model of an output folder and its dense original, and time both.

    Latency depends on shapes, not on weights, so the dense model is built with random ones, and ranges of
    int8 come from a random image. The folder's own int8 file is timed, if it belongs to the folder's recipe
    and takes the batch sizes. The dense float32 model is timed in any case.

    A setting in which the grouped model is slower than the dense one in the same precision is warned of.

    Args:
        folder: output folder of a conversion.
        precisions: what to compare in; None = float32, and int8 if the folder has an int8 file.
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
    for precision in precisions or ():
        check_precision(precision)
    recipe = read_recipe(folder)
    shape = recipe.model.input_shape
    models = {DENSE: build_model(recipe.model, trust=trust), GROUPED: load(folder, trust=trust)}
    example = example_input(shape, like=models[DENSE])
    macs = Change(*(measure_cost(model, example).macs for model in models.values()))
    settings: dict[str, Any] = {
        "input_shape": shape,
        "threads": threads,
        "batch_sizes": batch_sizes,
        "seconds": seconds,
        "seed": seed,
        "progress": progress,
    }
    if precisions is None:
        precisions = PRECISIONS if Path(folder, INT8_FILE).is_file() else (FLOAT32,)
    with tempfile.TemporaryDirectory(prefix="groupify-") as aside:
        own, notes = (None, ()) if INT8 not in precisions else _own_int8(folder, recipe.sha256, batch_sizes)
        files = _files(models, precisions, Path(aside), shape, own)
        named = {str(variant): path for variant, path in files.items()}
        rows = _rows(ONNX, benchmark_onnx(named, **settings), list(files))
        blocked = {
            variant.model: count_blocked_convs(path)
            for variant, path in files.items()
            if variant.precision == FLOAT32
        }
        memory = {
            name: peak_memory(
                path, input_shape=shape, batch_size=batch_sizes[0], threads=threads[0]
            ).peak_bytes
            for name, path in named.items()
        }
    if pytorch:
        eager = [_Variant(model, FLOAT32) for model in models]
        rows += _rows(PYTORCH, benchmark_pytorch(models, **settings), eager)
        rows += _rows(TRAINING, benchmark_pytorch(models, training=True, **settings), eager)
    return BenchResult(
        str(folder), macs, macs.ratio, tuple(rows), blocked, memory, describe_machine(),
        notes=(*notes, *_slow_notes(rows)),
    )  # fmt: skip


def _files(
    models: Mapping[str, nn.Module],
    precisions: Sequence[Precision],
    folder: Path,
    input_shape: tuple[int, ...],
    own_int8: Path | None,
) -> dict[_Variant, Path]:
    """Export what is to be timed, the dense models first; the dense float32 one in any case."""
    wanted = [_Variant(DENSE, precision) for precision in PRECISIONS if precision in {FLOAT32, *precisions}]
    wanted += [_Variant(GROUPED, precision) for precision in PRECISIONS if precision in precisions]
    files = {}
    for variant in wanted:
        if own_int8 is not None and variant == (GROUPED, INT8):
            files[variant] = own_int8
        else:
            path = folder / f"{variant.model}-{variant.precision}.onnx"
            files[variant] = export_for_timing(models[variant.model], path, input_shape, variant.precision)
    return files


def _own_int8(
    folder: Path | str, recipe_sha256: str | None, batch_sizes: Sequence[int]
) -> tuple[Path | None, tuple[str, ...]]:
    """Return the folder's int8 file if it can be timed, and else why another one is."""
    path = Path(folder, INT8_FILE)
    if not path.is_file():
        return None, ()
    session = open_session(path)
    if session.get_modelmeta().custom_metadata_map.get(RECIPE_HASH) != recipe_sha256:
        return None, (f"{INT8_FILE} was made for another recipe, so one with random ranges is timed",)
    fixed = session.get_inputs()[0].shape[0]
    if isinstance(fixed, int) and set(batch_sizes) != {fixed}:
        return None, (f"{INT8_FILE} takes batches of {fixed} only, so one with random ranges is timed",)
    return path, ()


def _slow_notes(rows: Sequence[BenchRow]) -> tuple[str, ...]:
    """Warn of what does not pay, and return it as notes."""
    notes = []
    for row in rows:
        if row.speed_up < _SLOWER:
            notes.append(f"{row.name} is slower than dense: speed-up {row.speed_up:.2f} ({row.setting})")
            if row.engine == ONNX:  # what a plan promises; PyTorch itself gains less, as is known
                warnings.warn(notes[-1], GroupifyWarning, stacklevel=3)
    return tuple(notes)


def _rows(engine: str, latencies: Sequence[Latency], variants: Sequence[_Variant]) -> list[BenchRow]:
    rows = []
    for start in range(0, len(latencies), len(variants)):
        same = dict(zip(variants, latencies[start : start + len(variants)], strict=True))
        dense = {variant.precision: one for variant, one in same.items() if variant.model == DENSE}
        best = min(dense.values(), key=lambda one: one.median_ms)
        rows += [
            BenchRow(
                engine=engine,
                threads=one.threads,
                batch_size=one.batch_size,
                model=variant.model,
                precision=variant.precision,
                median_ms=one.median_ms,
                spread_ms=(one.p10_ms, one.p90_ms),
                images_per_second=one.throughput,
                speed_up=speed_up(dense[variant.precision], one),
                speed_up_over_float32=speed_up(dense[FLOAT32], one),
                speed_up_over_best=speed_up(best, one),
                speed_up_range=speed_up_range(dense[variant.precision], one),
                speed_up_over_float32_range=speed_up_range(dense[FLOAT32], one),
            )
            for variant, one in same.items()
        ]
    return rows


def bench_document(result: BenchResult) -> dict[str, Any]:
    """Return a result as plain JSON values."""
    return asdict(result)
