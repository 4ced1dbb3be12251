"""The copy of the caller's model that a conversion works on, and the way back from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from groupify.errors import ConversionError
from groupify.graph.call import Call
from groupify.graph.copying import copy_of
from groupify.graph.hooks import clear_onlookers
from groupify.graph.plain_layers import CONVS
from groupify.models.weights import first_unsound, one_line


def working_copy(model: nn.Module, call: Call, sites: Iterable[str]) -> nn.Module:
    """Return a copy of a model in float32, in evaluation mode, without the hooks that only look on.

    Args:
        model: the model; left untouched.
        call: a way in which it is called.
        sites: names of the convs that will be replaced.

    Raises:
        ConversionError: the weights cannot be worked with, a hook on one of the convs does more than look
            on, or the copy computes with the model's own weights.
    """
    check_weights(model)
    copied = copy_of(model).float().eval()
    for module in copied.modules():
        if isinstance(module, CONVS):
            # A frozen conv, too, is reconstructed; the result has the model's flags.
            module.requires_grad_(True)
    call = call.floats(Tensor.float)
    acting = clear_onlookers(copied, call)
    modules = dict(copied.named_modules())
    for name in sites:
        if modules.get(name) in acting:
            raise ConversionError(
                f"layer {name!r} cannot be replaced: a hook on it changes what it computes; plan again, "
                "which leaves it alone"
            )
    _check_independence(copied, model, call)
    return copied


def check_weights(model: nn.Module) -> None:
    """Refuse weights that no conversion can work with.

    Raises:
        ConversionError: names the first.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ConversionError(
                f"{name!r} belongs to a lazy layer that does not know its sizes yet: run the model once on "
                "an input, then convert it"
            )
        if tensor.is_meta:
            raise ConversionError(f"{name!r} is on the meta device and has no values: load the weights first")
        if tensor.is_complex():
            raise ConversionError(f"{name!r} is complex; complex models cannot be converted")
    unsound = first_unsound(model)
    if unsound is not None:
        raise ConversionError(f"{unsound!r} holds NaN or infinity; load a sound checkpoint")


@torch.no_grad()
def take_values(model: nn.Module, source: nn.Module) -> None:
    """Copy the parameters and buffers of a module into another one of the same names, in its own types.

    A buffer outside the state dict, or a tensor in a plain attribute, that has other values than before
    becomes part of it, or it would be lost when the model is saved.
    """
    values = {**_named(source.named_parameters), **_named(source.named_buffers)}
    for name, parameter in _named(model.named_parameters).items():
        parameter.copy_(values[name])
    plain, own_plain = plain_tensors(source), plain_tensors(model)
    for name, tensor in plain.items():
        before = own_plain.get(name)
        if before is not None and before.shape == tensor.shape and not _equal(tensor, before):
            _make_buffer(model, name)
    changed = []
    for name, buffer in _named(model.named_buffers).items():
        value = values.get(name, plain.get(name))
        # What has another shape was made by running the model, and will be again.
        if value is not None and value.shape == buffer.shape and not _equal(value, buffer):
            buffer.copy_(value)
            changed.append(name)
    make_persistent(model, changed)


def make_persistent(model: nn.Module, names: Iterable[str]) -> None:
    """Make those buffers part of a model's state dict; other names are let be."""
    plain, buffers = plain_tensors(model), _named(model.named_buffers)
    for name in names:
        owner, _, own_name = name.rpartition(".")
        if name in plain:
            _make_buffer(model, name)
        elif name in buffers:
            model.get_submodule(owner)._non_persistent_buffers_set.discard(own_name)


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that modules hold as plain attributes, neither parameters nor buffers, by name."""
    return {
        f"{name}.{attribute}" if name else attribute: value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _make_buffer(model: nn.Module, name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = vars(module).pop(attribute)
    module.register_buffer(attribute, tensor.detach())


def _named(listed: Any) -> dict[str, Tensor]:
    return dict(listed(remove_duplicate=False))


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one.to(other), other, rtol=0, atol=0, equal_nan=True))


# the copy and the original ---------------------------------------------------------------------


def _check_independence(copied: nn.Module, model: nn.Module, call: Call) -> None:
    """Refuse a model whose copy computes with the weights of the original.

    A function that was put on a layer, or a hook, may refer to the module that it was made for; a copy of
    the module calls the same function.
    """
    owned = {**_named(model.named_parameters), **_named(model.named_buffers)}
    watch = _Reads({tensor.untyped_storage()._cdata: name for name, tensor in owned.items()})
    try:
        with torch.no_grad(), watch:
            call.run(copied)
    except ConversionError:
        _check_runs(copied, call)  # a watched conv may hand out another memory format
        return
    if watch.found is not None:
        raise ConversionError(
            f"a copy of the model still computes with {watch.found!r} of the model given: a hook or function "
            "on one of its layers refers to the very layer that it was made for; let it use the module that "
            "it is called with"
        )


def _check_runs(copied: nn.Module, call: Call) -> None:
    try:
        with torch.no_grad():
            call.run(copied)
    except ConversionError as error:
        reason = one_line(error.__cause__ or error)
        raise ConversionError(
            f"the model does not run in float32, in which it is converted: {reason}"
        ) from error.__cause__


class _Reads(TorchDispatchMode):
    """Notes the first of some tensors that an operation reads."""

    def __init__(self, storages: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = storages
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands of one operation, and do it."""
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)) if self.found is None else ():
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self.found = self.found or self._storages.get(value.untyped_storage()._cdata)
        return func(*args, **kwargs)
