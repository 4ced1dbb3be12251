"""Without any data: keep the activations' mean and variance, as far as the weights tell them.

Batch norms hold the mean and variance of what the dense net fed them. From there, mean and variance
of every channel are carried through the graph under the assumption that channels are independent and
Gaussian; where a truncated conv feeds a batch norm, its statistics are corrected by what the
truncation takes away.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from groupify.graph.operations import (
    ELEMENTWISE_FUNCTIONS,
    ELEMENTWISE_MODULES,
    SPATIAL_FUNCTIONS,
    SPATIAL_MODULES,
    is_batch_norm,
)
from groupify.graph.permute import row_channels
from groupify.structures import GROUPED, SiteRecipe

_QUADRATURE_POINTS = 32


@dataclass(frozen=True)
class _Channels:
    """Mean and variance of each channel, shape (C,)."""

    mean: Tensor
    variance: Tensor


def correct_batch_norms(
    student: fx.GraphModule, dense: nn.Module, sites: Mapping[str, SiteRecipe]
) -> tuple[str, ...]:
    """Correct the batch norms behind truncated convs, in place.

    Args:
        student: traced converted model with truncated weights.
        dense: the dense model in the same channel order.
        sites: the converted convs by name.

    Returns:
        Names of the batch norms that were corrected.
    """
    corrected = []
    states: dict[fx.Node, _Channels | None] = {}
    # A conv in front of a batch norm leaves here how it changed: (mean shift, variance ratio).
    changes: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for node in student.graph.nodes:
            states[node] = _carry(student, node, states)
            if node.op != "call_module":
                continue
            name, source = str(node.target), node.all_input_nodes[0] if node.all_input_nodes else None
            state = states.get(source) if source is not None else None
            site = sites.get(name)
            if site is not None and site.kind == GROUPED and state is not None:
                changes[node] = _change(student.get_submodule(name), dense.get_submodule(name), site, state)
            module = student.get_submodule(name)
            if is_batch_norm(module) and module.running_mean is not None and source in changes:
                shift, ratio = changes[source]
                assert module.running_var is not None
                module.running_mean.add_(shift)
                module.running_var.mul_(ratio)
                corrected.append(name)
    return tuple(corrected)


def _change(
    grouped: nn.Module, dense: nn.Module, site: SiteRecipe, state: _Channels
) -> tuple[Tensor, Tensor]:
    """Shift of the mean and ratio of the variance of each output channel."""
    full, kept = dense.get_parameter("weight").flatten(2), grouped.get_parameter("weight").flatten(2)
    groups = site.groups
    full_mean, full_variance = full.sum(2) @ state.mean, full.square().sum(2) @ state.variance
    blocks = kept.reshape(groups, kept.shape[0] // groups, kept.shape[1], -1)
    mean = torch.einsum("goi,gi->go", blocks.sum(3), state.mean.reshape(groups, -1)).reshape(-1)
    variance = torch.einsum("goi,gi->go", blocks.square().sum(3), state.variance.reshape(groups, -1)).reshape(
        -1
    )
    rows = row_channels(len(mean), groups, site.shuffle)
    kept_mean, kept_variance = torch.empty_like(mean), torch.empty_like(variance)
    kept_mean[rows], kept_variance[rows] = mean, variance
    ratio = kept_variance / full_variance.clamp(min=1e-12)
    return kept_mean - full_mean, ratio.clamp(1e-2, 1.0)


def _carry(
    student: fx.GraphModule, node: fx.Node, states: Mapping[fx.Node, _Channels | None]
) -> _Channels | None:
    """Mean and variance of a node's channels; None where they are not known."""
    inputs = [states.get(source) for source in node.all_input_nodes]
    known = [state for state in inputs if state is not None]
    if node.op == "call_module":
        module = student.get_submodule(str(node.target))
        if is_batch_norm(module) and module.weight is not None:
            return _Channels(module.bias.detach().clone(), module.weight.detach().square())
        if isinstance(module, SPATIAL_MODULES) and known:
            return known[0]
        if isinstance(module, ELEMENTWISE_MODULES) and known:
            return _through(module, known[0])
        return None
    if node.op not in ("call_function", "call_method") or len(known) != len(inputs) or not known:
        return None
    if node.target in (operator.add, operator.iadd, torch.add, "add", "add_") and len(known) == 2:
        return _Channels(known[0].mean + known[1].mean, known[0].variance + known[1].variance)
    if node.target in (torch.cat, torch.concat):
        return _Channels(torch.cat([s.mean for s in known]), torch.cat([s.variance for s in known]))
    if node.target in SPATIAL_FUNCTIONS:
        return known[0]
    if node.target in ELEMENTWISE_FUNCTIONS and len(known) == 1:
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        rest = node.args[1:]
        return _through(lambda values: function(values, *rest, **node.kwargs), known[0])
    return None


def _through(function: Callable[[Tensor], Tensor], state: _Channels) -> _Channels:
    """Mean and variance behind an elementwise function of Gaussian channels (Gauss–Hermite quadrature)."""
    points, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE_POINTS)
    weight = torch.from_numpy(weights / weights.sum()).float().reshape(-1, 1)
    values = state.mean + state.variance.sqrt() * torch.from_numpy(points).float().reshape(-1, 1)
    outputs = function(values.reshape(*values.shape, 1, 1)).reshape(values.shape)
    mean = (weight * outputs).sum(0)
    return _Channels(mean, (weight * (outputs - mean).square()).sum(0))
