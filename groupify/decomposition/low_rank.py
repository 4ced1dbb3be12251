"""Linear maps of low rank: the closed form, for all ranks at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from groupify.decomposition.cholesky import cholesky_with_ridge
from groupify.decomposition.eigen import eigh

_RIDGE = 1e-9


@dataclass(frozen=True)
class LowRank:
    """Reduced-rank regression (Izenman 1975): the best maps of each rank from x to y.

    Attributes:
        regression: the unrestricted least squares, shape (O, n).
        directions: orthonormal directions of the outputs, the most explained first, shape (O, ranks).
        explained: energy of the outputs that each direction explains, shape (ranks,).
    """

    regression: Tensor
    directions: Tensor
    explained: Tensor

    @classmethod
    def of(cls, covariance: Tensor, cross: Tensor) -> LowRank:
        """Fit from ``E[x xᵀ]``, shape (n, n), and ``E[x yᵀ]``, shape (n, O)."""
        dtype = covariance.dtype
        covariance, cross = covariance.double(), cross.double()
        regression = torch.cholesky_solve(cross, cholesky_with_ridge(covariance, _RIDGE)).T
        if cross.shape[1] <= len(covariance):
            values, vectors = eigh(_symmetric(regression @ cross))
        else:
            values, vectors = _few_inputs(regression, covariance)
        return cls(regression.to(dtype), vectors.flip(1).to(dtype), values.flip(0).clamp(min=0).to(dtype))

    def maps(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the maps down, shape (rank, n), and up, shape (O, rank); zeros beyond the full rank."""
        up = self.directions[:, :rank]
        up = torch.nn.functional.pad(up, (0, rank - up.shape[1]))
        return up.T @ self.regression, up


def least_squares(covariance: Tensor, cross: Tensor) -> Tensor:
    """Return ``E[y xᵀ] E[x xᵀ]⁻¹`` in double precision, shape (O, n); 0 where nothing varies."""
    return torch.cholesky_solve(cross.double(), cholesky_with_ridge(covariance.double(), _RIDGE)).T


def _few_inputs(regression: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The same eigenvectors from an (n, n) problem: fewer inputs than outputs."""
    root = cholesky_with_ridge(covariance, _RIDGE)
    maps = regression @ root
    values, vectors = eigh(_symmetric(maps.T @ maps))
    up = maps @ vectors
    return values, up / up.norm(dim=0).clamp(min=torch.finfo(up.dtype).tiny)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
