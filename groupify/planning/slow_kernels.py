"""Where a grouped conv would be slower than the dense one it replaces.

ONNX Runtime runs a conv in its blocked kernel if the channels of every group are a multiple of the block.
Outside of it, MACs are no longer what counts: patches are copied, groups run one after the other, and the
tensors around it change their layout twice. ``scripts/benchmarks/narrow_groups.py`` measures that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from groupify.errors import PlanError
from groupify.structures import Plan, SitePlan

# All in MACs of the blocked kernel at its peak, about 55 per nanosecond and core where they were measured
# (AVX-512). With narrower vectors a MAC takes longer and the rest weighs less: these err on the careful side.
_WEIGHT = 4  # to read a weight from memory, which is what a conv over one position does
_SLOW_MAC = 1.5  # a MAC outside of the blocked kernel
_PATCH_VALUE = 14  # to copy one value of an input patch
_VALUE = 9  # to bring one value into another layout, or to write and read it once more
_SHUFFLED_VALUE = 20  # to move one value in a channel shuffle
_GROUP = 8_000  # to start the next group
_NODE = 120_000  # to run two more nodes
# How far the estimate may be off: within it a grouped conv outside of the kernel counts as slower.
_MARGIN = 1.1


def relative_latency(site: SitePlan, block: int) -> float:
    """Estimate the latency of a converted site as a share of the dense one's; above 1 it does not pay.

    It tells where latency gets worse, not by how much a model gets faster: that is for a benchmark.

    Args:
        site: a converted site that runs in inference.
        block: channels per block of the processor's kernel; see ``blocked_width``.
    """
    outputs_at, groups = math.prod(site.output_size), site.groups
    inputs_at, area = outputs_at * math.prod(site.stride), math.prod(site.kernel_size)
    reads, writes = site.core_channels
    dense = _work(site, site.in_channels, site.out_channels, site.groups_before, block)
    if len(site.output_size) == 2 and not _is_blocked(site, block):
        patches = reads * outputs_at * area * _PATCH_VALUE if area > 1 or max(site.stride) > 1 else 0
        values = reads * inputs_at + writes * outputs_at
        core = reads * writes * area / groups * (_SLOW_MAC * outputs_at + _WEIGHT)
        total = _MARGIN * (core + patches + values * _VALUE + groups * _GROUP + _NODE)
    else:
        total = _work(site, reads, writes, groups, block)
    if site.structure.reduce is not None:
        at = inputs_at if area > 1 else outputs_at
        total += _pointwise_work(site.in_channels * reads // site.groups_before, reads, at)
    if site.structure.expand is not None:
        total += _pointwise_work(
            writes * site.out_channels // site.groups_before, site.out_channels, outputs_at
        )
    if site.shuffle:
        total += shuffle_work(site)
    return total / dense


def _work(site: SitePlan, inputs: int, outputs: int, groups: int, block: int) -> float:
    """Estimate what a conv of a site's kernel size costs, in MACs of the blocked kernel."""
    area, positions = math.prod(site.kernel_size), math.prod(site.output_size)
    if len(site.output_size) == 2:
        if groups == 1:  # the kernel fills the last block up
            inputs, outputs = (math.ceil(channels / block) * block for channels in (inputs, outputs))
        return inputs * outputs * area / groups * (positions + _WEIGHT)
    # No blocked kernel but for two dimensions.
    patches = inputs * positions * area * _PATCH_VALUE if area > 1 or max(site.stride) > 1 else 0
    started = groups * _GROUP if groups > 1 else 0
    return inputs * outputs * area / groups * (_SLOW_MAC * positions + _WEIGHT) + patches + started


def _pointwise_work(weights: int, outputs: int, positions: int) -> float:
    """Estimate what a 1×1 conv more costs, and the tensor that it writes."""
    return weights * (positions + _WEIGHT) + outputs * positions * _VALUE


def shuffle_work(site: SitePlan) -> float:
    """Estimate what a channel shuffle behind a site costs at run time, in MACs of the blocked kernel."""
    return site.out_channels * math.prod(site.output_size) * _SHUFFLED_VALUE + _NODE


def leave_slow_sites_dense(plan: Plan, block: int) -> Plan:
    """Return the plan with every site left dense whose grouped conv would be slower than the dense one.

    A shuffle behind it is not held against it: whoever asks for one pays for it.

    Raises:
        PlanError: none is left to convert.
    """
    sites = []
    for site in plan.sites:
        grouped = _without_shuffle(site)
        slow = _is_slow(grouped, block)
        sites.append(site.left_dense(f"grouped it would be {_why(grouped, block)}") if slow else site)
    result = dataclasses.replace(plan, sites=tuple(sites))
    if not result.converted:
        first = _without_shuffle(plan.converted[0])
        raise PlanError(
            f"no convolution worth grouping: each of the {len(plan.converted)} that could get groups would "
            f"be slower with them ({first.name}: {_why(first, block)}); --min-group-width 1 converts all "
            "the same"
        )
    return result


def with_latency_reasons(plan: Plan, block: int) -> Plan:
    """Return the plan with the reason added to every site that it makes slower."""
    return dataclasses.replace(
        plan,
        sites=tuple(
            dataclasses.replace(site, reason="; ".join(filter(None, (site.reason, _why(site, block)))))
            if _is_slow(site, block)
            else site
            for site in plan.sites
        ),
    )


def latency_warning(plan: Plan, block: int) -> str | None:
    """Return one line on the sites that a plan makes slower; None where there are none."""
    slow = [site for site in plan.converted if _is_slow(site, block)]
    if not slow:
        return None
    shuffled = all(not _is_slow(_without_shuffle(site), block) for site in slow)
    advice = "--shuffle none" if shuffled else "--min-group-width auto leaves such convs alone"
    return (
        f"{len(slow)} of {len(plan.converted)} grouped convs are expected to be slower than the dense ones: "
        f"{_names(slow)} ({_why(slow[0], block)}); {advice}"
    )


def int8_warning(plan: Plan) -> str | None:
    """Return one line on the sites that int8 kernels are slow at; None where there are none.

    ONNX Runtime's quantised conv copies the patches and multiplies group by group, unless it is depthwise:
    measured, 4 groups of 128 channels bring 1.4× of dense int8 where they bring 3.5× in float32, 8 groups
    lose (``docs/how-to/budget.md``).
    """
    slow = [site for site in plan.converted if _several_wide_groups(site)]
    if not slow:
        return None
    return (
        f"{len(slow)} of {len(plan.converted)} grouped convs are not depthwise ({_names(slow)}): int8 "
        "kernels run those one group after the other, and the dense model in int8 may be faster; --budget "
        "latency=2x plans by what int8 really takes"
    )


def _several_wide_groups(site: SitePlan) -> bool:
    return site.groups > max(1, site.groups_before) and site.core_channels[0] != site.groups


def _names(sites: Sequence[SitePlan]) -> str:
    return ", ".join(site.name or "(the model)" for site in sites[:3]) + (", …" if len(sites) > 3 else "")


def _is_slow(site: SitePlan, block: int) -> bool:
    return site.converted and bool(site.output_size) and relative_latency(site, block) > 1


def _without_shuffle(site: SitePlan) -> SitePlan:
    return dataclasses.replace(site, shuffle=False)


def _is_blocked(site: SitePlan, block: int) -> bool:
    """Whether the blocked kernel takes the grouped conv; one channel in, one out per group has its own."""
    sizes = site.core_channels
    depthwise = sizes == (site.groups, site.groups) and site.groups % block == 0
    return depthwise or all(size // site.groups % block == 0 for size in sizes)


def _why(site: SitePlan, block: int) -> str:
    share = f"slower, an estimated {relative_latency(site, block):.1f}× of the dense latency"
    if len(site.output_size) != 2 or _is_blocked(site, block):
        return share + (" with the shuffle" if site.shuffle else "")
    reads, writes = site.core_channels
    widths = f"{reads // site.groups} → {writes // site.groups}"
    return f"{share}: groups of {widths} channels are no multiples of {block}"
