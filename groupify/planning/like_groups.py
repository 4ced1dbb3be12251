"""The MACs that plain groups would leave: what other structures are compared with."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from groupify.errors import PlanError
from groupify.graph.call import Example, as_call
from groupify.graph.plain_layers import Conv
from groupify.planning.budget import MACS, Budget, Limit
from groupify.planning.group_counts import GroupCounts
from groupify.planning.left_alone import nothing_fits
from groupify.planning.observing import observe
from groupify.planning.rules import Rules
from groupify.planning.sites import conv_macs, find_convs
from groupify.planning.uniform import no_convs, reasons_to_leave
from groupify.scores import measure_cost

# Where neither a number of groups nor a budget is given.
DEFAULT_GROUPS = GroupCounts.of(4)


def macs_of(counts: GroupCounts) -> str:
    """Return what the limit of ``budget_like_groups`` is called.

    >>> macs_of(GroupCounts.of(4)), macs_of(GroupCounts.of("4,layer3.*=8"))
    ('the MACs of 4 plain groups', 'the MACs of plain groups 4,layer3.*=8')
    """
    groups = f"{counts} plain groups" if counts.is_one_number else f"plain groups {counts}"
    return f"the MACs of {groups}"


def budget_like_groups(
    model: nn.Module, example: Example, counts: GroupCounts = DEFAULT_GROUPS, rules: Rules = Rules()
) -> Budget:
    """Return a limit on the MACs: those of plain groups in every conv whose channels they divide.

    Whether such groups are fast, or wide enough for a kernel, is not asked.

    Args:
        model: a dense model; left untouched.
        example: (C, H, W) of one image, or how the model is called.
        counts: numbers of groups.
        rules: which convs may be converted; the others count as they are.

    Raises:
        PlanError: the groups divide no conv that may be converted, there is none, or a pattern matches none.
    """
    call = as_call(example, model, batch=1)
    observed, convs = observe(model, call), find_convs(model)
    if not convs:
        raise PlanError(no_convs(model, call))
    rules.check_patterns(convs)
    counts.check_patterns(convs)
    reasons = reasons_to_leave(model, observed, rules)
    free = {name: convs[name] for name, why in reasons.items() if why is None}
    if not free:
        raise PlanError(nothing_fits([why for why in reasons.values() if why is not None]))
    saved = 0
    for name, conv in free.items():
        count, macs = counts.of_conv(name), conv_macs(conv, observed[name])
        if conv.in_channels % count == conv.out_channels % count == 0:
            saved += macs - macs // count
    if saved == 0:
        raise PlanError(_divide_nothing(counts, free))
    dense = measure_cost(model, call).macs
    return Budget((Limit(MACS, float(dense - saved), relative=False, name=macs_of(counts)),))


def keep_ungrouped(rules: Rules, counts: GroupCounts, model: nn.Module) -> Rules:
    """Return rules that leave those convs as they are for which no groups are asked, or 1."""
    ungrouped = [glob.escape(name) for name in find_convs(model) if counts.of_conv(name) == 1]
    return replace(rules, exclude=(*rules.exclude, *ungrouped))


def _divide_nothing(counts: GroupCounts, convs: Mapping[str, Conv]) -> str:
    default = ", the default," if counts == DEFAULT_GROUPS else ""
    common = [math.gcd(conv.in_channels, conv.out_channels) for conv in convs.values()]
    divisors = (count for count in range(2, max(common) + 1) if any(size % count == 0 for size in common))
    groups = next((f"{count} groups or " for count in divisors), "")
    return (
        f"{counts} groups{default} divide the channels of no conv that may be converted; "
        f"try {groups}a budget like macs=50%"
    )
