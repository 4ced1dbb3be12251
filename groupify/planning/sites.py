"""The convs of a model: what one run shows of them, and what a replacement of them costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from groupify.graph.forward import run_once
from groupify.graph.operations import CONVS, Conv
from groupify.graph.trace import example_input
from groupify.planning.limits import check_ready
from groupify.scores import conv_params
from groupify.structures import DENSE, GROUPED_POINTWISE, Change, Observed, Plan, SitePlan, SiteRecipe


def find_convs(model: nn.Module) -> dict[str, Conv]:
    """Return the convs of a model by their qualified names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVS)}


def in_order(convs: Mapping[str, Conv], observed: Mapping[str, Observed]) -> dict[str, Conv]:
    """Return convs in the order in which they run; those that never run come last."""
    return {name: convs[name] for name in dict.fromkeys((*observed, *convs))}


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


def conv_macs(conv: Conv, observed: Observed) -> int:
    """Multiply-accumulates of a conv for one image, over all its calls."""
    return (
        conv_params(conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups, bias=False)
        * math.prod(observed.output_size)
        * observed.calls
    )


def site_plan(conv: Conv, recipe: SiteRecipe, run: Observed | None, reason: str | None) -> SitePlan:
    """Return what a replacement of a conv, dense or grouped, amounts to."""
    has_bias = conv.bias is not None
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size)
    before = conv_params(*sizes, conv.groups, has_bias)
    after = conv_params(*sizes, recipe.groups, has_bias)
    if recipe.kind == GROUPED_POINTWISE:
        after += conv.out_channels**2
    biases = conv.out_channels if has_bias else 0
    outputs = math.prod(run.output_size) * run.calls if run else 0
    return SitePlan(
        name=recipe.name,
        kind=recipe.kind,
        groups_before=conv.groups,
        groups=recipe.groups,
        shuffle=recipe.shuffle,
        reason=reason,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        output_size=run.output_size if run else (),
        params=Change(before, after),
        macs=Change((before - biases) * outputs, (after - biases) * outputs),
    )


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
    for name, conv in in_order(find_convs(model), observed).items():
        recipe, reason = replaced.get(name), None
        if recipe is None:
            recipe, reason = SiteRecipe(name, DENSE, conv.groups), "left alone by the recipe"
        sites.append(site_plan(conv, recipe, observed.get(name), reason))
    groups = max((recipe.groups for recipe in recipes), default=1)
    return Plan(tuple(sites), tuple(input_shape), groups, cpu)
