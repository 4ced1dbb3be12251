"""The rules that give each conv its number of groups."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from groupify.errors import GroupifyWarning, PlanError
from groupify.graph.operations import CONVS, Conv, conv_kind
from groupify.graph.trace import example_input
from groupify.planning.rules import Rules
from groupify.planning.sites import (
    conv_macs,
    find_convs,
    functional_convs,
    in_order,
    limits,
    observe,
    removal_of_parametrization,
    site_plan,
)
from groupify.planning.slow_kernels import latency_warning, leave_slow_sites_dense, with_latency_reasons
from groupify.structures import DENSE, GROUPED, GROUPED_POINTWISE, Observed, Plan, SiteRecipe

# A conv that reads fewer channels than this (the image itself, as a rule) has next to nothing to gain.
_MIN_IN_CHANNELS = 8
# A strided 1×1 conv (the projection of a residual block's shortcut) with less than this share of the MACs
# stays dense: it lets the groups of one stage mix on the way to the next. Converting the demo's two, 1% of
# its MACs, costs 1.6 points of accuracy.
_SHORTCUT_SHARE = 0.01
_EXCLUDED, _NOT_INCLUDED = "excluded", "not included"


@dataclass(frozen=True)
class _Choice:
    kind: str
    groups: int
    reason: str | None = None


def plan(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    groups: int,
    rules: Rules = Rules(),
) -> Plan:
    """Decide for every conv of a model how many groups it gets.

    Args:
        model: a dense model; left untouched (one forward pass is run).
        input_shape: (C, H, W) of one image.
        groups: number of groups to aim at; a conv whose channels it does not divide gets the largest
            smaller number that does.
        rules: which convs may be converted and into what; by default plain groups that are fast on this
            machine's processor.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 64, 3))
        >>> for site in groupify.plan(net, (3, 16, 16), groups=4, rules=groupify.Rules(cpu="avx512")).sites:
        ...     print(site.name, site.groups, site.reason)
        0 1 first conv: too few input channels (3)
        1 2 clamped: groups narrower than 16 channels are slower

    Raises:
        PlanError: ``groups`` fits no conv or is out of range, a pattern matches nothing, or the rules allow
            more than one kind of replacement.
        ConversionError: the model does not run on that input shape.

    Warns:
        GroupifyWarning: convs are expected to be slower with groups; where ``min_group_width`` is a number.
    """
    _check_groups(groups)
    example = example_input(input_shape, like=model)
    made = plan_observed(model, observe(model, example), input_shape, groups=groups, rules=rules)
    notes = limits(model, [site.name for site in made.converted], example)
    slower = latency_warning(made, rules.cpu_block)
    if slower is not None:
        made = with_latency_reasons(made, rules.cpu_block)
        notes = (*notes, slower)
        warnings.warn(slower, GroupifyWarning, stacklevel=2)
    return replace(made, notes=notes)


def plan_observed(
    model: nn.Module,
    observed: Mapping[str, Observed],
    input_shape: tuple[int, ...],
    *,
    groups: int,
    rules: Rules,
) -> Plan:
    """Do what ``plan`` does, from a forward pass that ``observe`` has watched; without notes and warnings."""
    _check_groups(groups)
    convs = find_convs(model)
    if not convs:
        functional = "; ".join(("", *functional_convs(model, example_input(input_shape, like=model))))
        raise PlanError(f"the model has no conv layer, so there is no convolution worth grouping{functional}")
    rules.check_patterns(convs)
    first = next(iter(observed), None)
    total = sum(conv_macs(convs[name], run) for name, run in observed.items())
    sites = []
    for name, conv in in_order(convs, observed).items():
        run = observed.get(name)
        reason = _why_not(name, conv, run, name == first, rules) or _why_shortcut(conv, run, total, rules)
        choice = _Choice(DENSE, conv.groups, reason) if reason is not None else _choose(conv, groups, rules)
        shuffle = choice.kind == GROUPED and rules.shuffle == "all"
        recipe = SiteRecipe(name, choice.kind, choice.groups, shuffle)
        sites.append(site_plan(conv, recipe, run, choice.reason))
    result = Plan(tuple(sites), tuple(input_shape), groups, rules.resolved().cpu)
    if not result.converted:
        raise PlanError(_nothing_fits(result, groups, rules.narrowest))
    return leave_slow_sites_dense(result, rules.block) if rules.block > 1 else result


def _check_groups(groups: int) -> None:
    if groups < 2:
        dense = ", which leaves the model dense" if groups == 1 else ""
        raise PlanError(f"groups is {groups}{dense}; expected at least 2, for example 4")


def _choose(conv: Conv, groups: int, rules: Rules) -> _Choice:
    """Choose the number of groups of a dense conv that nothing else forbids to convert."""
    kind, narrowest = rules.kind, rules.narrowest
    # ONNX Runtime's blocked kernel is for two dimensions; elsewhere no width is special.
    block = rules.block if isinstance(conv, nn.Conv2d) else 1
    if kind == GROUPED_POINTWISE and max(conv.kernel_size) == 1:
        return _Choice(DENSE, 1, "a 1×1 conv costs less than a grouped conv and a pointwise conv")
    sizes = (conv.in_channels, conv.out_channels)
    common = math.gcd(*sizes)
    channels = f"{conv.in_channels} → {conv.out_channels} channels"
    dividing = [count for count in range(2, min(groups, common) + 1) if common % count == 0]
    if not dividing:
        return _Choice(DENSE, 1, f"no number of groups from 2 to {groups} divides {channels}")
    wide = [count for count in dividing if min(sizes) // count >= narrowest]
    if not wide:
        return _Choice(
            DENSE, 1, f"groups narrower than {narrowest} channels are slower; {channels} are too few"
        )
    whole = [count for count in wide if all(size // count % block == 0 for size in sizes)]
    chosen = max(whole or wide)
    if kind == GROUPED_POINTWISE and not _pointwise_is_smaller(conv, chosen):
        return _Choice(DENSE, 1, f"{chosen} groups and a pointwise conv would cost more than this conv")
    reasons = []
    if chosen < max(wide):
        reasons.append(f"clamped: only widths that are multiples of {block} run in the fast kernel")
    elif chosen < max(dividing):
        reasons.append(f"clamped: groups narrower than {narrowest} channels are slower")
    elif chosen < groups:
        reasons.append(f"clamped: {groups} groups do not divide {channels}")
    if not whole:
        reasons.append(f"slower kernel: no width is a multiple of {block}")
    return _Choice(kind, chosen, "; ".join(reasons) or None)


def _why_not(
    name: str,
    conv: Conv,
    observed: Observed | None,
    is_first: bool,
    rules: Rules,
) -> str | None:
    """Say why a conv is left alone whatever the number of groups, or return None."""
    if not rules.allows(name):
        return _EXCLUDED if rules.excludes(name) else _NOT_INCLUDED
    if is_parametrized(conv) or "weight" not in conv._parameters:
        return (
            f"its weight is parametrized (weight or spectral norm); first {removal_of_parametrization(conv)}"
        )
    if conv_kind(conv) is None:
        kind = next(base.__name__ for base in CONVS if isinstance(conv, base))
        return f"a subclass of {kind} ({type(conv).__name__}), whose forward may differ"
    if observed is None:
        return "never runs in inference"
    if conv.groups > 1:
        return (
            "depthwise already"
            if conv.groups == conv.in_channels
            else f"grouped already ({conv.groups} groups)"
        )
    if is_first or conv.in_channels < _MIN_IN_CHANNELS:
        if conv.in_channels >= _MIN_IN_CHANNELS:
            return "first conv: it is always left alone"
        return f"{'first conv: ' if is_first else ''}too few input channels ({conv.in_channels})"
    return None


def _why_shortcut(conv: Conv, observed: Observed | None, total_macs: int, rules: Rules) -> str | None:
    """Say why a shortcut that nothing else keeps dense had better stay so."""
    if rules.include or observed is None or max(conv.kernel_size) > 1 or max(conv.stride) == 1:
        return None
    if conv_macs(conv, observed) >= _SHORTCUT_SHARE * total_macs:
        return None
    return f"shortcut with under {_SHORTCUT_SHARE:.0%} of the MACs: lets the groups mix; see --include"


def _pointwise_is_smaller(conv: Conv, groups: int) -> bool:
    dense = conv.weight.numel()
    return dense // groups + conv.out_channels**2 < dense


def _nothing_fits(result: Plan, groups: int, narrowest: int) -> str:
    reasons = Counter(site.reason or "" for site in result.sites)
    # What the user left out by a pattern explains nothing, unless there is nothing else.
    telling = {reason: count for reason, count in reasons.items() if reason not in (_EXCLUDED, _NOT_INCLUDED)}
    common, count = max((telling or reasons).items(), key=lambda item: item[1])
    return (
        f"no convolution worth grouping: {groups} groups of at least {narrowest} channels fit none of "
        f"the {len(result.sites)} convs; "
        f"most common reason ({count}×): {common}; try fewer groups or a smaller --min-group-width"
    )
