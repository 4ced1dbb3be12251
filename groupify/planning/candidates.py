"""What may become of each conv, and what each of these possibilities costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from groupify.conversion.replaceable import LeftAlone
from groupify.conversion.surgery import conv_shape, why_not_several
from groupify.decomposition.families import Cost, families
from groupify.decomposition.ladder import RATIOS
from groupify.errors import PlanError
from groupify.graph.call import Example, as_call, shape_of
from groupify.graph.plain_layers import Conv
from groupify.models.wrappers import unwrapped
from groupify.planning.group_counts import GroupCounts
from groupify.planning.left_alone import GROUPED_ALREADY, nothing_fits
from groupify.planning.observing import observe
from groupify.planning.rules import Rules
from groupify.planning.sites import find_convs, in_order, site_plan
from groupify.planning.uniform import plan_observed, reasons_to_leave
from groupify.structures import (
    BLOCK_TERM,
    GROUPED,
    GROUPED_POINTWISE,
    INT8,
    Candidate,
    Choices,
    ConvShape,
    Observed,
    Plan,
    Precision,
    SitePlan,
    SiteRecipe,
    Structure,
    Uniform,
)

GROUP_COUNTS = (2, 4, 8, 16, 32, 64)


def candidates(
    model: nn.Module,
    example: Example,
    rules: Rules = Rules(),
    *,
    group_counts: Sequence[int] = GROUP_COUNTS,
) -> Choices:
    """Find what may become of every conv, under the same rules as ``plan``.

    Args:
        model: a dense model; left untouched (one forward pass is run).
        example: (C, H, W) of one image, or how the model is called.
        rules: which convs may be converted and into what. With ``"grouped-pointwise"`` also into its
            extreme, one group for each channel: a depthwise and a pointwise conv. With shuffles, grouped
            convs are considered with one behind them and without.
        group_counts: numbers of groups to consider.

    Raises:
        PlanError: no conv has any choice, or a pattern matches nothing.
        ConversionError: the model does not run on such inputs.
    """
    model = unwrapped(model)
    call = as_call(example, model, batch=1)
    observed = observe(model, call)
    plans, problem = _uniform_plans(model, observed, example, rules, group_counts)
    rules.check_patterns(find_convs(model))
    reasons = reasons_to_leave(model, observed, rules)
    sites = []
    for name, conv in in_order(find_convs(model), observed).items():
        run, every = observed.get(name), [made.site(name) for made in plans.values()]
        options = _options(name, conv, run, every, rules, reasons[name])
        sites.append(tuple(_priced(site, conv, run, rules.precision) for site in options))
    if all(len(options) == 1 for options in sites):
        raise problem or PlanError(nothing_fits([why for why in reasons.values() if why is not None]))
    names = tuple(call.named_tensors(model))
    choices = Choices(
        tuple(sites), {}, observed, shape_of(example), rules.resolved().cpu, rules.precision, example, names,
        rules,
    )  # fmt: skip
    return replace(choices, uniform={key: choices.indices(made) for key, made in plans.items()})


def _uniform_plans(
    model: nn.Module,
    observed: Mapping[str, Observed],
    example: Example,
    rules: Rules,
    group_counts: Sequence[int],
) -> tuple[dict[Uniform, Plan], PlanError | None]:
    """Return the plans with one number of groups, as far as the rules allow them, and why not."""
    plans: dict[Uniform, Plan] = {}
    problem: PlanError | None = None
    for family in (GROUPED, GROUPED_POINTWISE):
        if family not in rules.families:
            continue
        shuffles = ("none", "all") if family == GROUPED and rules.shuffle == "all" else ("none",)
        for groups, shuffle in itertools.product(group_counts, shuffles):
            own = replace(rules, structures=(family,), shuffle=shuffle)
            try:
                made = plan_observed(model, observed, example, groups=GroupCounts.of(groups), rules=own)
            except PlanError as error:
                if problem is None or family == rules.families[0]:  # of plain groups, as many as there may be
                    problem = error
            else:
                plans[Uniform(family, groups, shuffle == "all")] = made
    return plans, problem


def _options(
    name: str,
    conv: Conv,
    run: Observed | None,
    every: Sequence[SitePlan],
    rules: Rules,
    why: LeftAlone | None,
) -> list[SitePlan]:
    """Return what may become of one conv, each once; as it is first.

    Args:
        name: its name.
        conv: the conv.
        run: what a forward pass showed of it.
        every: what the uniform plans make of it.
        rules: what is allowed.
        why: why it is left alone; None where it may be replaced.
    """
    grouped = [site for site in every if site.converted]
    options = list(grouped)
    several = run is not None and run.several_hindrance is None and why_not_several(conv) is None
    block = rules.block if len(conv.kernel_size) == 2 else 1
    # With a limit on the width that is no block of the kernel, one channel per group is too narrow.
    if grouped and several and GROUPED_POINTWISE in rules.families and rules.narrowest <= rules.block:
        options += _depthwise(name, conv, run, block)
    open_to_factors = why is None or why.cause == GROUPED_ALREADY
    if open_to_factors and several and run is not None and BLOCK_TERM in rules.families:
        options += [
            site_plan(conv, SiteRecipe(name, found), run, None) for found in structures(conv, run, rules)
        ]
    reason = why.reason if why is not None else next((site.reason for site in every), None)
    dense = site_plan(conv, SiteRecipe(name, Structure(groups=conv.groups)), run, None if options else reason)
    return list({site.recipe: site for site in reversed([dense, *options])}.values())[::-1]


def structures(conv: Conv, run: Observed, rules: Rules) -> list[Structure]:
    """Return the block-term structures worth a look for a conv."""
    cost = Cost(conv_shape(conv), math.prod(run.input_size), math.prod(run.output_size))
    found = families(cost, rules.cpu_block, rules.narrowest)
    members = [member for family in found for member in family.members(cost, RATIOS)]
    block = rules.block if len(conv.kernel_size) == 2 else 1
    return [member for member in members if _is_fast(member, cost.conv, block)]


def _is_fast(structure: Structure, conv: ConvShape, block: int) -> bool:
    """Whether the convs around the core, which have the groups of the conv, run in a kernel for groups."""
    widths = (conv.in_channels, structure.reduce, structure.expand, conv.out_channels)
    return conv.groups == 1 or all(width // conv.groups % block == 0 for width in widths if width)


def _depthwise(name: str, conv: Conv, run: Observed | None, block: int) -> list[SitePlan]:
    """Return the depthwise and pointwise plan of a k×k conv, where there is one worth having."""
    channels = conv.in_channels
    structure = Structure(None, channels, channels)
    shape = conv_shape(conv)
    fits = channels == conv.out_channels and channels % block == 0
    if not fits or structure.parameters(shape) >= conv.weight.numel():
        return []
    return [site_plan(conv, SiteRecipe(name, structure), run, None)]


def _priced(site: SitePlan, conv: Conv, run: Observed | None, precision: Precision) -> Candidate:
    size = 1 if precision == INT8 else conv.weight.element_size()
    live = 0
    if run is not None:
        ins, outs = math.prod(run.input_size), math.prod(run.output_size)
        reads, writes = site.core_channels
        tensors = [conv.in_channels * ins]
        if site.structure.reduce:  # that of a 1×1 conv takes the stride
            tensors.append(reads * (outs if site.conv.positions == 1 else ins))
        tensors.append(writes * outs)
        if site.structure.expand or site.shuffle:
            tensors.append(conv.out_channels * outs)
        live = size * max(a + b for a, b in itertools.pairwise(tensors))
    return Candidate(site, site.params.grouped * size, live)
