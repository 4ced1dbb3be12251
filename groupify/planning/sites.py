"""What running and tracing a model once shows: its convs, what replacing them costs, and what hinders it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from groupify.errors import ConversionError
from groupify.graph.forward import evaluating, run_once
from groupify.graph.operations import CONVS, Conv
from groupify.graph.parts import find_parts, given_up
from groupify.graph.trace import example_input, trace
from groupify.scores import conv_params
from groupify.structures import DENSE, GROUPED_POINTWISE, Change, Observed, Plan, SitePlan, SiteRecipe

_CONV_FUNCTIONS = ("conv1d", "conv2d", "conv3d")


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


def limits(model: nn.Module, sites: Sequence[str], example: Tensor) -> tuple[str, ...]:
    """Return one line for each thing that a conversion of ``sites`` has to do without.

    Args:
        model: the dense model; left untouched.
        sites: names of the convs to be converted.
        example: an input.
    """
    notes = functional_convs(model, example)
    traced = trace(model)
    if traced.module is None:
        with evaluating(model):
            parts = find_parts(model, sites, example)
        inside = sum(len(part.sites) for part in parts)
        names = [part.name for part in parts]
        notes = (*notes, given_up(traced.problem or "", names, len(sites) - inside))
    return notes


def check_ready(model: nn.Module) -> None:
    """Refuse a model whose layers do not know their sizes yet, since running it would change it.

    Raises:
        ConversionError: names the first such layer.
    """
    for name, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise ConversionError(
                f"layer {name!r} is a {type(module).__name__} that does not know its sizes yet: run the "
                "model once on an input, then convert it"
            )


def removal_of_parametrization(conv: nn.Module) -> str:
    """Return the call that makes the weight of a conv a plain parameter again."""
    if is_parametrized(conv):
        return "call torch.nn.utils.parametrize.remove_parametrizations(conv, 'weight')"
    if hasattr(conv, "weight_g"):
        return "call torch.nn.utils.remove_weight_norm(conv)"
    if hasattr(conv, "weight_u"):
        return "call torch.nn.utils.remove_spectral_norm(conv)"
    return "make it a plain parameter"


def functional_convs(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Return one line for each module that calls a conv function itself: there is no layer to replace."""
    watch = _FunctionWatch()
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(watch.enter(name, module)))
        handles.append(module.register_forward_hook(watch.leave, always_call=True))
    try:
        with watch:
            run_once(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(
        f"{name or 'the model itself'} calls F.{function} with a weight of shape {shape} ({calls}×): "
        f"not convertible, since there is no layer to replace; make it an nn.Conv{function[-2:]}, "
        "registered as a submodule"
        for (name, function, shape), calls in watch.found.items()
    )


class _FunctionWatch(TorchFunctionMode):
    """Notes the conv functions that no conv layer has called, and the module that was running."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
        self._running: list[tuple[str, nn.Module | None]] = [("", None)]

    def enter(self, name: str, module: nn.Module) -> Any:
        """Return the hook for the start of a module."""

        def hook(_: nn.Module, args: Any) -> None:
            self._running.append((name, module))

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """End a module."""
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = getattr(func, "__name__", "")
        name, module = self._running[-1]
        if function in _CONV_FUNCTIONS and not isinstance(module, nn.modules.conv._ConvNd):
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            self.found[name, function, tuple(weight.shape) if isinstance(weight, Tensor) else ()] += 1
        return func(*args, **(kwargs or {}))
