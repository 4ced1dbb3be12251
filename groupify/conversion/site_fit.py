"""Fit the replacement of one conv, or a dense layer again, to targets at sampled positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groupify.documents import Amount, Count
from groupify.graph.model_graph import Norm
from groupify.graph.permute import row_channels
from groupify.graph.plain_layers import CONVS, Conv
from groupify.stats.moments import GroupedFit, GroupedMoments, InputMoments, principal_maps
from groupify.structures import GROUPED, SiteRecipe


@dataclass(frozen=True)
class SiteFit:
    """How well one conv was fitted.

    Attributes:
        name: qualified module name.
        error: mean squared error ÷ variance of the target, over all outputs.
        samples: number of output positions that the fit saw.
        inputs: number of inputs of each group, in·kh·kw / groups.
    """

    name: str
    error: Amount
    samples: Count
    inputs: Count


@dataclass(frozen=True)
class Target:
    """What a layer should output at some positions.

    Attributes:
        outputs: shape (n, O).
        thresholds: the output at which the ReLU behind switches, shape (n, O); None without a ReLU.
        signs: +1 where the ReLU is off below the threshold, −1 where above, shape (O,).
    """

    outputs: Tensor
    thresholds: Tensor | None = None
    signs: Tensor | None = None

    def mirrored(self) -> Target:
        """Negate the outputs whose ReLU is off above the threshold, so that every ReLU is off below."""
        if self.thresholds is None or self.signs is None or bool((self.signs > 0).all()):
            return self
        return Target(self.outputs * self.signs, self.thresholds * self.signs, self.signs.abs())


@dataclass(frozen=True)
class FitOptions:
    """What the fit does.

    Attributes:
        ridge: ridge strength as a multiple of the mean input variance.
        keep_prior: whether the ridge draws towards the dense blocks instead of towards zero.
        compensate_residual: whether a conv in front of a residual sum also makes good for the error
            of the other term.
        in_order: whether a conv is fitted on the student's inputs; else on the teacher's.
        refresh_batch_norm: whether batch norms behind converted convs get new statistics.
        relu_iterations: how often the target of a conv in front of a ReLU is relaxed where the ReLU is
            off: there any value that keeps it off is as good (Zhang, Zou, He and Sun, 2015). 0 = never.
        refit_dense: whether the dense layers that remain behind converted convs are fitted again, so
            that they make good for the error upstream.
        refit_ridge: ridge strength of those; it draws towards their present weights.
        refit_max_inputs: dense layers with more inputs than this are left alone.
    """

    ridge: float = 0.01
    keep_prior: bool = False
    compensate_residual: bool = True
    in_order: bool = True
    refresh_batch_norm: bool = True
    relu_iterations: int = 5
    refit_dense: bool = True
    refit_ridge: float = 0.1
    refit_max_inputs: int = 4608


def fit_site(
    module: nn.Module,
    dense_conv: Conv,
    site: SiteRecipe,
    inputs: Sequence[Tensor],
    targets: Sequence[Target],
    norm: Norm | None,
    options: FitOptions,
) -> SiteFit:
    """Fit the replacement of one conv in place.

    Args:
        module: the replacement.
        dense_conv: the conv that it replaces.
        site: how it is replaced.
        inputs: input patches, one tensor of shape (n, I, taps) for each batch.
        targets: what the conv should output there.
        norm: the batch norm behind it, into whose running mean the bias goes where the conv has none.
        options: what to do.
    """
    if site.kind == GROUPED:
        assert isinstance(module, CONVS)
        bias, error, count = _fit_grouped(module, site, inputs, targets, norm is not None, options)
        last, channels = module, row_channels(len(bias), site.groups, site.shuffle)
    else:
        grouped, pointwise = module.get_submodule("grouped"), module.get_submodule("pointwise")
        assert isinstance(grouped, CONVS)
        assert isinstance(pointwise, CONVS)
        bias, error, count = _fit_grouped_pointwise(
            grouped, pointwise, dense_conv, site.groups, inputs, targets, norm is not None, options
        )
        last, channels = pointwise, torch.arange(len(bias))
    _set_bias(last, bias, norm, channels)
    return SiteFit(site.name, error, count, dense_conv.weight[0].numel() // site.groups)


def refit_layer(
    layer: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Target],
    norm: Norm | None,
    options: FitOptions,
) -> None:
    """Fit a dense conv or linear layer again in place, staying near its present weights.

    With fewer samples than inputs it would only learn the images by heart: then nothing changes.
    Args and shapes are those of ``fit_site``.
    """
    assert isinstance(layer, (*CONVS, nn.Linear))
    samples = sum(len(patches) for patches in inputs)
    if samples < layer.weight[0].numel():
        return
    prior = layer.weight.reshape(1, len(layer.weight), -1)
    rows, centred = torch.arange(len(layer.weight)), norm is not None or layer.bias is not None
    result, _ = _least_squares(inputs, targets, 1, rows, centred, options.refit_ridge, prior, options)
    layer.weight.copy_(result.weight.reshape(layer.weight.shape))
    bias = result.bias.reshape(-1).to(layer.weight.dtype)
    _set_bias(layer, bias, norm, torch.arange(len(bias)))


def _set_bias(layer: Conv | nn.Linear, bias: Tensor, norm: Norm | None, channels: Tensor) -> None:
    """Give a layer its bias (of output ``channels``), or fold it into the batch norm behind."""
    if layer.bias is not None:
        layer.bias.copy_(bias)
    elif norm is not None:
        of_channel = torch.empty_like(bias)
        of_channel[channels] = bias
        norm.running_mean.sub_(of_channel)


def _fit_grouped(
    module: Conv,
    site: SiteRecipe,
    inputs: Sequence[Tensor],
    targets: Sequence[Target],
    has_norm: bool,
    options: FitOptions,
) -> tuple[Tensor, float, int]:
    groups = site.groups
    rows = row_channels(module.out_channels, groups, site.shuffle)
    shape = (groups, module.out_channels // groups, -1)
    prior = module.weight.reshape(shape) if options.keep_prior else None
    centred = has_norm or module.bias is not None
    result, count = _least_squares(inputs, targets, groups, rows, centred, options.ridge, prior, options)
    module.weight.copy_(result.weight.reshape(module.weight.shape))
    return result.bias.reshape(-1).to(module.weight.dtype), float(result.error.mean()), count


def _least_squares(
    inputs: Sequence[Tensor],
    targets: Sequence[Target],
    groups: int,
    rows: Tensor,
    centred: bool,
    ridge: float,
    prior: Tensor | None,
    options: FitOptions,
) -> tuple[GroupedFit, int]:
    """Fit a grouped map, then relax the targets in front of a ReLU and fit again, a few times.

    Relaxing minimises the convex ``Σ_on (y − ŷ)² + Σ_off relu(ŷ)²`` by majorisation: each fit is to
    the targets that cost the present prediction the least.
    """
    moments = GroupedMoments(centred=centred)
    in_order = torch.equal(rows, torch.arange(len(rows)))

    def grouped(values: Tensor) -> Tensor:
        return (values if in_order else values[:, rows]).reshape(len(values), groups, -1)

    signs = targets[0].signs
    flip = None if signs is None else grouped(signs.unsqueeze(0))[0].unsqueeze(2)  # (G, O/G, 1)
    if flip is not None and prior is not None:
        prior = prior * flip
    blocks = [patches.reshape(len(patches), groups, -1) for patches in inputs]
    mirrored = [target.mirrored() for target in targets]
    for block, target in zip(blocks, mirrored, strict=True):
        moments.update(block, grouped(target.outputs))
    result = moments.fit(ridge=ridge, prior=prior)
    if flip is None:
        return result, moments.count
    limits = [
        _Limit(grouped(target.outputs), grouped(target.thresholds))
        for target in mirrored
        if target.thresholds is not None
    ]
    for iteration in range(1, options.relu_iterations + 1):
        weight, bias = result.weight.float(), result.bias.float()
        moments.replace_outputs(
            (
                (block, limit.relaxed(block, weight, bias))
                for block, limit in zip(blocks, limits, strict=True)
            ),
            squares=iteration == options.relu_iterations,
        )
        result = moments.fit(ridge=ridge, prior=prior)
    return GroupedFit(result.weight * flip, result.bias * flip.squeeze(2), result.error), moments.count


class _Limit:
    """The targets of one batch and where the ReLU behind is off; shapes (n, G, O/G)."""

    def __init__(self, outputs: Tensor, thresholds: Tensor) -> None:
        self._outputs = outputs.transpose(0, 1)
        self._thresholds = thresholds.transpose(0, 1)
        self._off = self._outputs <= self._thresholds

    def relaxed(self, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The outputs, but where the ReLU should be off, whatever of the prediction keeps it off."""
        predicted = torch.baddbmm(bias.unsqueeze(1), inputs.transpose(0, 1), weight.transpose(1, 2))
        torch.minimum(predicted, self._thresholds, out=predicted)
        return torch.where(self._off, predicted, self._outputs).transpose(0, 1)


def _fit_grouped_pointwise(
    grouped: Conv,
    pointwise: Conv,
    dense_conv: Conv,
    groups: int,
    inputs: Sequence[Tensor],
    targets: Sequence[Target],
    has_norm: bool,
    options: FitOptions,
) -> tuple[Tensor, float, int]:
    """Principal output directions of each input group, then a pointwise conv fitted on top.

    The grouped conv holds the ``principal_maps`` of the dense weight.
    """
    out_channels = dense_conv.out_channels
    rank = out_channels // groups
    weight = dense_conv.weight.reshape(out_channels, groups, -1).transpose(0, 1).double()  # (G, O, D)
    moments = InputMoments()
    for patches in inputs:
        moments.add(patches.reshape(len(patches), groups, -1))
    basis = principal_maps(weight, moments.input_covariance(), rank)  # (G, r, D)
    grouped.weight.copy_(basis.reshape(grouped.weight.shape))
    kernel = basis.float()
    features = [
        torch.einsum("grd,ngd->ngr", kernel, patches.reshape(len(patches), groups, -1)) for patches in inputs
    ]
    centred, every = has_norm or pointwise.bias is not None, torch.arange(out_channels)
    result, count = _least_squares(features, targets, 1, every, centred, options.ridge, None, options)
    pointwise.weight.copy_(result.weight.reshape(pointwise.weight.shape))
    return result.bias.reshape(-1).to(pointwise.weight.dtype), float(result.error.mean()), count
