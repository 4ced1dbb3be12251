"""What may become of each conv, and what each of these possibilities costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from groupify.errors import PlanError
from groupify.graph.operations import CONVS, Conv
from groupify.graph.trace import example_input
from groupify.planning.rules import Rules
from groupify.planning.uniform import Observed, observe, plan_observed
from groupify.structures import DENSE, GROUPED, GROUPED_POINTWISE, Change, Plan, SitePlan

GROUP_COUNTS = (2, 4, 8, 16, 32, 64)
# What a plan can be compared with: the same number of groups, of one kind, everywhere.
Uniform = tuple[str, int, bool]  # kind, groups, shuffle


@dataclass(frozen=True)
class Candidate:
    """One thing that may become of one conv.

    Attributes:
        site: the plan of the conv, if it is chosen.
        weight_bytes: bytes of its weights and biases.
        activation_bytes: largest sum of its inputs and outputs that are alive together, for one image.
    """

    site: SitePlan
    weight_bytes: int
    activation_bytes: int

    @property
    def key(self) -> str:
        """A name for it, unique in the model."""
        return f"{self.site.name}:{self.label}"

    @property
    def label(self) -> str:
        """The kind and the number of groups, in one word."""
        if not self.site.converted:
            return DENSE
        return f"{self.site.kind}-{self.site.groups}" + ("-shuffle" if self.site.shuffle else "")


@dataclass(frozen=True)
class Choices:
    """The possibilities of every conv of a model, in the order in which they run.

    Attributes:
        sites: for each conv its candidates; the first leaves it as it is.
        uniform: plans with one number of groups everywhere, as the index of each conv's candidate.
        observed: what a forward pass showed of each conv, by name.
        input_shape: (C, H, W) that the costs are for.
        cpu: the processor that they are for.
    """

    sites: tuple[tuple[Candidate, ...], ...]
    uniform: dict[Uniform, tuple[int, ...]]
    observed: dict[str, Observed]
    input_shape: tuple[int, ...]
    cpu: str

    def plan(self, chosen: Sequence[int]) -> Plan:
        """Return the plan that takes the candidate of each given index."""
        sites = tuple(options[index].site for options, index in zip(self.sites, chosen, strict=True))
        groups = max((site.groups for site in sites if site.converted), default=1)
        return Plan(sites, self.input_shape, groups, self.cpu)

    def indices(self, plan: Plan) -> tuple[int, ...]:
        """Return the index of each conv's candidate in a plan that is made of them.

        Raises:
            PlanError: the plan does something that is no candidate.
        """
        wanted = {site.name: (site.kind, site.groups, site.shuffle) for site in plan.sites}
        found = []
        for options in self.sites:
            name = options[0].site.name
            for index, option in enumerate(options):
                if (option.site.kind, option.site.groups, option.site.shuffle) == wanted.get(name):
                    found.append(index)
                    break
            else:
                raise PlanError(f"{name!r}: the plan holds no candidate of it; plan with the same options")
        return tuple(found)


def candidates(
    model: nn.Module,
    input_shape: tuple[int, ...],
    rules: Rules = Rules(),
    *,
    group_counts: Sequence[int] = GROUP_COUNTS,
) -> Choices:
    """Find what may become of every conv, under the same rules as ``plan``.

    Args:
        model: a dense model; left untouched (one forward pass is run).
        input_shape: (C, H, W) of one image.
        rules: which convs may be converted and into what. With ``"grouped-pointwise"`` also into its
            extreme, one group for each channel: a depthwise and a pointwise conv. With shuffles, grouped
            convs are considered with one behind them and without.
        group_counts: numbers of groups to consider.

    Raises:
        PlanError: no conv has any choice, or a pattern matches nothing.
        ConversionError: the model does not run on that input shape.
    """
    observed = observe(model, example_input(input_shape, like=model))
    wanted: list[Uniform] = [
        (kind, count, shuffled)
        for kind in rules.kinds
        for count in group_counts
        for shuffled in ((False, True) if kind == GROUPED and rules.shuffle == "all" else (False,))
    ]
    plans: dict[Uniform, Plan] = {}
    problem: PlanError | None = None
    for kind, count, shuffled in wanted:
        try:
            own = replace(rules, structures=(kind,), shuffle="all" if shuffled else "none")
            plans[kind, count, shuffled] = plan_observed(
                model, observed, input_shape, groups=count, rules=own
            )
        except PlanError as error:
            problem = error
    if not plans:
        assert problem is not None, "no kinds or no numbers of groups"
        raise problem
    convs = {name: module for name, module in model.named_modules() if isinstance(module, CONVS)}
    names = [site.name for site in next(iter(plans.values())).sites]
    sites: list[tuple[Candidate, ...]] = []
    for number, name in enumerate(names):
        every = [made.sites[number] for made in plans.values()]
        options = [_dense(every)]
        options += [site for site in every if site.converted]
        narrow = GROUPED_POINTWISE in rules.kinds and rules.narrowest <= rules.block
        if narrow and any(site.converted for site in every):
            block = rules.block if len(convs[name].kernel_size) == 2 else 1
            options += _depthwise(every[0], convs[name], block)
        ordered: dict[Uniform, SitePlan] = {}
        for site in options:
            ordered.setdefault((site.kind, site.groups, site.shuffle), site)
        sites.append(tuple(_priced(site, convs[name], observed.get(name)) for site in ordered.values()))
    choices = Choices(tuple(sites), {}, observed, tuple(input_shape), rules.resolved().cpu)
    uniform = {key: choices.indices(made) for key, made in plans.items()}
    return replace(choices, uniform=uniform)


def _dense(every: Sequence[SitePlan]) -> SitePlan:
    """Return the plan of a conv that is left as it is."""
    for site in every:
        if not site.converted:
            return site if not any(s.converted for s in every) else replace(site, reason=None)
    site = every[0]
    return replace(
        site,
        kind=DENSE,
        groups=site.groups_before,
        shuffle=False,
        reason=None,
        params=Change(site.params.dense, site.params.dense),
        macs=Change(site.macs.dense, site.macs.dense),
    )


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
