"""The rules that give each conv its number of groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from groupify.conversion.replaceable import LeftAlone, shared_weights
from groupify.conversion.surgery import conv_shape, why_not_several
from groupify.errors import GroupifyWarning, PlanError, expect_type
from groupify.graph.call import Call, Example, as_call, one_example, shape_of
from groupify.graph.plain_layers import Conv
from groupify.models.wrappers import unseen_layers, unwrapped
from groupify.planning.group_counts import GroupCounts
from groupify.planning.left_alone import nothing_fits, why_left_alone, why_shortcut
from groupify.planning.observing import functional_convs, observe
from groupify.planning.rules import Rules
from groupify.planning.sites import conv_macs, find_convs, in_order, limits, site_plan
from groupify.planning.slow_kernels import (
    int8_warning,
    latency_warning,
    leave_slow_sites_dense,
    with_latency_reasons,
)
from groupify.structures import GROUPED_POINTWISE, INT8, Observed, Plan, SiteRecipe, Structure

_PLAIN_GROUPS = "--structure grouped makes it a grouped conv alone"


@dataclass(frozen=True)
class _Choice:
    structure: Structure
    reason: str | None = None
    left_alone: LeftAlone | None = None

    @classmethod
    def dense(cls, conv: Conv, why: LeftAlone) -> _Choice:
        """Leave a conv as it is."""
        return cls(Structure(groups=conv.groups), why.reason, why)


def plan(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    *,
    groups: int | Mapping[str, int] | GroupCounts,
    rules: Rules = Rules(),
    example_inputs: Any = None,
) -> Plan:
    """Decide for every conv of a model how many groups it gets.

    Args:
        model: a dense model; left untouched (one forward pass is run).
        input_shape: (C, H, W) of one image, for a model of one input.
        groups: number of groups to aim at, or glob pattern of names → number, of which the last that matches
            counts (``{"*": 4, "layer3.*": 8}``; others stay as they are); a conv whose channels it does not
            divide gets the largest smaller number that does.
        rules: which convs may be converted and into what; by default plain groups that are fast on this
            machine's processor.
        example_inputs: in the place of ``input_shape``, what the model is called with: a tensor with a batch
            dimension, a tuple of positional arguments, a dict of keyword arguments, or a tuple of these two.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 64, 3))
        >>> for site in groupify.plan(net, (3, 16, 16), groups=4, rules=groupify.Rules(cpu="avx512")).sites:
        ...     print(site.name, site.groups, site.reason)
        0 1 first conv: too few input channels (3)
        1 2 clamped: groups narrower than 16 channels are slower

    Raises:
        PlanError: ``groups`` fits no conv or is out of range, a pattern matches nothing, or the rules allow
            more than one family of structures.
        SpecError: neither ``input_shape`` nor ``example_inputs``, or both.
        ConversionError: the model does not run on such inputs.

    Warns:
        GroupifyWarning: convs are expected to be slower with groups; where ``min_group_width`` is a number,
            or the plan is for int8.
    """
    expect_type(rules, Rules, "rules", "groupify.Rules(...)")
    counts = GroupCounts.of(groups)
    model = unwrapped(model)
    example = one_example(input_shape, example_inputs)
    observed = observe(model, as_call(example, model, batch=1))
    made = plan_observed(model, observed, example, groups=counts, rules=rules)
    found = limits(model, [site.name for site in made.converted], as_call(example, model))
    notes = found.notes
    in_int8 = rules.precision == INT8
    slower = int8_warning(made) if in_int8 else latency_warning(made, rules.cpu_block)
    if slower is not None:
        made = made if in_int8 else with_latency_reasons(made, rules.cpu_block)
        notes = (*notes, slower)
        warnings.warn(slower, GroupifyWarning, stacklevel=2)
    return replace(made, notes=notes, captured=found.captured)


def plan_observed(
    model: nn.Module,
    observed: Mapping[str, Observed],
    example: Example,
    *,
    groups: GroupCounts,
    rules: Rules,
) -> Plan:
    """Do what ``plan`` does, from a forward pass that ``observe`` has watched; without notes and warnings."""
    convs, call = find_convs(model), as_call(example, model, batch=1)
    if not convs:
        raise PlanError(no_convs(model, call))
    rules.check_patterns(convs)
    groups.check_patterns(convs)
    choices = _choices(convs, observed, shared_weights(model), groups, rules)
    sites = [
        site_plan(convs[name], _recipe(name, choice, rules), observed.get(name), choice.reason)
        for name, choice in choices.items()
    ]
    result = Plan(
        tuple(sites), shape_of(example), groups.largest, rules.resolved().cpu, rules.precision,
        inputs=tuple(call.named_tensors(model)),
    )  # fmt: skip
    if not result.converted:
        raise PlanError(nothing_fits([choice.left_alone for choice in choices.values() if choice.left_alone]))
    return leave_slow_sites_dense(result, rules.block) if rules.block > 1 else result


def no_convs(model: nn.Module, example: Call) -> str:
    """Say that a model has no conv, and what it has in their place."""
    found = (*unseen_layers(model), *functional_convs(model, example))
    return "; ".join(("the model has no conv layer, so there is no convolution worth grouping", *found))


def _recipe(name: str, choice: _Choice, rules: Rules) -> SiteRecipe:
    shuffle = rules.shuffle == "all" and choice.left_alone is None and choice.structure.is_one_conv
    return SiteRecipe(name, choice.structure, shuffle)


def _choices(
    convs: Mapping[str, Conv],
    observed: Mapping[str, Observed],
    shared: Mapping[str, str],
    groups: GroupCounts,
    rules: Rules,
) -> dict[str, _Choice]:
    """Choose what becomes of each conv, in the order in which they run."""
    choices = {}
    for name, why in _reasons(convs, observed, shared, rules, shortcuts=True).items():
        conv = convs[name]
        choices[name] = (
            _choose(conv, observed.get(name), groups.of_conv(name), rules)
            if why is None
            else _Choice.dense(conv, why)
        )
    return choices


def reasons_to_leave(
    model: nn.Module, observed: Mapping[str, Observed], rules: Rules
) -> dict[str, LeftAlone | None]:
    """Return why each conv is left alone whatever structure it might get, in the order in which they run."""
    return _reasons(find_convs(model), observed, shared_weights(model), rules, shortcuts=False)


def _reasons(
    convs: Mapping[str, Conv],
    observed: Mapping[str, Observed],
    shared: Mapping[str, str],
    rules: Rules,
    *,
    shortcuts: bool,
) -> dict[str, LeftAlone | None]:
    """Why each conv is left alone; with ``shortcuts`` those that let the groups mix too."""
    first = next((name for name, run in observed.items() if run.calls), None)
    total = sum(conv_macs(convs[name], run) for name, run in observed.items())
    reasons = {}
    for name, conv in in_order(convs, observed).items():
        run = observed.get(name)
        why = why_left_alone(name, conv, run, name == first, shared, rules)
        reasons[name] = why or (why_shortcut(conv, run, total, rules) if shortcuts else None)
    return reasons


def _choose(conv: Conv, observed: Observed | None, groups: int, rules: Rules) -> _Choice:
    """Choose the number of groups of a dense conv that nothing else forbids to convert."""
    if groups == 1:
        return _Choice.dense(conv, LeftAlone("not asked for", "no groups asked for", "give it some"))
    pointwise, narrowest = rules.family == GROUPED_POINTWISE, rules.narrowest
    # ONNX Runtime's blocked kernel is for two dimensions; elsewhere no width is special.
    block = rules.block if isinstance(conv, nn.Conv2d) else 1
    sizes = (conv.in_channels, conv.out_channels)
    common = math.gcd(*sizes)
    channels = f"{conv.in_channels} → {conv.out_channels} channels"
    dividing = [count for count in range(2, min(groups, common) + 1) if common % count == 0]
    wide = [count for count in dividing if min(sizes) // count >= narrowest]
    why = _why_no_pair(conv, observed) if pointwise else None
    why = why or (None if wide else _why_no_groups(conv, groups, dividing, narrowest))
    if why is not None:
        return _Choice.dense(conv, why)
    whole = [count for count in wide if all(size // count % block == 0 for size in sizes)]
    chosen = max(whole or wide)
    structure = Structure(groups=chosen, expand=conv.out_channels if pointwise else None)
    if structure.parameters(conv_shape(conv)) >= conv.weight.numel():
        reason = f"{chosen} groups and a pointwise conv would cost more than this conv"
        return _Choice.dense(conv, LeftAlone("costly pair", reason, _PLAIN_GROUPS))
    reasons = []
    if chosen < max(wide):
        reasons.append(f"clamped: only widths that are multiples of {block} run in the fast kernel")
    elif chosen < max(dividing):
        reasons.append(f"clamped: groups narrower than {narrowest} channels are slower")
    elif chosen < groups:
        reasons.append(f"clamped: {groups} groups do not divide {channels}")
    if not whole:
        reasons.append(f"slower kernel: no width is a multiple of {block}")
    return _Choice(structure, "; ".join(reasons) or None)


def _why_no_groups(conv: Conv, groups: int, dividing: list[int], narrowest: int) -> LeftAlone:
    """Say why no number of groups up to the one asked for will do."""
    channels = f"{conv.in_channels} → {conv.out_channels} channels"
    common = math.gcd(conv.in_channels, conv.out_channels)
    if not dividing:
        more = next((count for count in range(groups + 1, common + 1) if common % count == 0), None)
        advice = "" if more is None else f"try {more} groups or more"
        return LeftAlone("not divided", f"no number of groups from 2 to {groups} divides {channels}", advice)
    reason = f"groups narrower than {narrowest} channels are slower; {channels} are too few"
    widest = min(conv.in_channels, conv.out_channels) // dividing[0]
    return LeftAlone("narrow", reason, f"--min-group-width {widest} or less allows groups all the same")


def _why_no_pair(conv: Conv, observed: Observed | None) -> LeftAlone | None:
    """Say why a conv cannot, or should not, become a grouped and a pointwise one."""
    if max(conv.kernel_size) == 1:
        reason = "a 1×1 conv costs less than a grouped conv and a pointwise conv"
        return LeftAlone("pointwise", reason, _PLAIN_GROUPS)
    reasons = (why_not_several(conv), None if observed is None else observed.several_hindrance)
    found = next((reason for reason in reasons if reason is not None), None)
    return None if found is None else LeftAlone("no pair", found, _PLAIN_GROUPS)
