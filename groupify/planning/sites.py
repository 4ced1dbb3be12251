"""What running and capturing a model once shows: its convs, what replacing them costs, what hinders it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from groupify.conversion.surgery import conv_shape
from groupify.errors import ConversionError
from groupify.graph.call import Call, Example, as_call, shape_of
from groupify.graph.capture import Captured, capture
from groupify.graph.channels import channel_classes
from groupify.graph.forward import evaluating
from groupify.graph.kept_graph import KeptGraph
from groupify.graph.parts import find_parts, given_up
from groupify.graph.plain_layers import CONVS, Conv
from groupify.models.wrappers import unseen_layers, unwrapped
from groupify.planning.observing import functional_convs, observe
from groupify.scores import conv_params
from groupify.structures import Change, Observed, Plan, SitePlan, SiteRecipe, Structure


def find_convs(model: nn.Module) -> dict[str, Conv]:
    """Return the convs of a model by their qualified names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVS)}


def in_order(convs: Mapping[str, Conv], observed: Mapping[str, Observed]) -> dict[str, Conv]:
    """Return convs in the order in which they run; those that never run come last."""
    return {name: convs[name] for name in dict.fromkeys((*observed, *convs))}


def conv_macs(conv: Conv, observed: Observed) -> int:
    """Multiply-accumulates of a conv for one image, over all its calls."""
    return (
        conv_params(conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups, bias=False)
        * math.prod(observed.output_size)
        * observed.calls
    )


def site_plan(conv: Conv, recipe: SiteRecipe, run: Observed | None, reason: str | None) -> SitePlan:
    """Return what a replacement of a conv, or the conv as it is, amounts to.

    Raises:
        PlanError: the structure does not suit the conv.
    """
    shape, dense = conv_shape(conv), Structure(groups=conv.groups)
    recipe.structure.check(shape)
    pixels = (math.prod(run.input_size), math.prod(run.output_size)) if run else (0, 0)
    calls = run.calls if run else 0
    before, after = (
        (structure.parameters(shape, bias=conv.bias is not None), structure.macs(shape, *pixels) * calls)
        for structure in (dense, recipe.structure)
    )
    return SitePlan(
        name=recipe.name,
        groups_before=conv.groups,
        structure=recipe.structure,
        shuffle=recipe.shuffle,
        reason=reason,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        output_size=run.output_size if run else (),
        params=Change(before[0], after[0]),
        macs=Change(before[1], after[1]),
    )


def describe(model: nn.Module, recipes: Sequence[SiteRecipe], example: Example, cpu: str) -> Plan:
    """Return the plan that given replacements of a dense model amount to.

    Args:
        model: the dense model; left untouched (one forward pass is run).
        recipes: what is replaced.
        example: (C, H, W) of one image, or how the model is called.
        cpu: the processor that they were planned for.

    Raises:
        ConversionError: the model does not run on such inputs, or does more with a conv than call it.
    """
    model = unwrapped(model)
    call = as_call(example, model, batch=1)
    observed = observe(model, call)
    replaced = {recipe.name: recipe for recipe in recipes}
    sites = []
    for name, conv in in_order(find_convs(model), observed).items():
        recipe, reason = replaced.get(name), None
        if recipe is None:
            recipe, reason = SiteRecipe(name, Structure(groups=conv.groups)), "left alone by the recipe"
        else:
            _refuse_hindered(recipe, observed.get(name))
        sites.append(site_plan(conv, recipe, observed.get(name), reason))
    groups = max((recipe.groups for recipe in recipes), default=1)
    return Plan(tuple(sites), shape_of(example), groups, cpu, inputs=tuple(call.named_tensors(model)))


def _refuse_hindered(recipe: SiteRecipe, run: Observed | None) -> None:
    if run is None:
        return
    hindrance = run.hindrance or (None if recipe.structure.is_one_conv else run.several_hindrance)
    if hindrance is not None:
        raise ConversionError(f"layer {recipe.name!r} cannot be replaced as planned: {hindrance}")


@dataclass(frozen=True)
class Limits:
    """What a conversion has to do without.

    Attributes:
        notes: one line for each such thing.
        captured: the graph that shows it, for the conversion itself; None where there is none to be kept.
    """

    notes: tuple[str, ...]
    captured: KeptGraph | None


def limits(model: nn.Module, sites: Sequence[str], example: Call, captured: Captured | None = None) -> Limits:
    """Find out what a conversion of ``sites`` has to do without.

    Args:
        model: the dense model; left untouched.
        sites: names of the convs to be converted.
        example: how it is called, with two examples: a batch of one would be a case of its own.
        captured: what capturing its graph found; None = capture it.
    """
    notes = (*unseen_layers(model), *functional_convs(model, example))
    captured = captured or capture(model, example)
    if captured.graph is not None:
        channels = channel_classes(captured.graph, example)
        if channels.pinned_by:
            notes = (*notes, f"channels that {', '.join(channels.pinned_by)} reads keep their order")
        return Limits(notes, KeptGraph.of(captured.graph, channels, example))
    with evaluating(model):
        parts = find_parts(model, sites, example)
    inside = sum(len(part.sites) for part in parts)
    names = [part.name for part in parts]
    return Limits((*notes, given_up(captured.problem or "", names, len(sites) - inside)), None)
