from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from groupify import Recipe, WeightsOrigin, plan, save
from groupify.bench import BenchResult, bench_document, bench_folder
from groupify.conversion.surgery import restructure
from groupify.errors import ArtefactError, GroupifyError, SpecError
from groupify.zoo import ModelSpec
from tests.cli_nets import net

SPEC = ModelSpec("tests.cli_nets:net", {}, (3, 8, 8), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = net()
    chosen = plan(dense, SPEC.input_shape, groups=4)
    path = tmp_path_factory.mktemp("bench") / "out"
    save(
        path,
        restructure(dense, chosen.recipes),
        Recipe(SPEC, WeightsOrigin("factory", False), chosen.recipes),
    )
    return path


@pytest.fixture(scope="module")
def result(folder: Path) -> BenchResult:
    return bench_folder(folder, threads=(1,), batch_sizes=(1, 4), seconds=0.1, pytorch=True, trust=True)


def test_rows(result: BenchResult) -> None:
    engines = ["ONNX Runtime", "PyTorch eager", "PyTorch training step"]
    assert [(row.engine, row.batch_size) for row in result.rows] == [(e, b) for e in engines for b in (1, 4)]
    for row in result.rows:
        assert row.dense_spread_ms[0] <= row.median_ms.dense <= row.dense_spread_ms[1]
        assert row.grouped_spread_ms[0] <= row.median_ms.grouped <= row.grouped_spread_ms[1]
        assert row.images_per_second.dense == pytest.approx(1000 * row.batch_size / row.median_ms.dense)
        assert row.efficiency == pytest.approx(row.speed_up / result.macs.ratio)
        assert row.speed_up > 0


def test_counts(result: BenchResult) -> None:
    # 3 → 32 at 8×8, 32 → 64 at 4×4, 64 → 64 1×1 at 4×4, and the linear.
    outside = 3 * 32 * 9 * 64 + 64 * 10
    assert result.macs.dense == outside + 32 * 64 * 9 * 16 + 64 * 64 * 16
    assert result.macs.grouped == outside + (32 * 64 * 9 * 16 + 64 * 64 * 16) // 4
    assert [convs.total for convs in result.blocked_convs] == [3, 3]
    assert result.peak_memory_bytes.dense > 2**20
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
    with pytest.raises(GroupifyError, match="threads"):
        bench_folder(folder, threads=(), trust=True)
