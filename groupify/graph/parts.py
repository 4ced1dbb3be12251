"""The parts of a model that can be captured where the whole cannot be, such as a detector's backbone.

A part is a submodule, as large as possible, that can be exported by itself, and is used as one
piece: nothing inside it runs, or shares parameters with anything, outside of a call of the whole part. So
its channels may be reordered inside without anyone noticing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.model_graph import ModelGraph
from groupify.graph.plain_layers import CONVS
from groupify.graph.prepared import KeptCalls, batch_sizes
from groupify.kept import Shelf

# Inputs of parts that are kept at the same time.
_MAX_BYTES = 2 * 2**30
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        name: qualified name of the submodule.
        graph: its graph.
        sites: names inside the part of the convs to be converted.
        input_bytes: size of its inputs for one image, float32, over all calls.
    """

    name: str
    graph: ModelGraph
    sites: tuple[str, ...]
    input_bytes: int


def find_parts(model: nn.Module, sites: Iterable[str], call: Call) -> tuple[Part, ...]:
    """Find the parts of a model in evaluation mode, in the order in which they first run.

    Args:
        model: the model; run once.
        sites: names of the convs to be converted; parts without any are of no interest.
        call: how it is called, with two or more examples.
    """
    wanted = tuple(sites)
    watches = _watch(model, _candidates(model, wanted), call)
    found = list(_descend(model, "", wanted, watches, call.batch_size))
    order = list(watches)
    return tuple(sorted(found, key=lambda part: order.index(part.name)))


def part_inputs(
    model: nn.Module, parts: Sequence[Part], batches: Sequence[Call], shelf: Shelf | None = None
) -> Iterator[tuple[Part, KeptCalls]]:
    """Run the model on all batches and give each part with its inputs, one for each of its calls.

    They wait on a shelf; None = in memory.

    As many parts are watched in one pass as their inputs fit into memory.
    """
    images = sum(batch_sizes(batches))
    waiting = list(parts)
    while waiting:
        watched = [waiting.pop(0)]
        room = _MAX_BYTES - watched[0].input_bytes * images
        while waiting and waiting[0].input_bytes * images <= room:
            room -= waiting[0].input_bytes * images
            watched.append(waiting.pop(0))
        inputs = {part.name: KeptCalls(shelf or Shelf()) for part in watched}

        def keep(name: str, kept: dict[str, KeptCalls] = inputs) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                call = Call(args, kwargs)
                if all(tensor.numel() for tensor in call.tensors):
                    kept[name].append(call.map(_full_precision))  # a copy: what follows may work in place

            return hook

        handles = [
            model.get_submodule(part.name).register_forward_pre_hook(keep(part.name), with_kwargs=True)
            for part in watched
        ]
        try:
            with torch.no_grad():
                for batch in batches:
                    batch.run(model)
        finally:
            for handle in handles:
                handle.remove()
        for part in watched:
            yield part, inputs.pop(part.name)


def fitting(model: nn.Module, part: Part, inputs: Sequence[Call]) -> ModelGraph | None:
    """Return a graph of a part that holds for all its inputs; None if there is none."""
    if not inputs:
        return None
    if all(part.graph.accepts(call) for call in inputs):
        return part.graph
    sizes = {call.shapes(): call for call in inputs}
    graph = capture(model.get_submodule(part.name), list(sizes.values())).graph
    return graph if graph is not None and all(graph.accepts(call) for call in inputs) else None


def given_up(problem: str, parts: Sequence[str], outside: int) -> str:
    """Say in one line what a model that cannot be captured has to do without.

    Args:
        problem: why it cannot be captured.
        parts: names of its parts that can.
        outside: number of convs outside of them.
    """
    start = f"the model cannot be exported as a whole ({problem}): "
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


def _full_precision(tensor: Tensor) -> Tensor:
    """A copy in float32, which the working copy of the model is in, where autocast made it something else."""
    reduced = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().float() if reduced else tensor.detach().clone()


def _inside(name: str, sites: Sequence[str]) -> tuple[str, ...]:
    return tuple(site.removeprefix(f"{name}.") for site in sites if not name or site.startswith(f"{name}."))


def _candidates(model: nn.Module, sites: Sequence[str]) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if name and _inside(name, sites) and not isinstance(module, CONVS)
    ]


def _descend(
    model: nn.Module, name: str, sites: Sequence[str], watches: dict[str, _Watch], batch: int
) -> Iterator[Part]:
    """The largest parts at or below ``name`` with sites that share nothing with the rest."""
    inside, watch = _inside(name, sites), watches.get(name)
    if watch is not None and watch.usable and not _shares(model, model.get_submodule(name)):
        graph = capture(model.get_submodule(name), watch.calls).graph
        if graph is not None:
            nodes = tuple(site for site in inside if site in graph.calls)
            yield Part(name, graph, nodes, watch.bytes // max(1, batch))
            return
    for child, _ in model.get_submodule(name).named_children():
        below = f"{name}.{child}" if name else child
        if below in watches:
            yield from _descend(model, below, sites, watches, batch)


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
    """How a submodule is used in one forward pass of the whole.

    Attributes:
        calls: its arguments, the tensors without values.
    """

    calls: list[Call] = field(default_factory=list)
    depth: int = 0
    bytes: int = 0
    usable: bool = True


def _watch(model: nn.Module, names: Sequence[str], call: Call) -> dict[str, _Watch]:
    """Run the model once; the submodules in the order in which they first run, those that never do last."""
    watches = {name: _Watch() for name in names}
    order: dict[str, None] = {}
    handles = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watch, here = watches[name], Call(args, kwargs)
            order[name] = None
            watch.depth += 1
            watch.usable &= bool(here.tensors) and here.tensors[0].is_floating_point()
            watch.calls.append(here.map(_without_values))
            watch.bytes += sum(4 * tensor.numel() for tensor in here.tensors)

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
            call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    for watch in watches.values():
        watch.usable &= bool(watch.calls)
    return {name: watches[name] for name in (*order, *(name for name in names if name not in order))}


def _without_values(tensor: Tensor) -> Tensor:
    """A tensor of the same sizes, which is all that an export looks at; it takes no memory."""
    dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)  # never touched
