"""Fit the replacement of one conv, or a dense layer again, to targets at sampled positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groupify.conversion.factor_fit import fit_factors, write_factors
from groupify.conversion.held_out import HeldOutCheck, best_ridge
from groupify.conversion.layer_samples import Part
from groupify.conversion.relaxed_fit import GroupedSamples, RelaxedFit
from groupify.documents import Amount, Count
from groupify.graph.model_graph import Norm
from groupify.graph.permute import row_channels
from groupify.graph.plain_layers import CONVS, Conv
from groupify.stats.moments import GroupedFit, GroupedMoments
from groupify.structures import SiteRecipe
from groupify.tasks import AUTO


@dataclass(frozen=True)
class SiteFit:
    """How well one conv was fitted.

    Attributes:
        name: qualified module name.
        error: mean squared error ÷ variance of the target, over all outputs.
        samples: number of output positions that the fit saw.
        inputs: number of inputs of each group, in·kh·kw / groups.
        held_out: the check of the fit on images that it did not see; None where there were too few to hold
            any out.
    """

    name: str
    error: Amount
    samples: Count
    inputs: Count
    held_out: HeldOutCheck | None = None


@dataclass(frozen=True)
class FitOptions:
    """What the fit does.

    Attributes:
        ridge: ridge strength of grouped convs as a multiple of the mean input variance.
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
        metric: whether factors are fitted to what the model's outputs mind; else to the scales of the batch
            norm behind.
        task: what the model is for, see ``groupify.tasks``; that decides what its outputs mind.
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
    metric: bool = True
    task: str = AUTO


def fit_site(
    module: nn.Module,
    dense_conv: Conv,
    site: SiteRecipe,
    parts: list[Part],
    norm: Norm | None,
    options: FitOptions,
    metric: Tensor | None = None,
) -> SiteFit:
    """Fit the replacement of one conv in place.

    Args:
        module: the replacement.
        dense_conv: the conv that it replaces.
        site: how it is replaced.
        parts: what the conv reads and should output; may be used up.
        norm: the batch norm behind it, into whose running mean the bias goes where the conv has none.
        options: what to do.
        metric: what errors of its outputs cost the model, shape (O, O); None = what the norm's scales say.
            Plain groups need none: each of their outputs is fitted by itself.
    """
    if site.structure.is_one_conv:
        assert isinstance(module, CONVS)
        found = _fit_grouped(module, site, parts, norm is not None, options)
        channels = row_channels(module.out_channels, site.groups, site.shuffle)
        _set_bias(module, found.bias(module), norm, channels)
        error, samples, held_out = float(found.fit.error.mean()), found.samples, found.held_out
    else:
        *_, last = module.children()
        assert isinstance(last, CONVS)
        centred = norm is not None or last.bias is not None
        scale = None if norm is None else norm.affine()[0].to(parts[0].inputs.device)
        fitted = fit_factors(
            dense_conv, site.structure, parts, scale, metric=metric,
            relaxations=options.relu_iterations, centred=centred,
        )  # fmt: skip
        write_factors(module, fitted.factors)
        _set_bias(last, fitted.bias.to(last.weight.dtype), norm, torch.arange(len(fitted.bias)))
        error, samples, held_out = fitted.factors.error, fitted.samples, fitted.held_out
    inputs = (
        dense_conv.weight[0].numel() * dense_conv.groups // site.structure.separate_fits(dense_conv.groups)
    )
    return SiteFit(site.name, error, samples, inputs, held_out)


def refit_layer(
    layer: nn.Module,
    parts: Sequence[Part],
    norm: Norm | None,
    options: FitOptions,
) -> HeldOutCheck | None:
    """Fit a dense conv or linear layer again in place, staying near its present weights.

    With fewer samples than inputs it would only learn the images by heart: then nothing changes.
    Args and shapes are those of ``fit_site``; returns the check on held-out images, if there are any.
    """
    assert isinstance(layer, (*CONVS, nn.Linear))
    if sum(len(part.inputs) for part in parts) < layer.weight[0].numel():
        return None
    prior = layer.weight.reshape(1, len(layer.weight), -1)
    rows, centred = torch.arange(len(layer.weight)), norm is not None or layer.bias is not None
    found = _least_squares(parts, 1, rows, centred, options.refit_ridge, prior, options)
    layer.weight.copy_(found.fit.weight.reshape(layer.weight.shape))
    _set_bias(layer, found.bias(layer), norm, rows)
    return found.held_out


def _set_bias(layer: Conv | nn.Linear, bias: Tensor, norm: Norm | None, channels: Tensor) -> None:
    """Give a layer its bias (of output ``channels``), or fold it into the batch norm behind."""
    if layer.bias is not None:
        layer.bias.copy_(bias)
    elif norm is not None:
        of_channel = torch.empty_like(bias)
        of_channel[channels] = bias
        norm.running_mean.sub_(of_channel.to(norm.running_mean))


@dataclass(frozen=True)
class _Found:
    """A fitted map.

    Attributes:
        fit: the map.
        samples: output positions that it saw.
        held_out: the check on held-out images; None without any.
    """

    fit: GroupedFit
    samples: int
    held_out: HeldOutCheck | None

    def bias(self, layer: Conv | nn.Linear) -> Tensor:
        """The biases of all outputs, in the type of a layer's weights."""
        return self.fit.bias.reshape(-1).to(layer.weight.dtype)


def _fit_grouped(
    module: Conv, site: SiteRecipe, parts: Sequence[Part], has_norm: bool, options: FitOptions
) -> _Found:
    groups = site.groups
    rows = row_channels(module.out_channels, groups, site.shuffle)
    shape = (groups, module.out_channels // groups, -1)
    prior = module.weight.reshape(shape) if options.keep_prior else None
    centred = has_norm or module.bias is not None
    found = _least_squares(parts, groups, rows, centred, options.ridge, prior, options)
    module.weight.copy_(found.fit.weight.reshape(module.weight.shape))
    return found


def _least_squares(
    parts: Sequence[Part],
    groups: int,
    rows: Tensor,
    centred: bool,
    ridge: float,
    prior: Tensor | None,
    options: FitOptions,
) -> _Found:
    """Fit a grouped map, with a stronger ridge where it fails on the held-out parts; then on all of them."""
    in_order = torch.equal(rows, torch.arange(len(rows)))

    def grouped(values: Tensor) -> Tensor:
        return (values if in_order else values[:, rows]).reshape(len(values), groups, -1)

    signs = parts[0].target.signs
    flip = None if signs is None else grouped(signs.unsqueeze(0))[0].unsqueeze(2)  # (G, O/G, 1)
    if prior is not None:
        prior = prior.to(parts[0].inputs.device)
    if flip is not None and prior is not None:
        prior = prior * flip
    seen, held_out = (
        [_samples(part, groups, grouped) for part in parts if part.held_out == held] for held in (False, True)
    )
    fitting = RelaxedFit(
        GroupedMoments(centred=centred), prior, 0 if flip is None else options.relu_iterations
    )
    fitting.add(seen)
    check = None
    if held_out:
        judges = GroupedSamples.joined(held_out)
        check = best_ridge(fitting, judges, ridge)
        ridge = check.ridge
        fitting.add([judges])  # they have done their duty
    result = fitting.fit(ridge)
    if flip is not None:
        result = GroupedFit(result.weight * flip, result.bias * flip.squeeze(2), result.error)
    return _Found(result, fitting.moments.count, check)


def _samples(part: Part, groups: int, grouped: Callable[[Tensor], Tensor]) -> GroupedSamples:
    target = part.target.mirrored()
    thresholds = None if target.thresholds is None else grouped(target.thresholds)
    inputs = part.inputs.reshape(len(part.inputs), groups, -1)
    return GroupedSamples(inputs, grouped(target.outputs), thresholds)
