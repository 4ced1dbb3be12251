"""Time a converted model against the dense one, interleaved in one run."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupify.artefact import load, read_recipe
from groupify.deployment.benchmark import SECONDS, Latency, benchmark_onnx, benchmark_pytorch, speed_up
from groupify.deployment.export import export_onnx
from groupify.deployment.machine import Machine, describe_machine
from groupify.deployment.memory import peak_memory
from groupify.deployment.runtime import BlockedConvs, count_blocked_convs
from groupify.graph.trace import example_input
from groupify.planning import Change, measure_cost
from groupify.zoo import build_model

ONNX, PYTORCH, TRAINING = "ONNX Runtime", "PyTorch eager", "PyTorch training step"


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


@dataclass(frozen=True)
class BenchResult:
    """All settings, and what does not depend on them.

    Attributes:
        folder: the converted model.
        macs: for one image.
        rows: one for each engine and setting.
        blocked_convs: how many convs ONNX Runtime runs in its blocked kernel, dense and grouped.
        peak_memory_bytes: peak resident memory of a fresh process that runs the ONNX file.
        machine: where it ran.
    """

    folder: str
    macs: Change[int]
    rows: tuple[BenchRow, ...]
    blocked_convs: tuple[BlockedConvs, BlockedConvs]
    peak_memory_bytes: Change[int]
    machine: Machine


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

    Latency depends on shapes, not on weights, so the dense model is built with random ones.

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
        GroupifyError: the folder cannot be read, or a model cannot be exported or run.
    """
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
        files = {
            name: export_onnx(model, Path(aside) / f"{name}.onnx", input_shape=shape).path
            for name, model in models.items()
        }
        rows = _rows(ONNX, benchmark_onnx(files, **settings), macs)
        blocked = (count_blocked_convs(files["dense"]), count_blocked_convs(files["grouped"]))
        memory = Change(
            *(
                peak_memory(file, input_shape=shape, batch_size=batch_sizes[0], threads=threads[0]).peak_bytes
                for file in files.values()
            )
        )
    if pytorch:
        rows += _rows(PYTORCH, benchmark_pytorch(models, **settings), macs)
        rows += _rows(TRAINING, benchmark_pytorch(models, training=True, **settings), macs)
    return BenchResult(str(folder), macs, tuple(rows), blocked, memory, describe_machine())


def _rows(engine: str, latencies: Sequence[Latency], macs: Change[int]) -> list[BenchRow]:
    rows = []
    for dense, grouped in zip(latencies[::2], latencies[1::2], strict=True):
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
            )
        )
    return rows


def bench_document(result: BenchResult) -> dict[str, Any]:
    """Return a result as plain JSON values."""
    document = dataclasses.asdict(result)
    document["mac_ratio"] = result.macs.ratio
    document["blocked_convs"] = dict(zip(("dense", "grouped"), document["blocked_convs"], strict=True))
    return document
