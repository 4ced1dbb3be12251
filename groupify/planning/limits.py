"""What a plan cannot do for a model, found by running and tracing it once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from groupify.errors import ConversionError
from groupify.graph.forward import evaluating, run_once
from groupify.graph.parts import find_parts, given_up
from groupify.graph.trace import trace

_CONV_FUNCTIONS = ("conv1d", "conv2d", "conv3d")


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
