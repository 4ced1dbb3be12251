"""Where a plan would make a conv slower: known, said, and by default avoided."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groupify.errors import GroupifyWarning, PlanError
from groupify.planning.rules import Rules
from groupify.planning.slow_kernels import latency_warning, relative_latency
from groupify.planning.uniform import plan
from groupify.structures import Change, SitePlan, Structure
from tests.conftest import Run


def site(
    channels: int, size: int, kernel: int, width: int, *, outputs: int | None = None, shuffle: bool = False
) -> SitePlan:
    outputs = outputs or channels
    return SitePlan(
        "conv", 1, Structure(groups=channels // width), shuffle, None, channels, outputs, (kernel, kernel),
        (1, 1), (size, size), Change(1, 1), Change(1, 1),
    )  # fmt: skip


# Channels, size, kernel, group width: speed-up in ONNX Runtime, between two convs in the blocked kernel
# (scripts/benchmarks/narrow_groups.py on AVX-512).
MEASURED = {
    (16, 56, 1, 8): 0.86, (16, 56, 1, 2): 0.91, (16, 56, 3, 8): 0.75, (16, 56, 3, 4): 0.90,
    (32, 14, 1, 8): 0.97, (32, 14, 1, 4): 0.99, (32, 14, 3, 8): 0.94, (64, 1, 1, 8): 0.84,
    (128, 1, 1, 8): 0.82, (256, 1, 1, 8): 0.89, (256, 1, 1, 2): 0.45, (512, 1, 1, 2): 0.62,
    (512, 1, 1, 8): 1.47, (512, 1, 1, 4): 1.07, (64, 56, 1, 8): 1.44, (64, 14, 1, 8): 1.26,
    (128, 7, 1, 8): 1.47, (512, 7, 1, 2): 3.99, (32, 56, 3, 8): 1.29, (32, 14, 3, 4): 1.07,
    (64, 14, 3, 8): 1.67, (24, 28, 3, 8): 1.35, (48, 14, 3, 8): 1.26, (128, 7, 3, 8): 2.15,
    (16, 56, 1, 1): 1.19, (64, 1, 1, 16): 1.01, (32, 14, 1, 16): 1.17, (256, 14, 3, 16): 11.3,
}  # fmt: skip


@pytest.mark.parametrize(("case", "speed_up"), MEASURED.items())
def test_what_was_measured_slower_is_expected_slower(case: tuple[int, ...], speed_up: float) -> None:
    assert (relative_latency(site(*case), 16) > 1) == (speed_up < 1)


@given(
    channels=st.sampled_from([16, 32, 64, 128, 256]),
    outputs=st.sampled_from([16, 64, 256]),
    size=st.sampled_from([1, 7, 14, 56]),
    kernel=st.sampled_from([1, 3]),
    block=st.sampled_from([8, 16]),
)
@settings(max_examples=60, deadline=None)
def test_groups_that_the_fast_kernel_takes_are_never_expected_slower(
    channels: int, outputs: int, size: int, kernel: int, block: int
) -> None:
    narrow = min(channels, outputs)
    for groups in (2, 4, 8, 16):
        if narrow // groups % block == 0 and narrow >= groups * block:
            assert relative_latency(replace(site(channels, size, kernel, channels // groups, outputs=outputs),
                                            structure=Structure(groups=groups)), block) < 1  # fmt: skip


def nets(*convs: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 1), *convs)


NARROW = nets(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 128, 3, padding=1), nn.Conv2d(128, 128, 3))
AVX512 = Rules(cpu="avx512")


def test_a_slower_conv_stays_dense_by_default() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd = nets(nn.Conv2d(16, 40, 1), nn.Conv2d(40, 40, 1), nn.Conv2d(40, 128, 3), nn.Conv2d(128, 128, 3))
        result = plan(odd, (3, 16, 16), groups=4, rules=AVX512)
    first, second, third = result.sites[2:]
    assert not first.converted
    assert first.macs.dense == first.macs.grouped
    assert first.params.dense == first.params.grouped
    assert first.reason is not None
    assert first.reason.startswith("grouped it would be slower, an estimated ")
    assert first.reason.endswith("× of the dense latency: groups of 20 → 20 channels are no multiples of 16")
    assert second.converted  # slower kernel, but less work by far
    assert (third.groups, third.reason) == (4, None)


def test_whoever_switches_the_width_off_is_warned() -> None:
    with pytest.warns(GroupifyWarning, match=r"1 of 3 grouped convs are expected to be slower.*: 1 \(slower"):
        result = plan(NARROW, (3, 16, 16), groups=4, rules=Rules(min_group_width=1, cpu="avx512"))
    assert [conv.groups for conv in result.sites[1:]] == [4, 4, 4]
    reasons = [conv.reason or "" for conv in result.sites[1:]]
    assert "an estimated" in reasons[0]
    assert "no multiples of 16" in reasons[0]
    assert reasons[2] == ""


def test_nothing_is_left() -> None:
    with pytest.raises(PlanError, match="no convolution worth grouping: each of the 1 that could get groups"):
        plan(nets(nn.Conv2d(16, 40, 1), nn.Conv2d(40, 40, 1)), (3, 16, 16), groups=4, rules=AVX512)


def test_a_shuffle_behind_a_cheap_conv_is_warned_of_but_made() -> None:
    model = nets(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3))
    with pytest.warns(GroupifyWarning, match=r"\(slower.* with the shuffle\); --shuffle none"):
        result = plan(model, (3, 14, 14), groups=2, rules=replace(AVX512, shuffle="all", exclude="1"))
    assert [conv.shuffle for conv in result.converted] == [True, True]
    without = plan(model, (3, 14, 14), groups=2, rules=replace(AVX512, exclude="1"))
    assert latency_warning(without, 16) is None


def test_a_conv_that_never_runs_or_has_one_dimension_is_no_obstacle() -> None:
    model = nn.Sequential(nn.Conv1d(3, 64, 3), nn.Conv1d(64, 64, 3), nn.Conv1d(64, 64, 3))
    assert [conv.groups for conv in plan(model, (3, 64), groups=2, rules=AVX512).converted] == [2, 2]


def test_command_line(run: Run) -> None:
    command = ("plan", "tests.cli_nets:net", "--input-size", "3,8,8", "--cpu", "avx512", "-g", 4)
    loose = run(*command, "--min-group-width", 1)
    assert loose.code == 0
    assert loose.err.startswith("groupify: warning: ")
    assert loose.err.count("\n") == 1
    assert "are expected to be slower than the dense ones" in loose.err
    assert "slower, an estimated" in loose.out
    default = run(*command)
    assert "expected to be slower" not in default.err


def test_groups_in_int8_are_warned_of_but_for_depthwise_ones() -> None:
    """What float32 kernels are fast at, int8 kernels run group by group."""
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    with pytest.warns(GroupifyWarning, match=r"2 of 2 .* \(1, 2\): int8 kernels .* --budget latency=2x"):
        made = plan(net, (3, 16, 16), groups=4, rules=Rules(cpu="avx512", precision="int8"))
    assert any("int8 kernels" in note for note in made.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules = Rules(cpu="avx512", precision="int8", structures="grouped-pointwise", min_group_width=1)
        plan(net, (3, 16, 16), groups=64, rules=rules)
        plan(net, (3, 16, 16), groups=4, rules=Rules(cpu="avx512"))
