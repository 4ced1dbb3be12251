"""Trace a model into an fx graph, or say in one line why that is impossible."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import fx, nn
from torchvision.ops import FrozenBatchNorm2d

from groupify.graph.forward import evaluating


@dataclass(frozen=True)
class Traced:
    """What tracing found.

    Attributes:
        module: the graph of the model in inference mode, sharing its parameters and submodules;
            ``None`` when the model cannot be traced.
        problem: why it cannot be traced, one line; ``None`` when it can.
    """

    module: fx.GraphModule | None
    problem: str | None


def trace(model: nn.Module) -> Traced:
    """Trace ``model`` as it runs in inference.

    The graph holds the very submodules of ``model``; ``model`` itself keeps its training mode.
    """
    try:
        with evaluating(model):
            return Traced(_symbolic_trace(model), None)
    except Exception as error:  # any Python code may run here, so any exception may come out
        reason = str(error).strip().splitlines()
        return Traced(
            None, f"{type(error).__name__}: {reason[0].partition('. ')[0] if reason else 'no message'}"
        )


def _symbolic_trace(model: nn.Module) -> fx.GraphModule:
    if _is_leaf(model):
        # fx would run a bare nn.Conv2d through F.conv2d; as a child it stays a site.
        model = nn.Sequential(model)
    tracer = _Tracer()
    graph = tracer.trace(model)
    module = fx.GraphModule(tracer.root, graph)
    module.eval()
    return module


def _is_leaf(module: nn.Module) -> bool:
    return module.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


class _Tracer(fx.Tracer):
    """Keeps convs and their subclasses whole, wherever their class was defined."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Stop at torch's own layers, at every kind of conv and at batch norms of torchvision's own."""
        return isinstance(m, (nn.modules.conv._ConvNd, FrozenBatchNorm2d)) or super().is_leaf_module(
            m, module_qualified_name
        )


def on_same_graph(traced: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """Return the graph of ``traced`` over the submodules of ``model``, which has the same names."""
    return fx.GraphModule(model, copy.deepcopy(traced.graph))


def example_input(
    input_shape: tuple[int, ...], *, batch: int = 1, like: nn.Module | None = None
) -> torch.Tensor:
    """Return seeded noise of shape (batch, *input_shape) on the device and in the dtype of ``like``."""
    values = torch.randn((batch, *input_shape), generator=torch.Generator().manual_seed(0))
    reference = (
        next((p for p in like.parameters() if p.is_floating_point()), None) if like is not None else None
    )
    return values if reference is None else values.to(device=reference.device, dtype=reference.dtype)
