"""Fit the factors of a structure to the moments of one conv.

All three factors are fitted together: whitened coordinates, a start by truncation, and L-BFGS with the
last factor solved inside. Structures without a middle have closed forms. The block-term decomposition is
that of De Lathauwer (2008); Tucker-2 is its one group, a depthwise core (CP) its other end.
"""

from __future__ import annotations

import copy

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


class Decomposer:
    """One conv's problem, ready to be fitted by many structures: what they share is computed once.

    Args:
        moments: as for :func:`decompose`.
        conv: as for :func:`decompose`.
        scale: as for :func:`decompose`.
    """

    def __init__(self, moments: Moments, conv: ConvShape, scale: Tensor | None = None) -> None:
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
        self._scale = weights
        self._energy = float((moments.energy * weights.square()).double().sum())
        self._problems = [
            Problem(
                Inputs(covariance, conv.in_channels // conv.groups),
                cross * weight,
                energies * weight.square(),
            )
            for covariance, cross, energies, weight in zip(
                moments.covariance, moments.cross, moments.energy, weights, strict=True
            )
        ]

    def with_outputs(self, moments: Moments) -> Decomposer:
        """Return the one of the same inputs with other outputs, whose fits start where these have ended."""
        other = copy.copy(self)
        other._energy = float((moments.energy * self._scale.square()).double().sum())
        other._problems = [
            problem.with_outputs(cross * weight, energies * weight.square())
            for problem, cross, energies, weight in zip(
                self._problems, moments.cross, moments.energy, self._scale, strict=True
            )
        ]
        return other

    def fit(self, structure: Structure, evaluations: int = EVALUATIONS) -> Factors:
        """Return the factors with the least error, as they come.

        Raises:
            PlanError: the structure does not suit the conv.
        """
        part = self._fit(structure, evaluations)
        kernel = self.conv.kernel_size
        ones = [1] * len(kernel)
        core, expand = part.core.unflatten(2, kernel), part.expand
        if expand is None:
            core = core / self._scale.reshape(-1, 1, *ones)
        else:
            expand = (expand / self._scale.reshape(-1, 1)).unflatten(1, (-1, *ones))
        reduce = None if part.reduce is None else part.reduce.unflatten(1, (-1, *ones))
        return Factors(
            reduce, core, expand, structure.groups, self.conv.groups, self._relative(part.left[-1])
        )

    def estimate(self, structure: Structure, evaluations: int) -> float:
        """Return the error that a fit to the end is expected to leave, from the first few evaluations.

        Raises:
            PlanError: the structure does not suit the conv.
        """
        structure.check(self.conv)
        share = structure.share(self.conv.groups)
        left = sums([problem.left(share, evaluations) for problem in self._problems])
        if len(left) < evaluations:  # it has settled before
            return self._relative(left[-1])
        gained = left[evaluations // 2 - 1] - left[-1]
        return self._relative(max(left[-1] - _STILL_TO_GAIN * gained, left[-1] / 2))

    def _fit(self, structure: Structure, evaluations: int) -> Part:
        structure.check(self.conv)
        share = structure.share(self.conv.groups)
        return joined([problem.fit(share, evaluations) for problem in self._problems])

    def _relative(self, left: float) -> float:
        return max(left, 0.0) / self._energy if self._energy > 0 else 0.0
