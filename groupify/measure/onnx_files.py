"""Time any ONNX files against each other, interleaved in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from groupify.errors import GroupifyError, SpecError
from groupify.machine import Machine, describe_machine
from groupify.measure.benchmarks import SECONDS, Latency, benchmark_onnx, speed_up
from groupify.onnx.providers import CPU, PROVIDERS
from groupify.onnx.runtime import BlockedConvs, count_blocked_convs


@dataclass(frozen=True)
class FileFacts:
    """What an ONNX file is.

    Attributes:
        path: the file.
        file_bytes: its size, without external data.
        opset: of its standard operators; None where it has none.
        quantised: whether it holds quantised numbers.
        blocked_convs: how many convs ONNX Runtime runs in its blocked kernel; None on other providers than
            the CPU.
    """

    path: str
    file_bytes: int
    opset: int | None
    quantised: bool
    blocked_convs: BlockedConvs | None


@dataclass(frozen=True)
class FileRow:
    """One file in one setting.

    Attributes:
        path: the file.
        threads, batch_size: the setting.
        median_ms: milliseconds per batch.
        spread_ms: 10th and 90th percentile.
        images_per_second: at the median.
        speed_up: over the first file; the median over rounds in which both ran side by side.
    """

    path: str
    threads: int
    batch_size: int
    median_ms: float
    spread_ms: tuple[float, float]
    images_per_second: float
    speed_up: float


@dataclass(frozen=True)
class FilesBench:
    """Files in all settings.

    Attributes:
        provider: what they ran on, by its short name.
        files: in the order given; the first is what the others are compared with.
        rows: one for each setting and file.
        machine: where they ran.
        notes: what the reader should know.
    """

    provider: str
    files: tuple[FileFacts, ...]
    rows: tuple[FileRow, ...]
    machine: Machine
    notes: tuple[str, ...] = ()


def bench_files(
    paths: Sequence[Path],
    *,
    threads: Sequence[int] = (1,),
    batch_sizes: Sequence[int] = (1,),
    seconds: float = SECONDS,
    input_shape: tuple[int, ...] | None = None,
    provider: str = CPU,
    seed: int = 0,
    progress: bool = False,
) -> FilesBench:
    """Time ONNX files from anywhere in turns, on random inputs of the types and shapes that they take.

    Args:
        paths: the files, the one to compare with first.
        threads: numbers of threads to try.
        batch_sizes: batch sizes to try.
        seconds: measuring time per setting.
        input_shape: of one image, where a file leaves it open.
        provider: short name of the execution provider, see ``providers``.
        seed: seed of the random inputs.
        progress: show a bar on stderr.

    Raises:
        SpecError: a file is named twice, or the provider is not there.
        GroupifyError: a file cannot be read or run.
    """
    names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise SpecError(f"{', '.join(names)}: a file is named twice; name each once")
    facts = tuple(_facts(path, provider) for path in paths)
    latencies = benchmark_onnx(
        dict(zip(names, paths, strict=True)),
        input_shape=input_shape,
        threads=threads,
        batch_sizes=batch_sizes,
        seconds=seconds,
        provider=provider,
        seed=seed,
        progress=progress,
    )
    return FilesBench(
        provider, facts, tuple(_rows(latencies, len(names))), describe_machine(), _notes(provider)
    )


def _rows(latencies: Sequence[Latency], count: int) -> list[FileRow]:
    rows = []
    for start in range(0, len(latencies), count):
        first = latencies[start]
        rows += [
            FileRow(
                row.model,
                row.threads,
                row.batch_size,
                row.median_ms,
                (row.p10_ms, row.p90_ms),
                row.throughput,
                speed_up(first, row),
            )
            for row in latencies[start : start + count]
        ]
    return rows


def _facts(path: Path, provider: str) -> FileFacts:
    if not path.is_file():
        raise GroupifyError(f"no file {str(path)!r}; expected ONNX files, with commas between")
    blocked = count_blocked_convs(path) if provider == CPU else None
    model = onnx.load(str(path), load_external_data=False)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    quantised = any("Quantize" in node.op_type or "QLinear" in node.op_type for node in model.graph.node)
    return FileFacts(str(path), path.stat().st_size, opset, quantised, blocked)


def _notes(provider: str) -> tuple[str, ...]:
    if provider == CPU:
        return ()
    return (
        f"groupify's own figures are for the CPU: nothing has been measured with {PROVIDERS[provider]}, and "
        "plans do not know what is fast there",
    )
