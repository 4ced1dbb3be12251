from __future__ import annotations

import time
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from groupify.errors import GroupifyError, SpecError
from groupify.machine import blocked_width, describe_machine
from groupify.measure.benchmarks import (
    Latency,
    Timing,
    benchmark_onnx,
    benchmark_pytorch,
    median_range,
    paired_ratio,
    percentile,
    speed_up,
    speed_up_range,
    time_interleaved,
)
from groupify.measure.memory import peak_memory
from groupify.onnx.exporting import export_onnx
from groupify.onnx.runtime import count_blocked_convs
from tests.onnx.nets import INPUT_SHAPE, SmallNet, randomise


def test_interleaved_timing_measures_what_it_is_given() -> None:
    timings = time_interleaved(
        {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.006)}, seconds=0.3
    )
    short, long = timings["short"], timings["long"]
    assert 2 <= short.p10_ms <= short.median_ms <= short.p90_ms
    assert long.median_ms >= 6
    assert len(short.rounds_ms) == len(long.rounds_ms) >= 5
    assert paired_ratio(long, short) > 1.5


def test_a_drifting_machine_cancels_out_of_the_ratio() -> None:
    slow_then_fast = tuple(float(value) for value in range(100, 0, -1))
    half = tuple(value / 2 for value in slow_then_fast)
    assert paired_ratio(Timing(slow_then_fast, slow_then_fast), Timing(half, half)) == 2


def test_percentile_interpolates() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0, 5.0], 50) == 3
    assert percentile([1.0, 2.0], 10) == pytest.approx(1.1)
    assert percentile([7.0], 90) == 7


def test_rows_cover_threads_and_batch_sizes(exported: Path) -> None:
    rows = benchmark_onnx(
        {"a": exported, "b": exported},
        input_shape=INPUT_SHAPE,
        threads=(1, 2),
        batch_sizes=(1, 4),
        seconds=0.01,
    )
    assert [(row.threads, row.batch_size, row.model) for row in rows] == [
        (threads, size, name) for threads in (1, 2) for size in (1, 4) for name in ("a", "b")
    ]
    for row in rows:
        assert 0 < row.p10_ms <= row.median_ms <= row.p90_ms
        assert row.throughput == pytest.approx(row.batch_size * 1000 / row.median_ms)
    assert speed_up(rows[0], rows[1]) > 0
    with pytest.raises(GroupifyError, match="one setting"):
        speed_up(rows[0], rows[2])


@pytest.mark.parametrize("training", [False, True])
def test_pytorch_leaves_the_model_and_the_threads_alone(training: bool) -> None:
    net = randomise(SmallNet()).eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    threads = torch.get_num_threads()
    rows = benchmark_pytorch(
        {"net": net}, input_shape=INPUT_SHAPE, threads=(1,), batch_sizes=(2,), training=training, seconds=0.01
    )
    assert rows[0].median_ms > 0
    assert not any(module.training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.get_num_threads() == threads


def test_bad_settings(exported: Path, net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(GroupifyError, match="threads"):
        benchmark_onnx({"a": exported}, input_shape=INPUT_SHAPE, threads=(0,))
    with pytest.raises(GroupifyError, match="batch sizes"):
        benchmark_onnx({"a": exported}, input_shape=INPUT_SHAPE, batch_sizes=())
    with pytest.raises(GroupifyError, match="no model"):
        benchmark_onnx({}, input_shape=INPUT_SHAPE)
    with pytest.raises(GroupifyError, match="takes 'input' of shape"):
        benchmark_onnx({"a": exported}, input_shape=(4, 12, 12))
    with pytest.raises(GroupifyError, match="cannot open"):
        benchmark_onnx({"a": tmp_path / "missing.onnx"}, input_shape=INPUT_SHAPE)
    static = export_onnx(net, tmp_path / "static.onnx", input_shape=INPUT_SHAPE, static_batch=1).path
    with pytest.raises(GroupifyError, match="batches of 1"):
        benchmark_onnx({"a": static}, input_shape=INPUT_SHAPE, batch_sizes=(2,))


def test_the_blocked_kernel_starts_at_the_reported_width(tmp_path: Path) -> None:
    """The block that machine.py tells from the CPU's flags is the one ONNX Runtime uses."""
    width = blocked_width()
    for name, per_group, blocked in (("wide", width, 2), ("narrow", width // 2, 1)):
        net = nn.Sequential(
            nn.Conv2d(3, 4 * per_group, 3), nn.Conv2d(4 * per_group, 4 * per_group, 3, groups=4)
        )
        path = export_onnx(net, tmp_path / f"{name}.onnx", input_shape=INPUT_SHAPE).path
        counted = count_blocked_convs(path)
        assert (counted.blocked, counted.total) == (blocked, 2)


def test_targets() -> None:
    assert [blocked_width(target) for target in ("avx512", "avx2", "arm64", "any")] == [16, 8, 16, 16]
    with pytest.raises(SpecError, match="did you mean 'avx512'"):
        blocked_width("avx-512")


def test_machine_names_what_a_reader_needs() -> None:
    machine = describe_machine()
    assert machine.cores >= 1
    assert machine.torch in str(machine)
    assert machine.cpu in str(machine)


def test_peak_memory_grows_with_the_model(exported: Path, tmp_path: Path) -> None:
    small = peak_memory(exported, input_shape=INPUT_SHAPE)
    assert 0 < small.baseline_bytes < small.peak_bytes
    wide = export_onnx(nn.Conv2d(3, 4000, 25), tmp_path / "wide.onnx", input_shape=(3, 25, 25)).path
    assert onnx.load(str(wide)).ByteSize() > 20 * 2**20
    large = peak_memory(wide, input_shape=(3, 25, 25))
    assert large.peak_bytes - small.peak_bytes > 20 * 2**20
    with pytest.raises(GroupifyError, match="memory"):
        peak_memory(exported, input_shape=(4, 12, 12))


def test_bounds_of_a_median_need_no_distribution() -> None:
    """Of 8 values below the median lie at most one with (1 + 8) / 256 = 3.5%, none with 0.4%."""
    assert median_range([5, 1, 4, 2, 8, 3, 7, 6]) == (1, 8)
    # Of 9: none or one with (1 + 9) / 512 = 1.95%, up to two with 9%.
    assert median_range([5, 1, 9, 4, 2, 8, 3, 7, 6]) == (2, 8)
    assert median_range([3.0]) == (3.0, 3.0)
    assert median_range([2, 1, 3, 5, 4]) == (1, 5)


def test_bounds_of_a_speed_up_are_of_runs_side_by_side() -> None:
    """A machine that is slower and slower: the times double, their ratio stays."""
    rounds = [1.0 + k / 10 for k in range(11)]
    dense, own = (
        Latency(name, 1, 1, Timing(tuple(f * ms for ms in rounds), tuple(f * ms for ms in rounds)))
        for name, f in (("dense", 3.0), ("own", 1.0))
    )
    assert speed_up_range(dense, own) == pytest.approx((3.0, 3.0))
