"""Hooks that only look on, and those that are part of what a model computes."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from groupify.graph.call import Call
from groupify.graph.forward import equal_outputs

_Hooks = MutableMapping[int, Any]


def clear_onlookers(model: nn.Module, call: Call) -> set[nn.Module]:
    """Remove the caller's hooks that only look on; return the modules with others, which are part of them.

    A hook that gives something back, or changes a tensor in place, may do so for some inputs alone: it
    counts whatever it does to the example. So do all where the model cannot do without the onlookers, such
    as Hugging Face's, which collect hidden states in hooks of their own.
    """
    hooks: _Hooks
    for module in model.modules():
        for hooks in (module._backward_hooks, module._backward_pre_hooks):
            for key in [key for key, hook in hooks.items() if is_foreign(hook)]:
                del hooks[key]
    watched = [_Watched(*found) for found in _forward_hooks(model) if is_foreign(found[-1])]
    if not watched:
        return set()
    before = [(watcher.hooks, dict(watcher.hooks)) for watcher in watched]
    for watcher in watched:
        watcher.hooks[watcher.key] = watcher
    with torch.no_grad():
        try:
            expected = call.run(model)
            for watcher in watched:
                watcher.stay_if_acting()
            needed = not equal_outputs(expected, call.run(model))
        except Exception:
            needed = True
    if needed:
        for hooks, all_of_them in before:
            hooks.clear()
            hooks.update(all_of_them)
    return {watcher.module for watcher in watched if watcher.acts}


def _forward_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, _Hooks, int, Any]]:
    for module in model.modules():
        hooks: _Hooks
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                yield module, hooks, key, hook


def is_foreign(hook: object) -> bool:
    """Whether a hook is the caller's."""
    # Those of torch itself compute the weight (weight_norm, spectral_norm, pruning); Hugging Face's models
    # put hooks on themselves when they first run.
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return not home.startswith(("torch.nn.utils", "transformers."))


class _Watched:
    """A hook under a key of a module's hooks, and whether it has done more than look on."""

    def __init__(self, module: nn.Module, hooks: _Hooks, key: int, hook: Any) -> None:
        self.module, self.hooks, self.key, self.hook = module, hooks, key, hook
        self.acts = False

    def stay_if_acting(self) -> None:
        """Put the hook back, or leave it out."""
        if self.acts:
            self.hooks[self.key] = self.hook
        else:
            self.hooks.pop(self.key, None)

    def __call__(self, *args: Any) -> Any:
        """Do what the hook does."""
        before = _versions(args[1:])
        result = self.hook(*args)
        self.acts |= result is not None or _versions(args[1:]) != before
        return result


def _versions(values: Any) -> list[int]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
