"""What people have in hand instead of a plain module: parallel, compiled, scripted and exported models."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from groupify.errors import ConversionError, attribute_of
from groupify.graph.copying import copy_of


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the plain module that a model is, its data-parallel and compiled wrappers looked through.

    Where only the whole is wrapped, or nothing, this is the very module inside. Where a part is, or is
    compiled, it is a copy in which the plain part takes the place of its wrapper, under the wrapper's name.

    Raises:
        ConversionError: no module, or one without layers in Python: scripted, exported, sharded.
    """
    _refuse_what_has_no_layers(model)
    while (inner := _inside(model)) is not None:
        model = inner
        _refuse_what_has_no_layers(model)
    inside = list(model.modules())
    for name, module in model.named_modules():
        if _is_exported(module):  # it cannot even be put into evaluation mode
            raise ConversionError(f"{name} is {_EXPORTED}: {_WHY}; {_REMEDY}")
    wrappers = [module for module in inside if _inside(module) is not None]
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in inside)
    if not wrappers and not compiled:
        return model
    # Innermost first; whatever refers to a wrapper refers to the copy of what is in it.
    copies: dict[int, Any] = {}
    for wrapper in reversed(wrappers):
        inner = _inside(wrapper)
        assert inner is not None
        copies[id(wrapper)] = copy_of(inner, copies)
    return copy_of(model, copies)  # a copy is not compiled


def unseen_layers(model: nn.Module) -> tuple[str, ...]:
    """Return one line for each part of a model whose convs are no layers that could be replaced."""
    notes: list[tuple[str, str]] = []
    parts = [(name, module) for name, module in model.named_modules() if name]
    for name, module in parts:
        kind = _kind_without_layers(module)
        if kind is not None and not any(name.startswith(f"{seen}.") for seen, _ in notes):
            notes.append((name, f"{name} is {kind}: convs in it are left alone, since {_WHY}; {_REMEDY}"))
    quantised = [name for name, module in parts if _is_quantised_conv(module)]
    lines = [line for _, line in notes]
    if quantised:
        lines.append(
            f"{len(quantised)} convs are quantised already ({quantised[0]}) and left alone: convert the "
            "float model, then quantise"
        )
    return tuple(lines)


_EXPORTED = "the module of an exported program (torch.export)"
_WHY = "it has no layers in Python that could be replaced"
_REMEDY = "give the nn.Module that it was made from"


def _inside(module: nn.Module) -> nn.Module | None:
    """The module in a wrapper that computes nothing of its own; None for any other module."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        inner: Any = module.module
    elif type(module).__module__ == "torch._dynamo.eval_frame":  # not imported for this: it takes a second
        inner = module._modules.get("_orig_mod")
    else:
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        raise ConversionError(
            f"the {type(module).__name__} around the model has forward hooks of its own, which would be "
            "lost: register them on the module inside"
        )
    return inner if isinstance(inner, nn.Module) else None


def _refuse_what_has_no_layers(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        remedy = (
            "give its .module() before the export" if _is_exported_program(model) else _not_a_module(model)
        )
        raise ConversionError(f"the model is a {type(model).__name__}, expected an nn.Module: {remedy}")
    kind = _kind_without_layers(model)
    if kind is not None:
        raise ConversionError(f"the model is {kind}: {_WHY}; {_REMEDY}")
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise ConversionError(
            "the model's weights are sharded over processes (DTensor): give a whole copy of the model, "
            "loaded from a full state dict"
        )


def _is_exported_program(model: object) -> bool:
    return type(model).__name__ == "ExportedProgram"


def _not_a_module(model: object) -> str:
    if isinstance(model, dict):
        return "build the model and load the state dict into it"
    return attribute_of(model, nn.Module).removeprefix("; ") or "give the network itself"


def _kind_without_layers(module: nn.Module) -> str | None:
    """Say what a module is that computes without layers of its own in Python; None for any other."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module (torch.jit)"
    if _is_exported(module):
        return _EXPORTED
    if type(module).__module__.startswith("torch.distributed.fsdp"):
        return f"a {type(module).__name__}, sharded over processes"
    return None


def _is_exported(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes
    )


def _is_quantised_conv(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.quantized") and hasattr(module, "in_channels")
