"""Layers that compute what torch's own do, whatever class, parametrisation or instance they are."""

from __future__ import annotations

from torch import nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def conv_kind(module: nn.Module) -> type[Conv] | None:
    """Return the conv class whose computation a module has; None for any other, as a subclass may be.

    A subclass that changes the constructor alone (torchvision's video models have such) computes the same.
    """
    for kind in CONVS:
        if isinstance(module, kind):
            same = type(module).forward is kind.forward
            return kind if same and type(module)._conv_forward is kind._conv_forward else None
    return None


def conv_of(model: nn.Module, name: str) -> Conv:
    """Return the conv that has a name in a model."""
    conv = model.get_submodule(name)
    assert isinstance(conv, CONVS)
    return conv


def is_plain_layer(module: nn.Module) -> bool:
    """Whether a module computes what a conv or ``nn.Linear`` does, from a weight that is a parameter."""
    plain = conv_kind(module) is not None or type(module) is nn.Linear
    if {"forward", "_conv_forward", "_call_impl"} & vars(module).keys():
        return False  # replaced on the instance
    return plain and isinstance(module._parameters.get("weight"), nn.Parameter)
