"""The rules that give each conv its number of groups."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from groupify.conversion.surgery import GROUPED, GROUPED_POINTWISE, KINDS, SiteRecipe
from groupify.errors import PlanError, near_names
from groupify.graph.trace import example_input
from groupify.planning.cost import Change, conv_params, run_once
from groupify.planning.plan import DENSE, Plan, SitePlan

SHUFFLES = ("none", "all")

# A conv that reads fewer channels than this (the image itself, as a rule) has next to nothing to gain.
_MIN_IN_CHANNELS = 8


@dataclass(frozen=True)
class _Observed:
    """What one forward pass shows of a conv."""

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
    kind: str = GROUPED,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_group_width: int = 1,
    shuffle: str = "none",
) -> Plan:
    """Decide for every ``Conv2d`` of a model how many groups it gets.

    Args:
        model: a dense model; left untouched (one forward pass is run).
        input_shape: (C, H, W) of one image.
        groups: number of groups to aim at; a conv whose channels it does not divide gets the largest
            smaller number that does.
        kind: ``"grouped"``, or ``"grouped-pointwise"`` (a grouped conv and a dense 1×1 conv).
        include: glob patterns of names; only those are converted.
        exclude: glob patterns of names that are left alone.
        min_group_width: smallest number of channels per group.
        shuffle: ``"none"``, or ``"all"`` for a channel shuffle behind every converted conv.

    Raises:
        PlanError: ``groups`` fits no conv, a pattern matches nothing, or an option is out of range.
        ConversionError: the model does not run on that input shape.
    """
    _check_options(groups, kind, min_group_width, shuffle)
    observed = _observe(model, example_input(input_shape, like=model))
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if not convs:
        raise PlanError("the model has no Conv2d, so there is no convolution worth grouping")
    _check_patterns((*include, *exclude), convs)
    order = [*observed, *(name for name in convs if name not in observed)]
    first = next(iter(observed), None)
    sites = []
    for name in order:
        conv = convs[name]
        choice = _choose(
            name, conv, observed.get(name), name == first, groups, kind, include, exclude, min_group_width
        )
        sites.append(_site(name, conv, choice, observed.get(name), shuffle))
    result = Plan(tuple(sites), tuple(input_shape), groups)
    if not result.converted:
        raise PlanError(_nothing_fits(result, groups, min_group_width))
    return result


def describe(model: nn.Module, recipes: Sequence[SiteRecipe], input_shape: tuple[int, ...]) -> Plan:
    """Return the plan that given replacements of a dense model amount to.

    Args:
        model: the dense model; left untouched (one forward pass is run).
        recipes: what is replaced.
        input_shape: (C, H, W) of one image.

    Raises:
        ConversionError: the model does not run on that input shape.
    """
    observed = _observe(model, example_input(input_shape, like=model))
    replaced = {recipe.name: recipe for recipe in recipes}
    sites = []
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name in (*observed, *(name for name in convs if name not in observed)):
        recipe = replaced.get(name)
        if recipe is None:
            choice, shuffle = _Choice(DENSE, convs[name].groups, "left alone by the recipe"), "none"
        else:
            choice, shuffle = _Choice(recipe.kind, recipe.groups), "all" if recipe.shuffle else "none"
        sites.append(_site(name, convs[name], choice, observed.get(name), shuffle))
    return Plan(tuple(sites), tuple(input_shape), max((recipe.groups for recipe in recipes), default=1))


def _check_options(groups: int, kind: str, min_group_width: int, shuffle: str) -> None:
    if groups < 1:
        raise PlanError(f"groups is {groups}, expected at least 2, for example 4")
    if groups == 1:
        raise PlanError("groups is 1, which leaves the model dense; expected at least 2, for example 4")
    if kind not in KINDS:
        raise PlanError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}{near_names(kind, KINDS)}")
    if min_group_width < 1:
        raise PlanError(f"min_group_width is {min_group_width}, expected at least 1 channel")
    if shuffle not in SHUFFLES:
        raise PlanError(f"unknown shuffle {shuffle!r}, expected one of {', '.join(SHUFFLES)}")
    if shuffle != "none" and kind == GROUPED_POINTWISE:
        raise PlanError(
            "shuffle with kind 'grouped-pointwise': the pointwise conv mixes the groups already; leave it"
        )


def _check_patterns(patterns: Sequence[str], names: dict[str, Any]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise PlanError(
                f"pattern {pattern!r} matches no Conv2d of the model"
                f"{near_names(pattern.strip('*'), names) or '; for example ' + repr(next(iter(names)))}"
            )


def _observe(model: nn.Module, example: Tensor) -> dict[str, _Observed]:
    """Run the model once; the convs in the order in which they run."""
    observed: dict[str, _Observed] = {}
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            calls = observed[name].calls if name in observed else 0
            observed[name] = _Observed(tuple(output.shape[2:]), calls + 1)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(watch(name)))
    try:
        run_once(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return observed


def _choose(
    name: str,
    conv: nn.Conv2d,
    observed: _Observed | None,
    is_first: bool,
    groups: int,
    kind: str,
    include: Sequence[str],
    exclude: Sequence[str],
    min_group_width: int,
) -> _Choice:
    reason = _why_not(name, conv, observed, is_first, include, exclude)
    if reason is not None:
        return _Choice(DENSE, conv.groups, reason)
    if kind == GROUPED_POINTWISE and max(conv.kernel_size) == 1:
        return _Choice(DENSE, 1, "a 1×1 conv costs less than a grouped conv and a pointwise conv")
    common = math.gcd(conv.in_channels, conv.out_channels)
    divisor = max(d for d in range(1, groups + 1) if common % d == 0)
    allowed = max(
        d
        for d in range(1, divisor + 1)
        if common % d == 0 and (d == 1 or min(conv.in_channels, conv.out_channels) // d >= min_group_width)
    )
    channels = f"{conv.in_channels} → {conv.out_channels} channels"
    if divisor == 1:
        return _Choice(DENSE, 1, f"no number of groups from 2 to {groups} divides {channels}")
    if allowed == 1:
        return _Choice(
            DENSE, 1, f"groups of fewer than {min_group_width} channels are slower; {channels} are too few"
        )
    if kind == GROUPED_POINTWISE and not _pointwise_is_smaller(conv, allowed):
        return _Choice(DENSE, 1, f"{allowed} groups and a pointwise conv would cost more than this conv")
    if allowed < divisor:
        return _Choice(
            kind,
            allowed,
            f"clamped from {divisor} groups: groups of fewer than {min_group_width} channels are slower",
        )
    if divisor < groups:
        return _Choice(kind, divisor, f"clamped: {groups} groups do not divide {channels}")
    return _Choice(kind, groups)


def _why_not(
    name: str,
    conv: nn.Conv2d,
    observed: _Observed | None,
    is_first: bool,
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    """Say why a conv is left alone whatever the number of groups, or return None."""
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    if is_parametrized(conv):
        return "its weight is parametrized (weight or spectral norm); remove the parametrization first"
    if type(conv) is not nn.Conv2d:
        return f"a subclass of Conv2d ({type(conv).__name__}), whose forward may differ"
    if observed is None:
        return "never runs in inference"
    if conv.groups > 1:
        return (
            "depthwise already"
            if conv.groups == conv.in_channels
            else f"grouped already ({conv.groups} groups)"
        )
    if is_first or conv.in_channels < _MIN_IN_CHANNELS:
        return f"{'first conv: ' if is_first else ''}too few input channels ({conv.in_channels})"
    return None


def _pointwise_is_smaller(conv: nn.Conv2d, groups: int) -> bool:
    dense = conv.weight.numel()
    return dense // groups + conv.out_channels**2 < dense


def _site(name: str, conv: nn.Conv2d, choice: _Choice, observed: _Observed | None, shuffle: str) -> SitePlan:
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
    reasons: dict[str, int] = {}
    for site in result.sites:
        reasons[site.reason or ""] = reasons.get(site.reason or "", 0) + 1
    common, count = max(reasons.items(), key=lambda item: item[1])
    return (
        f"{groups} groups of at least {min_group_width} channels fit none of the {len(result.sites)} convs; "
        f"most common reason ({count}×): {common}; see 'groupify plan'"
    )
