"""Fit the factors of a structure to samples of a conv, all together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from groupify.conversion.held_out import HeldOutCheck, is_overfitted, weakest_good
from groupify.conversion.layer_samples import Part
from groupify.conversion.relaxed_fit import GroupedSamples
from groupify.conversion.surgery import conv_shape
from groupify.decomposition.decompose import EVALUATIONS, Decomposer
from groupify.decomposition.factors import Factors
from groupify.decomposition.moments import Moments
from groupify.graph.plain_layers import Conv
from groupify.stats.moments import GroupedFit, GroupedMoments
from groupify.structures import Structure

# Enough to tell a fit that has learned its images by heart.
_CHECKING_EVALUATIONS = 12
# Enough to follow targets that have moved a little.
_FOLLOWING_EVALUATIONS = 6


@dataclass(frozen=True)
class FactorFit:
    """Fitted factors.

    Attributes:
        factors: balanced.
        bias: of each output, shape (O,).
        samples: output positions that they were fitted to.
        held_out: the check on held-out images; None without any.
    """

    factors: Factors
    bias: Tensor
    samples: int
    held_out: HeldOutCheck | None


def fit_factors(
    conv: Conv,
    structure: Structure,
    parts: Sequence[Part],
    scale: Tensor | None,
    *,
    relaxations: int,
    centred: bool,
) -> FactorFit:
    """Fit what replaces a conv to what it reads and should output.

    Where a fit of the images that are not held out is more than twice as far off on the held-out ones,
    stronger ridges that draw towards the conv's own weights are tried.

    Args:
        conv: the dense conv.
        structure: what replaces it; more than one conv.
        parts: what it reads and should output.
        scale: weight of each output's error, shape (O,); None = 1.
        relaxations: how often the targets are relaxed where a ReLU behind is off.
        centred: whether there is a bias to take the means.
    """
    signs = parts[0].target.signs
    fitting = _Fitting(conv, structure, scale, signs, relaxations, centred)
    fitting.add([part for part in parts if not part.held_out])
    held_out = [part for part in parts if part.held_out]
    check = None
    if held_out:
        check = fitting.checked(held_out)
        fitting.add(held_out)  # they have done their duty as judges
    factors, bias, count = fitting.result(0.0 if check is None else check.ridge)
    if signs is not None:
        factors, bias = factors.scaled(signs), bias * signs
    return FactorFit(factors, bias, count, check)


class _Fitting:
    """Samples of a conv, the outputs mirrored whose ReLU is off above, and fits to them."""

    def __init__(
        self,
        conv: Conv,
        structure: Structure,
        scale: Tensor | None,
        signs: Tensor | None,
        relaxations: int,
        centred: bool,
    ) -> None:
        self._shape, self._structure, self._centred = conv_shape(conv), structure, centred
        self._scale = torch.ones(conv.out_channels) if scale is None else scale.abs()
        self._weight = (
            conv.weight.float() if signs is None else torch.einsum("o...,o->o...", conv.weight, signs)
        )
        self._relaxations = 0 if signs is None else relaxations
        self._moments = GroupedMoments(centred=centred)
        self._samples: list[GroupedSamples] = []

    def add(self, parts: Sequence[Part]) -> None:
        """Add samples to fit."""
        for samples in map(self._grouped, parts):
            self._moments.update(samples.inputs, samples.outputs)
            self._samples.append(samples)

    def _grouped(self, part: Part) -> GroupedSamples:
        target, groups = part.target.mirrored(), self._shape.groups

        def grouped(values: Tensor) -> Tensor:
            return values.reshape(len(values), groups, -1)

        thresholds = None if target.thresholds is None else grouped(target.thresholds)
        return GroupedSamples(grouped(part.inputs), grouped(target.outputs), thresholds)

    def checked(self, held_out: Sequence[Part]) -> HeldOutCheck:
        """Return the check of a fit that has only begun, and the ridge that does well on held-out images."""
        judges = [self._grouped(part) for part in held_out]
        error, first = self._errors(judges, 0.0)
        if not is_overfitted(error, first):
            return HeldOutCheck(error, first, overfitted=False, ridge=0.0)
        strength, gain = weakest_good(0.0, first, lambda other: self._errors(judges, other)[1])
        return HeldOutCheck(error, first, overfitted=True, ridge=strength, gain=gain)

    def _errors(self, judges: Sequence[GroupedSamples], ridge: float) -> tuple[float, float]:
        """Relative errors on the samples and on held-out ones."""
        moments = self._wanted(ridge, self._covariance())
        factors = Decomposer(moments, self._shape, self._scale).fit(self._structure, _CHECKING_EVALUATIONS)
        fit = self._map(factors)
        scale = self._scale.reshape(self._shape.groups, 1, -1)
        left = sum(
            float(((samples.outputs.transpose(0, 1) - samples.predicted(fit)) * scale).square_().sum())
            for samples in judges
        )
        energy = float((self._moments.output_variance() * scale.squeeze(1).square()).sum())
        return factors.error, left / max(sum(len(samples.inputs) for samples in judges) * energy, 1e-30)

    def result(self, ridge: float) -> tuple[Factors, Tensor, int]:
        """Fit all samples to the end; return factors, bias and number of positions."""
        covariance = self._covariance()
        decomposer = Decomposer(self._wanted(ridge, covariance), self._shape, self._scale)
        factors = decomposer.fit(self._structure, EVALUATIONS)
        found, error, least = factors, factors.error, math.inf
        for left in reversed(range(self._relaxations + 1)):
            missed = self._relax(self._map(factors)) if self._relaxations else 0.0
            if missed >= least:  # it has settled, but for rounding
                break
            found, least = factors, missed
            if left == 0:
                break
            decomposer = decomposer.with_outputs(self._wanted(ridge, covariance))
            factors = decomposer.fit(self._structure, _FOLLOWING_EVALUATIONS)
        bias = self._map(found).bias.flatten()
        return replace(found, error=error).balanced(), bias, self._moments.count

    def _relax(self, fit: GroupedFit) -> float:
        """Take the targets that cost a fit the least, and return what it costs."""
        missed = 0.0

        def relaxed() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal missed
            for samples in self._samples:
                predicted = samples.predicted(fit)
                wanted = samples.relaxed(predicted.clone())
                missed += float(
                    ((wanted - predicted) * self._scale.reshape(len(wanted), 1, -1)).square_().sum()
                )
                yield samples.inputs, wanted.transpose(0, 1)

        self._moments.replace_outputs(relaxed())
        return missed

    def _covariance(self) -> Tensor:
        return self._moments.input_covariance().float()

    def _wanted(self, ridge: float, covariance: Tensor) -> Moments:
        """What to fit: the present outputs of inputs of a covariance."""
        moments = Moments(
            covariance,
            self._moments.cross_covariance().transpose(1, 2).float(),
            self._moments.output_variance().clamp(min=0).float(),
        )
        return moments.drawn_to(self._weight, ridge) if ridge > 0 else moments

    def _map(self, factors: Factors) -> GroupedFit:
        """The linear map that factors compute, with its bias."""
        inputs, outputs = self._moments.means()
        weight = factors.weight().flatten(1).reshape(len(inputs), -1, inputs.shape[1])
        bias = torch.zeros_like(outputs)
        if self._centred:
            bias = outputs - torch.einsum("god,gd->go", weight.double(), inputs)
        return GroupedFit(weight, bias.float(), torch.zeros_like(bias))


def write_factors(sequence: nn.Module, factors: Factors) -> None:
    """Give the convs of a sequence their weights, in place."""
    weights = {"reduce": factors.reduce, "core": factors.core, "expand": factors.expand}
    for name, weight in weights.items():
        if weight is not None:
            parameter = sequence.get_parameter(f"{name}.weight")
            parameter.copy_(weight.reshape(parameter.shape))
