"""Without any data: fit factors and keep the activations' mean and variance, as far as the weights tell them.

Batch norms hold the mean and variance of what the dense net fed them. From there, mean and variance
of every channel are carried through the graph under the assumption that channels are independent and
Gaussian; the factors of a structure are fitted to that, and where a converted conv feeds a batch norm, its
statistics are corrected by what the conversion takes away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from groupify.conversion.factor_fit import write_factors
from groupify.conversion.surgery import conv_shape
from groupify.decomposition.decompose import decompose
from groupify.decomposition.moments import Moments
from groupify.devices import with_float64
from groupify.graph.model_graph import ModelGraph, Norm
from groupify.graph.neighbours import only_reader
from groupify.graph.operators import ADDITION, CONCATENATIONS, Effect, argument, effect, operator_name
from groupify.graph.permute import row_channels
from groupify.graph.plain_layers import Conv, conv_of
from groupify.structures import SiteRecipe, Structure

_QUADRATURE_POINTS = 32


@dataclass(frozen=True)
class _Channels:
    """Mean and variance of each channel, shape (C,)."""

    mean: Tensor
    variance: Tensor


def fit_from_statistics(
    student: ModelGraph, dense: nn.Module, sites: Mapping[str, SiteRecipe]
) -> tuple[str, ...]:
    """Fit the factors of converted convs and correct the batch norms behind converted ones, in place.

    Args:
        student: graph of the converted model with truncated weights.
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
            name, source = str(node.target), next(iter(node.all_input_nodes), None)
            state, site = (states.get(source) if source is not None else None), sites.get(name)
            if node.op == "call_module" and site is not None:
                conv, layer = conv_of(dense, name), student.layer(node)
                if not site.structure.is_one_conv:
                    kept = _fit_factors(layer, conv, site.structure, state, _norm_behind(student, node))
                else:
                    kept = _unfolded(layer.get_parameter("weight"), site)
                if state is not None and conv.groups == 1:
                    changes[node] = _change(kept, conv, site, state)
            norm = student.norm(node)
            if norm is not None and source in changes:
                shift, ratio = changes[source]
                norm.running_mean.add_(shift)
                norm.running_var.mul_(ratio)
                corrected.append(str(argument(node, 3, "running_mean").target).removesuffix(".running_mean"))
    return tuple(corrected)


def fit_to_weights(student: nn.Module, dense: nn.Module, sites: Mapping[str, SiteRecipe]) -> None:
    """Fit the factors of converted convs as if all their inputs were alike and independent, in place.

    Args:
        student: the converted model.
        dense: the dense one.
        sites: the converted convs by name; grouped ones keep their truncated weights.
    """
    with torch.no_grad():
        for name, site in sites.items():
            if not site.structure.is_one_conv:
                layer = student.get_submodule(name)
                _fit_factors(layer, conv_of(dense, name), site.structure, None, None)


def _fit_factors(
    sequence: nn.Module, conv: Conv, structure: Structure, state: _Channels | None, norm: Norm | None
) -> Tensor:
    """Fit the factors of a sequence, and return the weight of the one conv that computes the same."""
    taps = conv.weight[0, 0].numel()
    device = with_float64(conv.weight.device)
    variance = torch.ones(conv.in_channels, device=device) if state is None else state.variance.to(device)
    spread = (variance + 1e-4 * variance.mean().clamp(min=1e-12)).repeat_interleave(taps)
    moments = Moments.of_weight(conv.weight.to(device), torch.diag_embed(spread.reshape(conv.groups, -1)))
    scale = None if norm is None else norm.affine()[0].to(device)
    factors = decompose(moments, conv_shape(conv), structure, scale)
    write_factors(sequence, factors)
    return factors.weight().to(conv.weight)


def _norm_behind(graph: ModelGraph, node: fx.Node) -> Norm | None:
    reader = only_reader(node)
    return None if reader is None else graph.norm(reader)


def _unfolded(weight: Tensor, site: SiteRecipe) -> Tensor:
    """The weight of the dense conv that computes what a grouped one does, in front of its shuffle."""
    outputs, width = weight.shape[:2]
    blocks = weight.reshape(site.groups, outputs // site.groups, width, *weight.shape[2:])
    dense = weight.new_zeros(*blocks.shape[:2], site.groups, *blocks.shape[2:])
    groups = torch.arange(site.groups)
    dense[groups, :, groups] = blocks
    return dense.reshape(outputs, -1, *weight.shape[2:])


def _change(kept: Tensor, dense: Conv, site: SiteRecipe, state: _Channels) -> tuple[Tensor, Tensor]:
    """Shift of the mean and ratio of the variance of each output channel, ``kept`` being what is left."""
    (full_mean, full_variance), (mean, variance) = (
        (weight.flatten(2).sum(2) @ state.mean, weight.flatten(2).square().sum(2) @ state.variance)
        for weight in (dense.weight, kept)
    )
    rows = row_channels(len(mean), site.groups, site.shuffle)
    kept_mean, kept_variance = torch.empty_like(mean), torch.empty_like(variance)
    kept_mean[rows], kept_variance[rows] = mean, variance
    ratio = kept_variance / full_variance.clamp(min=1e-12)
    return kept_mean - full_mean, ratio.clamp(1e-2, 1.0)


def _carry(
    student: ModelGraph, node: fx.Node, states: Mapping[fx.Node, _Channels | None]
) -> _Channels | None:
    """Mean and variance of a node's channels; None where they are not known."""
    norm = student.norm(node)
    if norm is not None and norm.weight is not None and norm.bias is not None:
        return _Channels(norm.bias.detach().clone(), norm.weight.detach().square())
    sources = node.all_input_nodes
    inputs = [states.get(source) for source in sources]
    known = [state for state in inputs if state is not None]
    if not known or len(known) != len(inputs):
        return None
    kind, name = effect(node), operator_name(node)
    if kind in (Effect.WITHIN_CHANNELS, Effect.SAME):
        return known[0]
    if name in CONCATENATIONS:
        return _joined(known) if argument(node, 1, "dim", 0) == 1 else None
    if kind is not Effect.ELEMENTWISE:
        return None
    if len(known) == 1:
        return _through(lambda values: _evaluate(node, values), known[0])
    if name == ADDITION and len(known) == 2 and len(node.args) == 2 and not node.kwargs:
        return _Channels(known[0].mean + known[1].mean, known[0].variance + known[1].variance)
    return None


def _joined(states: Sequence[_Channels]) -> _Channels:
    return _Channels(torch.cat([s.mean for s in states]), torch.cat([s.variance for s in states]))


def _evaluate(node: fx.Node, values: Tensor) -> Tensor:
    """Run an elementwise operator with ``values`` in the place of the one tensor that it reads."""
    function: Any = node.target
    args: Any = fx.node.map_arg(node.args, lambda source: values)
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda source: values)
    result: Tensor = function(*args, **kwargs)
    return result


def _through(function: Callable[[Tensor], Tensor], state: _Channels) -> _Channels:
    """Mean and variance behind an elementwise function of Gaussian channels (Gauss–Hermite quadrature)."""
    points, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE_POINTS)
    weight, point = (
        torch.from_numpy(values).float().to(state.mean.device).reshape(-1, 1)
        for values in (weights / weights.sum(), points)
    )
    values = state.mean + state.variance.sqrt() * point
    outputs = function(values.reshape(*values.shape, 1, 1)).reshape(values.shape).float()  # it may be a mask
    mean = (weight * outputs).sum(0)
    return _Channels(mean, (weight * (outputs - mean).square()).sum(0))
