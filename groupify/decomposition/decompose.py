"""Fit the factors of a structure to the moments of one conv.

All three factors are fitted together: whitened coordinates, a start by truncation, and L-BFGS with the
last factor solved inside. Structures without a middle have closed forms. The block-term decomposition is
that of De Lathauwer (2008); Tucker-2 is its one group, a depthwise core (CP) its other end.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groupify.decomposition.factors import Factors
from groupify.decomposition.moments import Moments
from groupify.decomposition.problem import Inputs, Part, Problem, joined, sums
from groupify.errors import ConversionError
from groupify.structures import ConvShape, Structure

# Most fits settle before. ResNet-18 at MACs ÷6.9: a KL divergence of .0079 where 60 leave .0087, a seventh
# slower.
EVALUATIONS = 240
# An output that the next layer hardly reads is still wanted, a little.
_LEAST_SCALE = 1e-3
# What the evaluations to come gain, as a multiple of what the second half of the first 8 to 12 gained:
# measured on 48 fits, where it predicts the error after 60 to 7% (rms).
_STILL_TO_GAIN = 1.5


def decompose(
    moments: Moments,
    conv: ConvShape,
    structure: Structure,
    scale: Tensor | None = None,
    *,
    evaluations: int = EVALUATIONS,
) -> Factors:
    """Return the factors of a structure with the least error, balanced.

    Args:
        moments: of the conv's inputs and wanted outputs; their precision is that of the fit. Single
            precision, centred, is enough down to relative errors of about 1e-5.
        conv: its shape.
        structure: what replaces it.
        scale: weight of each output's error, shape (O,): a batch norm's scale over its deviation; None = 1.
        evaluations: how many the iteration may use, for each group of the conv; 20 come within 15% of the
            error that 200 reach, 60 within 5%.

    Raises:
        PlanError: the structure does not suit the conv.
    """
    return Decomposer(moments, conv, scale).fit(structure, evaluations).balanced()


@dataclass(frozen=True)
class OutputMetric:
    """What errors of a conv's outputs cost: a quadratic form ``eᵀ M e`` for each of its groups.

    Attributes:
        roots: Cholesky factors L of ``M = L Lᵀ``, shape (g, O/g, O/g), lower triangles.
        energy: ``E[yᵀ M y]`` of the wanted outputs, shape (g,); no more than a scale is asked of it.
    """

    roots: Tensor
    energy: Tensor

    def back(self, group: int, maps: Tensor) -> Tensor:
        """Return maps (O/g, …) to the outputs y from maps to Lᵀ y."""
        flat: Tensor = torch.linalg.solve_triangular(self.roots[group].T, maps.flatten(1), upper=True)
        return flat.reshape(maps.shape)


class Decomposer:
    """One conv's problem, ready to be fitted by many structures: what they share is computed once.

    Args:
        moments: as for :func:`decompose`.
        conv: as for :func:`decompose`.
        scale: as for :func:`decompose`.
        metric: what errors cost, in the place of ``scale``, for structures whose last factor mixes all
            outputs of a group; None = ``scale`` for these too.
    """

    def __init__(
        self,
        moments: Moments,
        conv: ConvShape,
        scale: Tensor | None = None,
        metric: OutputMetric | None = None,
    ) -> None:
        outputs = conv.out_channels // conv.groups
        expected = (conv.groups, conv.in_channels // conv.groups * conv.positions, outputs)
        if moments.cross.shape != expected:
            raise ConversionError(
                f"moments of shape {tuple(moments.cross.shape)} for a {conv}; expected {expected}"
            )
        weights = torch.ones(conv.out_channels) if scale is None else scale.abs()
        weights = weights.to(moments.cross).reshape(conv.groups, outputs)
        largest = weights.max().clamp(min=torch.finfo(weights.dtype).tiny)
        weights = weights.clamp(min=_LEAST_SCALE * largest)
        self.conv = conv
        self._scale, self._metric = weights, metric
        self._energy = float((moments.energy * weights.square()).double().sum())
        inputs = [
            Inputs(covariance, conv.in_channels // conv.groups, positive=moments.positive)
            for covariance in moments.covariance
        ]
        self._problems = [Problem(*part) for part in zip(inputs, *self._weighted(moments), strict=True)]
        self._mixed = (
            []
            if metric is None
            else [Problem(*part) for part in zip(inputs, *self._under_metric(moments), strict=True)]
        )

    def _weighted(self, moments: Moments) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs times their scales: ``E[x yᵀ]`` and energies of each group."""
        pairs = zip(moments.cross, moments.energy, self._scale, strict=True)
        weighted = [(cross * weight, energies * weight.square()) for cross, energies, weight in pairs]
        return [cross for cross, _ in weighted], [energies for _, energies in weighted]

    def _under_metric(self, moments: Moments) -> tuple[list[Tensor], list[Tensor]]:
        """The same of the outputs in coordinates whose squared errors add up to what they cost."""
        assert self._metric is not None
        crosses = [cross @ root for cross, root in zip(moments.cross, self._metric.roots, strict=True)]
        return crosses, list(self._metric.energy.unsqueeze(1))

    def with_outputs(self, moments: Moments) -> Decomposer:
        """Return the one of the same inputs with other outputs, whose fits start where these have ended."""
        other = copy.copy(self)
        other._energy = float((moments.energy * self._scale.square()).double().sum())
        other._problems = [
            problem.with_outputs(*part)
            for problem, *part in zip(self._problems, *self._weighted(moments), strict=True)
        ]
        if self._mixed:
            other._mixed = [
                problem.with_outputs(*part)
                for problem, *part in zip(self._mixed, *self._under_metric(moments), strict=True)
            ]
        return other

    def fit(self, structure: Structure, evaluations: int = EVALUATIONS) -> Factors:
        """Return the factors with the least error, as they come; that under the metric where it applies.

        Raises:
            PlanError: the structure does not suit the conv.
        """
        structure.check(self.conv)
        share = structure.share(self.conv.groups)
        mixes = structure.expand is not None or structure.groups == self.conv.groups
        energy = self._energy
        if self._metric is not None and mixes:
            fits = [problem.fit(share, evaluations) for problem in self._mixed]
            part = joined([self._back(group, fit) for group, fit in enumerate(fits)])
            energy = float(self._metric.energy.double().sum())
        else:
            fits = [problem.fit(share, evaluations) for problem in self._problems]
            part = joined([_divided(fit, scale) for fit, scale in zip(fits, self._scale, strict=True)])
        kernel = self.conv.kernel_size
        ones = [1] * len(kernel)
        reduce = None if part.reduce is None else part.reduce.unflatten(1, (-1, *ones))
        expand = None if part.expand is None else part.expand.unflatten(1, (-1, *ones))
        core = part.core.unflatten(2, kernel)
        return Factors(
            reduce, core, expand, structure.groups, self.conv.groups, _relative(part.left[-1], energy)
        )

    def _back(self, group: int, part: Part) -> Part:
        """Factors of the outputs from those of the outputs under the metric."""
        assert self._metric is not None
        if part.expand is None:
            return replace(part, core=self._metric.back(group, part.core))
        return replace(part, expand=self._metric.back(group, part.expand))

    def error(self, factors: Factors, moments: Moments) -> float:
        """Return the relative error of factors on the moments of a fit, each output weighted by its scale."""
        maps = factors.weight().flatten(1).reshape(*moments.energy.shape, -1)  # (g, O/g, n)
        answered = torch.bmm(maps, moments.covariance)
        missed = moments.energy + (maps * (answered - 2 * moments.cross.transpose(1, 2))).sum(2)
        return _relative(float((missed * self._scale.square()).double().sum()), self._energy)

    def estimate(self, structure: Structure, evaluations: int) -> float:
        """Return the error that a fit to the end is expected to leave, from the first few evaluations.

        Raises:
            PlanError: the structure does not suit the conv.
        """
        structure.check(self.conv)
        share = structure.share(self.conv.groups)
        left = sums([problem.left(share, evaluations) for problem in self._problems])
        if len(left) < evaluations:  # it has settled before
            return _relative(left[-1], self._energy)
        gained = left[evaluations // 2 - 1] - left[-1]
        return _relative(max(left[-1] - _STILL_TO_GAIN * gained, left[-1] / 2), self._energy)


def _relative(left: float, energy: float) -> float:
    return max(left, 0.0) / energy if energy > 0 else 0.0


def _divided(part: Part, scale: Tensor) -> Part:
    """Factors of the outputs from those of the outputs times their scales."""
    if part.expand is None:
        return replace(part, core=part.core / scale[:, None, None])
    return replace(part, expand=part.expand / scale[:, None])
