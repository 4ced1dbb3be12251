from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from groupify import Recipe, plan, save
from groupify.artefact import load, read_recipe
from groupify.conversion.surgery import restructure
from groupify.errors import ArtefactError, GroupifyError, GroupifyWarning, SpecError
from groupify.measure.folder import (
    BenchResult,
    BenchRow,
    _slow_notes,
    bench_document,
    bench_folder,
)
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.onnx.exporting import export_onnx
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.recipe import RECIPE_HASH
from groupify.reporting.text import print_bench
from tests.cli_nets import net

# Wide enough to be faster when grouped, on any machine: a slower one is warned of.
SPEC = ModelSpec("tests.cli_nets:net", {"channels": 64}, (3, 16, 16), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = net(64)
    chosen = plan(dense, SPEC.input_shape, groups=4)
    path = tmp_path_factory.mktemp("bench") / "out"
    save(
        path,
        restructure(dense, chosen.recipes),
        Recipe(SPEC, WeightsOrigin("factory"), chosen.recipes),
    )
    return path


@pytest.fixture(scope="module")
def result(folder: Path) -> BenchResult:
    return bench_folder(folder, threads=(1,), batch_sizes=(1, 4), seconds=0.1, pytorch=True, trust=True)


def test_rows(result: BenchResult) -> None:
    engines = ["ONNX Runtime", "PyTorch eager", "PyTorch training step"]
    assert [(row.engine, row.batch_size, row.name) for row in result.rows] == [
        (engine, size, name)
        for engine in engines
        for size in (1, 4)
        for name in ("dense float32", "grouped float32")
    ]
    for row in result.rows:
        assert row.spread_ms[0] <= row.median_ms <= row.spread_ms[1]
        assert row.images_per_second == pytest.approx(1000 * row.batch_size / row.median_ms)
        assert row.speed_up == row.speed_up_over_float32 == row.speed_up_over_best > 0
        assert (row.speed_up == 1) == (row.model == "dense")


def test_counts(result: BenchResult) -> None:
    # 3 → 64 at 16×16, 64 → 128 at 8×8, 128 → 128 1×1 at 8×8, and the linear.
    outside = 3 * 64 * 9 * 256 + 128 * 10
    assert result.macs.dense == outside + 64 * 128 * 9 * 64 + 128 * 128 * 64
    assert result.macs.grouped == outside + (64 * 128 * 9 * 64 + 128 * 128 * 64) // 4
    assert [convs.total for convs in result.blocked_convs.values()] == [3, 3]
    assert result.peak_memory_bytes["dense float32"] > 2**20
    document = bench_document(result)
    assert json.loads(json.dumps(document, allow_nan=False))["blocked_convs"]["dense"]["total"] == 3


def test_the_benchmark_leaves_no_trace(folder: Path, result: BenchResult) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "recipe.json"]
    assert torch.get_num_threads() == 1


def test_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="trust"):
        bench_folder(folder)
    with pytest.raises(ArtefactError, match="no folder"):
        bench_folder(tmp_path / "missing")
    # Before anything is read or exported: the folder is missing too.
    with pytest.raises(GroupifyError, match="threads"):
        bench_folder(tmp_path / "missing", threads=())
    with pytest.raises(GroupifyError, match=r"batch sizes \(1, 0\)"):
        bench_folder(tmp_path / "missing", batch_sizes=(1, 0))


def with_int8(
    folder: Path, target: Path, *, recipe_sha256: str | None = None, batch: int | None = None
) -> Path:
    """A copy of the folder with an int8 file."""
    shutil.copytree(folder, target)
    sha256 = recipe_sha256 or read_recipe(folder).sha256 or ""
    export_onnx(
        load(target, trust=True), target / "float.onnx", input_shape=SPEC.input_shape, static_batch=batch,
        metadata={RECIPE_HASH: sha256},
    )  # fmt: skip
    images = torch.randn(8, *SPEC.input_shape, generator=torch.Generator().manual_seed(0))
    quantize_onnx(target / "float.onnx", target / "model.int8.onnx", images=images)
    return target


# Of so small a net in int8.
may_be_slower = pytest.mark.filterwarnings("ignore:grouped int8 is slower than dense")
VARIANTS = ["dense float32", "dense int8", "grouped float32", "grouped int8"]


@may_be_slower
def test_int8_is_timed_with_the_others(folder: Path, tmp_path: Path) -> None:
    path = with_int8(folder, tmp_path / "out")
    result = bench_folder(path, batch_sizes=(1, 4), seconds=0.1, trust=True)
    assert [(row.batch_size, row.name) for row in result.rows] == [
        (size, name) for size in (1, 4) for name in VARIANTS
    ]
    for rows in (result.rows[:4], result.rows[4:]):
        dense, dense8, grouped, grouped8 = rows
        assert (dense.speed_up, dense8.speed_up) == (1, 1)
        assert dense.speed_up_over_float32 == 1
        best = min(dense, dense8, key=lambda row: row.median_ms)
        assert best.speed_up_over_best == 1
        assert grouped8.speed_up_over_best == (
            grouped8.speed_up if best is dense8 else grouped8.speed_up_over_float32
        )
        for row in (grouped, grouped8):
            said = [note for note in result.notes if row.setting in note and row.name in note]
            assert bool(said) == (row.speed_up < 0.995)
    assert list(result.peak_memory_bytes) == VARIANTS
    assert min(result.peak_memory_bytes.values()) > 2**20
    assert list(result.blocked_convs) == ["dense", "grouped"]
    document = bench_document(result)
    assert document["rows"][1]["precision"] == "int8"
    json.dumps(document, allow_nan=False)
    console = Console(file=io.StringIO(), width=400, no_color=True)
    print_bench(result, console)
    assert isinstance(console.file, io.StringIO)
    assert " than dense " in console.file.getvalue()


@may_be_slower
def test_int8_can_be_timed_without_a_file_of_it(folder: Path) -> None:
    result = bench_folder(folder, precisions=("int8",), seconds=0.1, trust=True)
    assert [row.name for row in result.rows] == ["dense float32", "dense int8", "grouped int8"]
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "recipe.json"]
    with pytest.raises(SpecError, match="unknown precision 'int4', expected one of float32, int8"):
        bench_folder(folder, precisions=("int4",), trust=True)  # type: ignore[arg-type]


@may_be_slower
def test_an_int8_file_that_does_not_belong_is_left_out(folder: Path, tmp_path: Path) -> None:
    foreign = with_int8(folder, tmp_path / "foreign", recipe_sha256="0" * 64)
    fixed = with_int8(folder, tmp_path / "fixed", batch=3)
    for path, reason in ((foreign, "another recipe"), (fixed, "takes batches of 3 only")):
        result = bench_folder(path, seconds=0.1, trust=True)
        assert [row.name for row in result.rows] == VARIANTS
        assert any(reason in note for note in result.notes)


def test_a_slower_setting_is_warned_of() -> None:
    row = BenchRow("ONNX Runtime", 1, 8, "grouped", "int8", 2.5, (2.4, 2.6), 400.0, 0.8, 1.2, 0.8)
    slow = r"grouped int8 is slower than dense: speed-up 0\.80 \(ONNX Runtime, threads 1, batch 8"
    with pytest.warns(GroupifyWarning, match=slow):
        assert len(_slow_notes([row, replace(row, speed_up=1.2)])) == 1
