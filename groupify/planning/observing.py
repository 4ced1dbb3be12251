"""What one forward pass of a model shows of its convs: sizes, calls, and what forbids to replace one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from groupify.errors import ConversionError
from groupify.graph.call import Call
from groupify.graph.forward import run_once
from groupify.graph.plain_layers import CONVS, Conv
from groupify.structures import Observed

_CONV_FUNCTIONS = ("conv1d", "conv2d", "conv3d")
# What a grouped weight answers as the dense one does.
_SAME_ANSWERS = {
    getattr(Tensor, name).__get__
    for name in ("dtype", "device", "requires_grad", "is_cuda", "is_meta", "layout", "ndim", "is_leaf")
} | {
    Tensor.dim, Tensor.ndimension, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size,
    Tensor.get_device, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full,
    Tensor.new_tensor, torch.is_floating_point, torch.is_complex,
}  # fmt: skip
# As far as the weight is not what is converted.
_LIKE = {Tensor.to, Tensor.type_as}


def observe(model: nn.Module, example: Call | Tensor) -> dict[str, Observed]:
    """Run the model once; the convs in the order in which they run.

    Raises:
        ConversionError: the model is not ready to run, or not on such inputs.
    """
    return _watched(model, example).observed


def functional_convs(model: nn.Module, example: Call | Tensor) -> tuple[str, ...]:
    """Return one line for each module that calls a conv function itself: there is no layer to replace."""
    return tuple(
        f"{name or 'the model itself'} calls F.{function} with a weight of shape {shape} ({calls}×): "
        f"not convertible, since there is no layer to replace; make it an nn.Conv{function[-2:]}, "
        "registered as a submodule"
        for (name, function, shape), calls in _watched(model, example).functional.items()
    )


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


def _watched(model: nn.Module, example: Call | Tensor) -> _Watch:
    check_ready(model)
    watch = _Watch(model)
    handles = [handle for name, module in model.named_modules() for handle in watch.hooks(name, module)]
    try:
        with watch:
            run_once(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return watch


@dataclass(frozen=True)
class _Running:
    """A module that has been called and has not returned."""

    name: str
    module: nn.Module | None


class _Watch(TorchFunctionMode):
    """Notes the calls of the convs, what hooks do to them, and who else reads their weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.observed: dict[str, Observed] = {}
        self.functional: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
        self._running = [_Running("", None)]
        self._before: list[_Values] = []
        self._owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
        for name, module in model.named_modules():
            for kind in ("weight", "bias") if isinstance(module, CONVS) else ():
                tensor = module._parameters.get(kind)
                if tensor is not None:
                    self._owners.setdefault(id(tensor), []).append((name, kind, module))

    def hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Register what watches a module; around the hooks that it has, if it is a conv."""
        if not isinstance(module, CONVS):
            yield module.register_forward_pre_hook(self._enter(name), prepend=True)
            yield module.register_forward_hook(self._leave, always_call=True)
            return
        yield module.register_forward_pre_hook(self._called, prepend=True, with_kwargs=True)
        yield module.register_forward_pre_hook(self._starts(name), with_kwargs=True)
        yield module.register_forward_hook(self._ends(name), prepend=True, with_kwargs=True, always_call=True)
        yield module.register_forward_hook(self._returns(name))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one call of a function of torch, and make it."""
        kwargs = kwargs or {}
        function = getattr(func, "__name__", "")
        running = self._running[-1]
        if function in _CONV_FUNCTIONS and not isinstance(running.module, nn.modules.conv._ConvNd):
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
            self.functional[running.name, function, shape] += 1
        if self._owners:
            self._look_for_weights(func, args, kwargs, running)
        return func(*args, **kwargs)

    def _look_for_weights(self, func: Any, args: Any, kwargs: dict[str, Any], running: _Running) -> None:
        for place, value in enumerate((*args, *kwargs.values())):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                owners = self._owners.get(id(item), ())
                if any(module is running.module for _, _, module in owners):
                    continue
                harmless = func in _SAME_ANSWERS or (place > 0 and func in _LIKE)
                for name, kind, _ in owners:
                    what = (
                        f"its {kind} is used outside of its own call, in {running.name or 'the model itself'}"
                    )
                    self._note(name, *((None, what) if harmless else (what, None)))

    def _note(self, name: str, hindrance: str | None, several_hindrance: str | None = None) -> None:
        """Keep the first reason not to replace a conv, or not by two."""
        known = self.observed.get(name, Observed((), (), 0))
        self.observed[name] = replace(
            known,
            hindrance=known.hindrance or hindrance,
            several_hindrance=known.several_hindrance or several_hindrance,
        )

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._running.append(_Running(name, module))

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _called(self, conv: Conv, args: Any, kwargs: Any) -> None:
        """A conv is called; its own pre-hooks come next."""
        self._before.append(_Values((args, kwargs)))

    def _starts(self, name: str) -> Callable[..., None]:
        """Behind the pre-hooks."""

        def hook(conv: Conv, args: Any, kwargs: Any) -> None:
            if self._before.pop() != _Values((args, kwargs)):
                self._note(name, "a forward pre-hook changes its input")
            self._running.append(_Running(name, conv))

        return hook

    def _ends(self, name: str) -> Callable[..., None]:
        """In front of the forward hooks."""

        def hook(conv: Conv, args: Any, kwargs: Any, output: Any) -> None:
            self._running.pop()
            self._before.append(_Values(output))
            if isinstance(output, Tensor):
                source = args[0] if args else kwargs["input"]
                known = self.observed.get(name, Observed((), (), 0))
                sizes = (tuple(source.shape[2:]), tuple(output.shape[2:]))
                self.observed[name] = replace(
                    known, input_size=sizes[0], output_size=sizes[1], calls=known.calls + 1
                )

        return hook

    def _returns(self, name: str) -> Callable[..., None]:
        def hook(conv: Conv, args: Any, output: Any) -> None:
            if self._before.pop() != _Values(output):
                self._note(name, "a forward hook changes its output")

        return hook


class _Values:
    """Tensors, and whether they are still the same ones with the same values in them."""

    def __init__(self, values: Any) -> None:
        self._tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        # An inference tensor does not count what is done to it.
        self._versions = [0 if tensor.is_inference() else tensor._version for tensor in self._tensors]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Values)
            and list(map(id, self._tensors)) == list(map(id, other._tensors))
            and self._versions == other._versions
        )

    __hash__ = None  # type: ignore[assignment]
