"""Fit the factors of a structure to samples of a conv, all together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from groupify.conversion.held_out import HeldOutCheck, is_overfitted, weakest_good
from groupify.conversion.layer_samples import Part
from groupify.conversion.relaxed_fit import GroupedSamples
from groupify.conversion.surgery import conv_shape
from groupify.decomposition.decompose import EVALUATIONS, Decomposer, OutputMetric
from groupify.decomposition.factors import Factors
from groupify.decomposition.moments import Moments
from groupify.devices import double
from groupify.graph.plain_layers import Conv
from groupify.stats.moments import GroupedFit, GroupedMoments
from groupify.structures import Structure

# Enough to tell a fit that has learned its images by heart.
_CHECKING_EVALUATIONS = 12
# Enough to follow targets that have moved a little.
_FOLLOWING_EVALUATIONS = 6
# Samples that tell what relaxed targets change, at least, and for each input of a group. ResNet-18 at MACs
# ÷6.9: KL .00848; .00873 with a quarter of them in 0.94 of the time, .00831 with all in 1.15 of it.
_FOLLOWED, _FOLLOWED_PER_INPUT = 32768, 8
_CHUNK = 2048
# What the batch norm's scales add to the metric, so that no direction is free.
_OF_SCALES, _OF_ALL = 0.1, 1e-4


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
    parts: list[Part],
    scale: Tensor | None,
    *,
    metric: Tensor | None = None,
    relaxations: int,
    centred: bool,
) -> FactorFit:
    """Fit what replaces a conv to what it reads and should output.

    Fits of the images that are not held out are tried with ridges that draw towards the conv's own weights;
    the weakest is taken whose error on the held-out ones is near the least.

    Args:
        conv: the dense conv.
        structure: what replaces it; more than one conv.
        parts: what it reads and should output; used up, since the inputs of a wide conv are large.
        scale: weight of each output's error, shape (O,), where the parts are; None = 1.
        metric: what errors of the outputs cost the model, shape (O, O), see ``stats.output_metrics``; None =
            what ``scale`` says.
        relaxations: how often the targets are relaxed where a ReLU behind is off.
        centred: whether there is a bias to take the means.
    """
    signs, device = parts[0].target.signs, parts[0].inputs.device
    inputs = conv.weight[0].numel()
    every = sum(len(part.inputs) for part in parts) // max(_FOLLOWED, _FOLLOWED_PER_INPUT * inputs)
    fitting = _Fitting(conv, structure, scale, metric, signs, relaxations, centred, max(1, every), device)
    held_out = [part for part in parts if part.held_out]
    seen = [part for part in parts if not part.held_out]
    parts.clear()
    fitting.add(_taken(seen))
    check = None
    if held_out:
        check = fitting.checked(held_out)
        fitting.add(_taken(held_out))  # they have done their duty as judges
    factors, bias, count = fitting.result(0.0 if check is None else check.ridge)
    if signs is not None:
        factors, bias = factors.scaled(signs), bias * signs
    return FactorFit(factors, bias, count, check)


def _taken(parts: list[Part]) -> Iterator[Part]:
    """Hand out parts one by one, and keep none of them."""
    while parts:
        yield parts.pop(0)


class _Fitting:
    """Samples of a conv, the outputs mirrored whose ReLU is off above, and fits to them."""

    def __init__(
        self,
        conv: Conv,
        structure: Structure,
        scale: Tensor | None,
        metric: Tensor | None,
        signs: Tensor | None,
        relaxations: int,
        centred: bool,
        every: int,
        device: torch.device,
    ) -> None:
        self._every = every  # every so many samples are followed by relaxed targets
        self._shape, self._structure, self._centred = conv_shape(conv), structure, centred
        weight = conv.weight.to(device)
        self._scale = torch.ones(conv.out_channels, device=device) if scale is None else scale.abs()
        self._weight = weight.float() if signs is None else torch.einsum("o...,o->o...", weight, signs)
        self._relaxations = 0 if signs is None else relaxations
        self._roots = None if metric is None else self._roots_of(metric.to(self._scale), signs)
        self._energies = _Energies()
        self._moments = GroupedMoments(centred=centred)
        self._followed: list[GroupedSamples] = []

    def add(self, parts: Iterable[Part]) -> None:
        """Add samples to fit."""
        for samples in self._joined(map(self._grouped, parts)):
            self._moments.update(samples.inputs, samples.outputs)
            if self._roots is not None:
                self._energies.add(torch.bmm(samples.outputs.transpose(0, 1), self._roots))
            if self._relaxations:
                self._followed += samples.thinned(self._every).split(_CHUNK)

    @staticmethod
    def _joined(parts: Iterable[GroupedSamples]) -> Iterator[GroupedSamples]:
        """Join samples until they are as many as their inputs: adding up moments takes as long for few."""
        waiting: list[GroupedSamples] = []
        for part in parts:
            waiting.append(part)
            if sum(len(one.inputs) for one in waiting) >= part.inputs.shape[2]:
                yield GroupedSamples.joined(waiting)
                waiting = []
        if waiting:
            yield GroupedSamples.joined(waiting)

    def _roots_of(self, metric: Tensor, signs: Tensor | None) -> Tensor | None:
        """Cholesky factors of the metric of each group's outputs, mirrored as these are, shape (g, o, o)."""
        if signs is not None:
            metric = metric * signs[:, None] * signs
        scales = self._scale.square()
        metric = (1 - _OF_SCALES) * metric + torch.diag(_OF_SCALES * scales / scales.mean() + _OF_ALL)
        outputs = len(metric) // self._shape.groups
        blocks = [part[:, group * outputs :][:, :outputs] for group, part in enumerate(metric.split(outputs))]
        roots, failed = torch.linalg.cholesky_ex(torch.stack(blocks))
        return None if bool(failed.any()) else roots

    def _decomposer(self, moments: Moments) -> Decomposer:
        if self._roots is None:
            return Decomposer(moments, self._shape, self._scale)
        metric = OutputMetric(self._roots, self._energies.mean(centred=self._centred).to(self._roots))
        return Decomposer(moments, self._shape, self._scale, metric)

    def _grouped(self, part: Part) -> GroupedSamples:
        target, groups = part.target.mirrored(), self._shape.groups

        def grouped(values: Tensor) -> Tensor:
            return values.reshape(len(values), groups, -1)

        thresholds = None if target.thresholds is None else grouped(target.thresholds)
        return GroupedSamples(grouped(part.inputs), grouped(target.outputs), thresholds)

    def checked(self, held_out: Sequence[Part]) -> HeldOutCheck:
        """Return the check of a fit that has only begun, and the ridge that does well on held-out images."""
        judges, covariance = [self._grouped(part) for part in held_out], self._covariance()
        error, first = self._errors(judges, covariance, 0.0)
        strength, gain = weakest_good(0.0, first, lambda other: self._errors(judges, covariance, other)[1])
        return HeldOutCheck(error, first, is_overfitted(error, first), strength, gain)

    def _errors(
        self, judges: Sequence[GroupedSamples], covariance: Tensor, ridge: float
    ) -> tuple[float, float]:
        """Relative errors on the samples and on held-out ones."""
        moments = self._wanted(ridge, covariance)
        decomposer = self._decomposer(moments)
        factors = decomposer.fit(self._structure, _CHECKING_EVALUATIONS)
        fit = self._map(factors)
        scale = self._scale.reshape(self._shape.groups, 1, -1)
        left = sum(
            float(((samples.outputs.transpose(0, 1) - samples.predicted(fit)) * scale).square_().sum())
            for samples in judges
        )
        energy = float((self._moments.output_variance() * scale.squeeze(1).square()).sum())
        return decomposer.error(factors, moments), left / max(
            sum(len(samples.inputs) for samples in judges) * energy, 1e-30
        )

    def result(self, ridge: float) -> tuple[Factors, Tensor, int]:
        """Fit all samples to the end; return factors, bias and number of positions."""
        covariance = self._covariance()
        moments = self._wanted(ridge, covariance)
        decomposer = self._decomposer(moments)
        factors = decomposer.fit(self._structure, EVALUATIONS)
        found, error, moved = factors, decomposer.error(factors, moments), None
        bias, least = self._map(factors).bias, math.inf
        for left in reversed(range(self._relaxations + 1)) if self._relaxations else ():
            fit = self._map(factors, moved)
            change, missed = self._relax(fit)
            if missed < least:
                found, bias = factors, fit.bias
            if left == 0 or missed >= least:
                break
            least, moved = missed, change
            decomposer = decomposer.with_outputs(self._wanted(ridge, covariance, moved))
            factors = decomposer.fit(self._structure, _FOLLOWING_EVALUATIONS)
        return replace(found, error=error).balanced(), bias.flatten(), self._moments.count

    def _relax(self, fit: GroupedFit) -> tuple[_Change, float]:
        """Take the targets that cost a fit the least; return what they change, and what it costs."""
        inputs, outputs = (means.float() for means in self._moments.means())
        cross = torch.zeros_like(self._moments.cross_covariance())
        total, energy = torch.zeros_like(outputs, dtype=cross.dtype), torch.zeros_like(outputs)
        missed, count = 0.0, 0
        for samples in self._followed:
            predicted = samples.predicted(fit)
            wanted = samples.relaxed(predicted.clone())
            missed += float(((wanted - predicted) * self._scale.reshape(len(wanted), 1, -1)).square_().sum())
            given = samples.outputs.transpose(0, 1)
            change = wanted - given
            read = samples.inputs.transpose(0, 1)
            cross += torch.bmm(change.transpose(1, 2), read)
            total += change.sum(1)
            energy += (change * (change + 2 * (given - outputs.unsqueeze(1) * float(self._centred)))).sum(1)
            count += len(samples.inputs)
        mean = total / count
        cross = cross / count
        if self._centred:
            cross -= mean.unsqueeze(2) * inputs.unsqueeze(1)
            energy = energy - count * mean.square().float()
        return _Change(cross, energy / count, mean), missed

    def _covariance(self) -> Tensor:
        return self._moments.input_covariance().float()

    def _wanted(self, ridge: float, covariance: Tensor, moved: _Change | None = None) -> Moments:
        """What to fit: the given outputs of inputs of a covariance, or what they have become."""
        cross, energy = self._moments.cross_covariance(), self._moments.output_variance()
        if moved is not None:
            cross, energy = cross + moved.cross, energy + moved.energy
        moments = Moments(covariance, cross.transpose(1, 2).float(), energy.clamp(min=0).float())
        return moments.drawn_to(self._weight, ridge) if ridge > 0 else moments

    def _map(self, factors: Factors, moved: _Change | None = None) -> GroupedFit:
        """The linear map that factors compute, with its bias."""
        inputs, outputs = self._moments.means()
        if moved is not None:
            outputs = outputs + moved.mean
        weight = factors.weight().flatten(1).reshape(len(inputs), -1, inputs.shape[1])
        bias = torch.zeros_like(outputs)
        if self._centred:
            bias = outputs - torch.einsum("god,gd->go", weight.double(), inputs)
        return GroupedFit(weight, bias.float(), torch.zeros_like(bias))


class _Energies:
    """Sums of values and of their squares, for each group."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, Tensor, Tensor]] = []

    def add(self, values: Tensor) -> None:
        """Add samples, shape (g, n, o)."""
        values = double(values)
        self._sums.append((values.shape[1], values.sum(1), values.square().sum((1, 2))))

    def mean(self, *, centred: bool) -> Tensor:
        """Mean squared length of a group's values, about their mean where that is taken off, shape (g,)."""
        count = sum(count for count, _, _ in self._sums)
        squares = sum((squares for _, _, squares in self._sums), torch.zeros(())) / count
        if not centred:
            return squares
        return squares - (sum((total for _, total, _ in self._sums), torch.zeros(())) / count).square().sum(1)


@dataclass(frozen=True)
class _Change:
    """By how much relaxed targets change the moments of the outputs.

    Attributes:
        cross: with the inputs, shape (g, O/g, n).
        energy, mean: of the outputs, shape (g, O/g).
    """

    cross: Tensor
    energy: Tensor
    mean: Tensor


def write_factors(sequence: nn.Module, factors: Factors) -> None:
    """Give the convs of a sequence their weights, in place."""
    weights = {"reduce": factors.reduce, "core": factors.core, "expand": factors.expand}
    for name, weight in weights.items():
        if weight is not None:
            parameter = sequence.get_parameter(f"{name}.weight")
            parameter.copy_(weight.reshape(parameter.shape))
