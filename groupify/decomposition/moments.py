"""What a decomposition is fitted to: second moments of a conv's unfolded inputs and of its wanted outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from groupify.errors import ConversionError

# What a ridge lifts all eigenvalues above what rounding leaves below zero.
_POSITIVE = 1e-4


@dataclass(frozen=True)
class Moments:
    """Centred second moments of a conv with g groups, each with n = I/g · positions inputs and O/g outputs.

    Inputs are ordered as in ``weight.flatten(1)``: the kernel's positions of the first channel first.
    With the dense net's own outputs this is the plain problem; with the student's inputs and the
    teacher's outputs it is the fit in order. Biases are no part of it: they follow from the means.

    Attributes:
        covariance: ``E[x xᵀ]``, shape (g, n, n).
        cross: ``E[x yᵀ]``, shape (g, n, O/g).
        energy: ``E[y²]``, shape (g, O/g).
        positive: whether the covariance is known to be positive definite by far more than it is rounded.
    """

    covariance: Tensor
    cross: Tensor
    energy: Tensor
    positive: bool = False

    def __post_init__(self) -> None:
        groups, inputs, outputs = self.cross.shape
        if self.covariance.shape != (groups, inputs, inputs) or self.energy.shape != (groups, outputs):
            raise ConversionError(
                f"moments of shapes {tuple(self.covariance.shape)}, {tuple(self.cross.shape)} and "
                f"{tuple(self.energy.shape)} do not belong together; expected (g, n, n), (g, n, o) and (g, o)"
            )
        # Of a sum, since a mask of all inputs with all inputs would take as long as a step of the fit.
        if not all(math.isfinite(part.sum()) for part in (self.covariance, self.cross, self.energy)):
            raise ConversionError("moments are NaN or infinite; check the activations that they come from")

    @classmethod
    def of_weight(cls, weight: Tensor, covariance: Tensor) -> Moments:
        """Return the moments of a conv's own outputs.

        Args:
            weight: shape (O, I/g, *kernel).
            covariance: of its inputs, shape (g, n, n).
        """
        groups, inputs, _ = covariance.shape
        maps = weight.detach().to(covariance).reshape(groups, -1, inputs)
        cross = covariance @ maps.transpose(1, 2)
        return cls(covariance, cross, (maps.transpose(1, 2) * cross).sum(1))

    def drawn_to(self, weight: Tensor, ridge: float) -> Moments:
        """Return moments to which samples were added that the conv of ``weight`` answers exactly.

        A fit on few samples is drawn towards these weights, as by a ridge, and nothing towards zero.

        Args:
            weight: shape (O, I/g, *kernel).
            ridge: variance of the added samples, a multiple of the mean variance of the inputs.
        """
        groups, inputs, _ = self.covariance.shape
        maps = weight.detach().to(self.covariance).reshape(groups, -1, inputs).transpose(1, 2)
        covariance = self.covariance.clone()
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        strength = ridge * diagonal.mean(1)[:, None, None]
        diagonal += strength[:, 0]
        return Moments(
            covariance,
            self.cross + strength * maps,
            self.energy + strength[:, 0] * maps.square().sum(1),
            positive=ridge > _POSITIVE,
        )
