"""What may become of each conv, and what each of these possibilities costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from groupify.conversion.surgery import why_no_pair
from groupify.errors import PlanError
from groupify.graph.call import Example, as_call, shape_of
from groupify.graph.plain_layers import Conv
from groupify.models.wrappers import unwrapped
from groupify.planning.observing import observe
from groupify.planning.rules import Rules
from groupify.planning.sites import find_convs
from groupify.planning.uniform import plan_observed
from groupify.structures import (
    GROUPED,
    GROUPED_POINTWISE,
    Candidate,
    Change,
    Choices,
    Observed,
    Plan,
    SitePlan,
    SiteRecipe,
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
    plans = _uniform_plans(model, observed, example, rules, group_counts)
    convs = find_convs(model)
    sites = []
    for every in zip(*(made.sites for made in plans.values()), strict=True):
        name = every[0].name
        run = observed.get(name)
        pairs = run is None or run.pair_hindrance is None
        options = _options(every, convs[name], rules, pairs=pairs and why_no_pair(convs[name]) is None)
        sites.append(tuple(_priced(site, convs[name], run) for site in options))
    names = tuple(call.named_tensors(model))
    cpu = rules.resolved().cpu
    choices = Choices(tuple(sites), {}, observed, shape_of(example), cpu, example, names)
    return replace(choices, uniform={key: choices.indices(made) for key, made in plans.items()})


def _uniform_plans(
    model: nn.Module,
    observed: Mapping[str, Observed],
    example: Example,
    rules: Rules,
    group_counts: Sequence[int],
) -> dict[Uniform, Plan]:
    """Return the plans with one number of groups, as far as the rules allow them."""
    plans: dict[Uniform, Plan] = {}
    problem: PlanError | None = None
    for kind in rules.kinds:
        shuffles = ("none", "all") if kind == GROUPED and rules.shuffle == "all" else ("none",)
        for groups, shuffle in itertools.product(group_counts, shuffles):
            own = replace(rules, structures=(kind,), shuffle=shuffle)
            try:
                made = plan_observed(model, observed, example, groups=groups, rules=own)
            except PlanError as error:
                if problem is None or kind == rules.kinds[0]:  # of plain groups, as many as there may be
                    problem = error
            else:
                plans[Uniform(kind, groups, shuffle == "all")] = made
    if not plans:
        assert problem is not None, "no kinds or no numbers of groups"
        raise problem
    return plans


def _options(every: Sequence[SitePlan], conv: Conv, rules: Rules, *, pairs: bool) -> list[SitePlan]:
    """Return what may become of one conv, each once; dense first. ``pairs``: whether it may become two."""
    grouped = [site for site in every if site.converted]
    if not grouped:
        return [every[0]]
    options = [every[0].left_dense(None), *grouped]
    # With a limit on the width that is no block of the kernel, one channel per group is too narrow.
    if pairs and GROUPED_POINTWISE in rules.kinds and rules.narrowest <= rules.block:
        options += _depthwise(every[0], conv, rules.block if len(conv.kernel_size) == 2 else 1)
    distinct: dict[SiteRecipe, SitePlan] = {}
    for site in options:
        distinct.setdefault(site.recipe, site)
    return list(distinct.values())


def _depthwise(site: SitePlan, conv: Conv, block: int) -> list[SitePlan]:
    """Return the depthwise and pointwise plan of a k×k conv, where there is one worth having."""
    channels = conv.in_channels
    weights = channels * math.prod(conv.kernel_size) + channels**2
    if channels != conv.out_channels or channels % block or weights >= conv.weight.numel():
        return []
    biases = channels if conv.bias is not None else 0
    outputs = site.macs.dense // (site.params.dense - biases)
    return [
        replace(
            site,
            kind=GROUPED_POINTWISE,
            groups=channels,
            shuffle=False,
            reason=None,
            params=Change(site.params.dense, weights + biases),
            macs=Change(site.macs.dense, weights * outputs),
        )
    ]


def _priced(site: SitePlan, conv: Conv, run: Observed | None) -> Candidate:
    size = conv.weight.element_size()
    live = 0
    if run is not None:
        inputs = conv.in_channels * math.prod(run.input_size) * size
        outputs = conv.out_channels * math.prod(run.output_size) * size
        between = site.kind == GROUPED_POINTWISE or site.shuffle  # a second tensor of the output's size
        live = max(inputs + outputs, 2 * outputs if between else 0)
    return Candidate(site, site.params.grouped * size, live)
