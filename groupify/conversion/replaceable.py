"""Whether a conv can be replaced at all: what it is, whatever number of groups is asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from groupify.graph.plain_layers import CONVS, Conv, conv_kind

# An entry of this name on the module itself, and not on its class, replaces what the layer computes.
_COMPUTING = ("forward", "_conv_forward", "_call_impl")
_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_STATE_METHODS = ("_save_to_state_dict", "_load_from_state_dict", "state_dict")


class LeftAlone(NamedTuple):
    """Why one conv is left alone.

    Attributes:
        cause: what such reasons have in common, whatever their numbers and names.
        reason: the reason, with its numbers and names.
        advice: what the user can do to have it converted; "" where nothing can or should be done, or the
            reason says it already.
    """

    cause: str
    reason: str
    advice: str = ""


def why_not_replaceable(conv: Conv) -> LeftAlone | None:
    """Say why a conv cannot be replaced by one that computes as a plain one does; None where it can."""
    if is_parametrized(conv) or not {"weight", "bias"} <= conv._parameters.keys():
        what = " and ".join(_computed(conv))
        return LeftAlone(
            "parametrized", f"its {what} is parametrized; first {removal_of_parametrization(conv)}"
        )
    kind = next(base for base in CONVS if isinstance(conv, base))
    if conv_kind(conv) is None:
        return LeftAlone(
            "subclass",
            f"a subclass of {kind.__name__} ({type(conv).__name__}), whose forward may differ",
            f"only plain nn.{kind.__name__} layers are replaced: use them, and do what differs around them",
        )
    replaced = [name for name in _COMPUTING if name in vars(conv)]
    if replaced:
        return LeftAlone(
            "replaced forward",
            f"its {replaced[0]} was replaced on the layer itself, so it may differ from {kind.__name__}'s",
            f"take the replacement off first (del conv.{replaced[0]})",
        )
    own = [name for name in _STATE_METHODS if getattr(type(conv), name) is not getattr(kind, name)]
    if own or any(_is_foreign(hook) for hooks in _STATE_HOOKS for hook in getattr(conv, hooks, {}).values()):
        reason = "it saves or loads its weights in a way of its own (state-dict hooks)"
        return LeftAlone("state", reason, "remove its state-dict hooks first")
    return None


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Return the convs whose weight or bias is in another place of the model too, each with the reason.

    One conv under several names, or called several times, shares nothing: it is one layer. Shared memory
    counts, such as that of a view; parts of one buffer that do not overlap do not.
    """
    by_storage: dict[int, list[tuple[int, int, str, str]]] = defaultdict(list)
    for owner, name, tensor in _tensors(model):
        start = int(tensor.storage_offset())
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = start + 1 + sum((size - 1) * step for size, step in steps)
        by_storage[tensor.untyped_storage()._cdata].append((start, end, owner, name))
    reasons: dict[str, str] = {}
    for places in by_storage.values():
        for start, end, owner, name in places if len(places) > 1 else ():
            others = [place for place in places if place[2:] != (owner, name)]
            other = next((place for place in others if place[0] < end and start < place[1]), None)
            if other is not None and name in ("weight", "bias"):
                reasons.setdefault(owner, f"it shares its {name} with {'.'.join(filter(None, other[2:]))!r}")
    return {name: reason for name, reason in reasons.items() if isinstance(model.get_submodule(name), CONVS)}


def _is_foreign(hook: object) -> bool:
    """Whether a state-dict hook is not one that torch's own parametrizations leave behind."""
    function = getattr(hook, "hook", hook)
    return not str(getattr(function, "__module__", "")).startswith("torch.nn.utils")


def removal_of_parametrization(conv: nn.Module) -> str:
    """Return the call that makes the weight, or the bias, of a conv a plain parameter again."""
    name = _computed(conv)[0]
    if is_parametrized(conv):
        return f"call torch.nn.utils.parametrize.remove_parametrizations(conv, {name!r})"
    if hasattr(conv, f"{name}_g"):
        return "call torch.nn.utils.remove_weight_norm(conv)"
    if hasattr(conv, f"{name}_u"):
        return "call torch.nn.utils.remove_spectral_norm(conv)"
    if hasattr(conv, f"{name}_mask"):
        return f"call torch.nn.utils.prune.remove(conv, {name!r})"
    return f"make its {name} a plain parameter"


def _computed(conv: nn.Module) -> list[str]:
    """Which of weight and bias is no plain parameter but computed from others."""
    if is_parametrized(conv):
        return list(conv.parametrizations)  # type: ignore[arg-type]
    return [name for name in ("weight", "bias") if name not in conv._parameters]


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """All parameters and buffers, shared ones as often as modules hold them: (module, name, tensor)."""
    for owner, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel() and tensor.layout == torch.strided:
                yield owner, name, tensor
