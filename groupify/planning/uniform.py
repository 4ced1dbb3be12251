"""The rules that give each conv its number of groups."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from groupify.errors import GroupifyWarning, PlanError
from groupify.graph.forward import run_once
from groupify.graph.operations import CONVS, Conv, conv_kind
from groupify.graph.trace import example_input
from groupify.planning.limits import check_ready, functional_convs, limits, removal_of_parametrization
from groupify.planning.rules import Rules
from groupify.planning.slow_kernels import latency_warning, leave_slow_sites_dense, with_latency_reasons
from groupify.scores import conv_params
from groupify.structures import DENSE, GROUPED, GROUPED_POINTWISE, Change, Plan, SitePlan, SiteRecipe

# A conv that reads fewer channels than this (the image itself, as a rule) has next to nothing to gain.
_MIN_IN_CHANNELS = 8
# A strided 1×1 conv (the projection of a residual block's shortcut) with less than this share of the MACs
# stays dense: it lets the groups of one stage mix on the way to the next. Converting the demo's two, 1% of
# its MACs, costs 1.6 points of accuracy.
_SHORTCUT_SHARE = 0.01
_EXCLUDED, _NOT_INCLUDED = "excluded", "not included"


@dataclass(frozen=True)
class Observed:
    """What one forward pass shows of a conv.

    Attributes:
        input_size, output_size: spatial sizes at its last call, pixels.
        calls: how often it runs in one forward pass.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    calls: int


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
    kind = rules.kind
    convs = {name: module for name, module in model.named_modules() if isinstance(module, CONVS)}
    if not convs:
        example = example_input(input_shape, like=model)
        functional = "; ".join(("", *functional_convs(model, example)))
        raise PlanError(f"the model has no conv layer, so there is no convolution worth grouping{functional}")
    rules.check_patterns(convs)
    order = [*observed, *(name for name in convs if name not in observed)]
    first = next(iter(observed), None)
    total = sum(_macs(convs[name], conv_run) for name, conv_run in observed.items())
    sites = []
    for name in order:
        conv = convs[name]
        reason = _why_not(name, conv, observed.get(name), name == first, rules)
        if reason is None and not rules.include and _is_cheap_shortcut(conv, observed[name], total):
            reason = (
                f"shortcut with under {_SHORTCUT_SHARE:.0%} of the MACs: lets the groups mix; see --include"
            )
        if reason is None:
            # ONNX Runtime's blocked kernel is for two dimensions; elsewhere no width is special.
            own_block = rules.block if isinstance(conv, nn.Conv2d) else 1
            choice = _choose(conv, groups, kind, rules.narrowest, own_block)
        else:
            choice = _Choice(DENSE, conv.groups, reason)
        sites.append(_site(name, conv, choice, observed.get(name), rules.shuffle))
    result = Plan(tuple(sites), tuple(input_shape), groups, rules.resolved().cpu)
    if not result.converted:
        raise PlanError(_nothing_fits(result, groups, rules.narrowest))
    return leave_slow_sites_dense(result, rules.block) if rules.block > 1 else result


def describe(model: nn.Module, recipes: Sequence[SiteRecipe], input_shape: tuple[int, ...], cpu: str) -> Plan:
    """Return the plan that given replacements of a dense model amount to.

    Args:
        model: the dense model; left untouched (one forward pass is run).
        recipes: what is replaced.
        input_shape: (C, H, W) of one image.
        cpu: the processor that they were planned for.

    Raises:
        ConversionError: the model does not run on that input shape.
    """
    observed = observe(model, example_input(input_shape, like=model))
    replaced = {recipe.name: recipe for recipe in recipes}
    sites = []
    convs = {name: module for name, module in model.named_modules() if isinstance(module, CONVS)}
    for name in (*observed, *(name for name in convs if name not in observed)):
        recipe = replaced.get(name)
        if recipe is None:
            choice, shuffle = _Choice(DENSE, convs[name].groups, "left alone by the recipe"), "none"
        else:
            choice, shuffle = _Choice(recipe.kind, recipe.groups), "all" if recipe.shuffle else "none"
        sites.append(_site(name, convs[name], choice, observed.get(name), shuffle))
    groups = max((recipe.groups for recipe in recipes), default=1)
    return Plan(tuple(sites), tuple(input_shape), groups, cpu)


def _check_groups(groups: int) -> None:
    if groups < 2:
        dense = ", which leaves the model dense" if groups == 1 else ""
        raise PlanError(f"groups is {groups}{dense}; expected at least 2, for example 4")


def observe(model: nn.Module, example: Tensor) -> dict[str, Observed]:
    """Run the model once; the convs in the order in which they run.

    Raises:
        ConversionError: the model is not ready to run, or not on that input shape.
    """
    check_ready(model)
    observed: dict[str, Observed] = {}
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, named: dict[str, Any], output: Tensor) -> None:
            source = inputs[0] if inputs else named["input"]
            calls = observed[name].calls if name in observed else 0
            observed[name] = Observed(tuple(source.shape[2:]), tuple(output.shape[2:]), calls + 1)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CONVS):
            handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
    try:
        run_once(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return observed


def _choose(conv: Conv, groups: int, kind: str, min_group_width: int, block: int) -> _Choice:
    """Choose the number of groups of a dense conv that nothing else forbids to convert."""
    if kind == GROUPED_POINTWISE and max(conv.kernel_size) == 1:
        return _Choice(DENSE, 1, "a 1×1 conv costs less than a grouped conv and a pointwise conv")
    sizes = (conv.in_channels, conv.out_channels)
    common = math.gcd(*sizes)
    channels = f"{conv.in_channels} → {conv.out_channels} channels"
    dividing = [count for count in range(2, min(groups, common) + 1) if common % count == 0]
    if not dividing:
        return _Choice(DENSE, 1, f"no number of groups from 2 to {groups} divides {channels}")
    wide = [count for count in dividing if min(sizes) // count >= min_group_width]
    if not wide:
        return _Choice(
            DENSE, 1, f"groups narrower than {min_group_width} channels are slower; {channels} are too few"
        )
    whole = [count for count in wide if all(size // count % block == 0 for size in sizes)]
    chosen = max(whole or wide)
    if kind == GROUPED_POINTWISE and not _pointwise_is_smaller(conv, chosen):
        return _Choice(DENSE, 1, f"{chosen} groups and a pointwise conv would cost more than this conv")
    reasons = []
    if chosen < max(wide):
        reasons.append(f"clamped: only widths that are multiples of {block} run in the fast kernel")
    elif chosen < max(dividing):
        reasons.append(f"clamped: groups narrower than {min_group_width} channels are slower")
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


def _macs(conv: Conv, observed: Observed) -> int:
    return (
        conv_params(conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups, bias=False)
        * math.prod(observed.output_size)
        * observed.calls
    )


def _is_cheap_shortcut(conv: Conv, observed: Observed, total_macs: int) -> bool:
    strided = max(conv.kernel_size) == 1 and max(conv.stride) > 1
    return strided and _macs(conv, observed) < _SHORTCUT_SHARE * total_macs


def _pointwise_is_smaller(conv: Conv, groups: int) -> bool:
    dense = conv.weight.numel()
    return dense // groups + conv.out_channels**2 < dense


def _site(name: str, conv: Conv, choice: _Choice, observed: Observed | None, shuffle: str) -> SitePlan:
    has_bias = conv.bias is not None
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size)
    before = conv_params(*sizes, conv.groups, has_bias)
    after = conv_params(*sizes, choice.groups, has_bias)
    if choice.kind == GROUPED_POINTWISE:
        after += conv.out_channels**2
    biases = conv.out_channels if has_bias else 0
    outputs = math.prod(observed.output_size) * observed.calls if observed else 0
    return SitePlan(
        name=name,
        kind=choice.kind,
        groups_before=conv.groups,
        groups=choice.groups,
        shuffle=choice.kind == GROUPED and shuffle == "all",
        reason=choice.reason,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        output_size=observed.output_size if observed else (),
        params=Change(before, after),
        macs=Change((before - biases) * outputs, (after - biases) * outputs),
    )


def _nothing_fits(result: Plan, groups: int, min_group_width: int) -> str:
    reasons = Counter(site.reason or "" for site in result.sites)
    # What the user left out by a pattern explains nothing, unless there is nothing else.
    telling = {reason: count for reason, count in reasons.items() if reason not in (_EXCLUDED, _NOT_INCLUDED)}
    common, count = max((telling or reasons).items(), key=lambda item: item[1])
    return (
        f"no convolution worth grouping: {groups} groups of at least {min_group_width} channels fit none of "
        f"the {len(result.sites)} convs; "
        f"most common reason ({count}×): {common}; try fewer groups or a smaller --min-group-width"
    )
