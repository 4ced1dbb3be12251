"""The traceable parts of a model that cannot be traced as a whole, such as a detector's backbone.

A part is a submodule, as large as possible, that can be traced, is given one tensor, and is used as one
piece: nothing inside it runs, or shares parameters with anything, outside of a call of the whole part. So
its channels may be reordered inside without anyone noticing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from groupify.graph.operations import CONVS
from groupify.graph.trace import trace

# Inputs of parts that are kept at the same time.
_MAX_BYTES = 2 * 2**30
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class Part:
    """A traceable part of a model.

    Attributes:
        name: qualified name of the submodule.
        traced: its graph.
        sites: names inside the part of the convs to be converted.
        input_bytes: size of its inputs for one image, float32, over all calls.
    """

    name: str
    traced: fx.GraphModule
    sites: tuple[str, ...]
    input_bytes: int


def find_parts(model: nn.Module, sites: Iterable[str], example: Tensor) -> tuple[Part, ...]:
    """Find the parts of a model in evaluation mode, in the order in which they first run.

    Args:
        model: the model; run on ``example``, perhaps a few times.
        sites: names of the convs to be converted; parts without any are of no interest.
        example: an input.
    """
    wanted = tuple(sites)
    found = list(_descend(model, "", wanted))
    while True:
        watches = _watch(model, [part.name for part in found], example)
        if all(watch.usable for watch in watches.values()):
            order = list(watches)
            found.sort(key=lambda part: order.index(part.name))
            return tuple(
                Part(part.name, part.traced, part.sites, watches[part.name].bytes // max(1, len(example)))
                for part in found
            )
        smaller = []
        for part in found:
            if watches[part.name].usable:
                smaller.append(part)
            else:
                smaller.extend(_children(model, part.name, wanted))
        found = smaller


def part_inputs(
    model: nn.Module, parts: Sequence[Part], batches: Sequence[Tensor]
) -> Iterator[tuple[Part, list[Tensor]]]:
    """Run the model on all batches and give each part with its inputs, one tensor for each call.

    As many parts are watched in one pass as their inputs fit into memory.
    """
    images = sum(len(batch) for batch in batches)
    waiting = list(parts)
    while waiting:
        watched = [waiting.pop(0)]
        room = _MAX_BYTES - watched[0].input_bytes * images
        while waiting and waiting[0].input_bytes * images <= room:
            room -= waiting[0].input_bytes * images
            watched.append(waiting.pop(0))
        inputs: dict[str, list[Tensor]] = {part.name: [] for part in watched}

        def keep(name: str, kept: dict[str, list[Tensor]] = inputs) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if args[0].numel():
                    kept[name].append(args[0].detach().clone())  # what follows may work in place

            return hook

        handles = [
            model.get_submodule(part.name).register_forward_pre_hook(keep(part.name)) for part in watched
        ]
        try:
            with torch.no_grad():
                for batch in batches:
                    model(batch.clone())
        finally:
            for handle in handles:
                handle.remove()
        for part in watched:
            yield part, inputs.pop(part.name)


def given_up(problem: str, parts: Sequence[str], outside: int) -> str:
    """Say in one line what a model that cannot be traced has to do without.

    Args:
        problem: why it cannot be traced.
        parts: names of its traceable parts.
        outside: number of convs outside of them.
    """
    start = f"the model cannot be traced ({problem}): "
    if not parts:
        return (
            f"{start}channels are not clustered, and each conv is fitted on the dense model's inputs, not in "
            "order"
        )
    text = f"{start}channels are clustered, and convs fitted in order, only inside {shown_names(parts)}"
    if outside:
        text += f"; {outside} convs outside are fitted one by one on the dense model's inputs"
    return text


def shown_names(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    some = ", ".join(names[:_NAMES_SHOWN])
    return some if len(names) <= _NAMES_SHOWN else f"{some} and {len(names) - _NAMES_SHOWN} more"


def _children(model: nn.Module, name: str, sites: Sequence[str]) -> Iterator[Part]:
    for child, module in model.get_submodule(name).named_children():
        yield from _descend(model, f"{name}.{child}" if name else child, sites, module)


def _descend(
    model: nn.Module, name: str, sites: Sequence[str], module: nn.Module | None = None
) -> Iterator[Part]:
    """The largest traceable submodules at or below ``name`` with sites that share nothing with the rest."""
    module = model if module is None else module
    inside = tuple(site.removeprefix(f"{name}.") for site in sites if not name or site.startswith(f"{name}."))
    if not inside or isinstance(module, CONVS):
        return
    if name and not _shares(model, module):
        traced = trace(module).module
        if traced is not None and sum(node.op == "placeholder" for node in traced.graph.nodes) == 1:
            yield Part(name, traced, inside, 0)
            return
    yield from _children(model, name, sites)


def _shares(model: nn.Module, part: nn.Module) -> bool:
    """Whether the part has modules or parameters in common with the rest of the model."""
    inside = {id(module) for module in part.modules()}
    outside: set[int] = set()
    stack = [model]
    while stack:  # all that can be reached without going through the part
        module = stack.pop()
        if module is part or id(module) in outside:
            continue
        outside.add(id(module))
        stack.extend(module.children())
    if inside & outside:
        return True
    rest = (module for module in model.modules() if id(module) in outside)
    return bool(_tensors(rest) & _tensors(part.modules()))


def _tensors(modules: Iterable[nn.Module]) -> set[int]:
    return {
        tensor.untyped_storage().data_ptr()
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if tensor.numel()
    }


@dataclass
class _Watch:
    """How a submodule is used in one forward pass of the whole."""

    depth: int = 0
    calls: int = 0
    bytes: int = 0
    usable: bool = True


def _watch(model: nn.Module, names: Sequence[str], example: Tensor) -> dict[str, _Watch]:
    """Run the model once; the submodules in the order in which they first run, those that never do last."""
    watches = {name: _Watch() for name in names}
    order: list[str] = []
    handles = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watch = watches[name]
            if watch.calls == 0:
                order.append(name)
            watch.depth += 1
            watch.calls += 1
            single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            watch.usable &= single and args[0].is_floating_point() and args[0].dim() > 1
            if watch.usable:
                watch.bytes += 4 * args[0].numel()

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            watches[name].depth -= 1

        return hook

    def inner(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            watches[name].usable &= watches[name].depth > 0

        return hook

    for name in names:
        part = model.get_submodule(name)
        handles.append(part.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(part.register_forward_hook(leave(name)))
        for module in part.modules():
            if module is not part and next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_pre_hook(inner(name)))
    try:
        with torch.no_grad():
            model(example.clone())
    finally:
        for handle in handles:
            handle.remove()
    for watch in watches.values():
        watch.usable &= watch.calls > 0
    return {name: watches[name] for name in (*order, *(name for name in names if name not in order))}
