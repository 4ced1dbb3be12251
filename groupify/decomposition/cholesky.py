"""What is positive definite but for rounding: its Cholesky factor, and the least that makes it so."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky_with_ridge(matrices: Tensor, ridge: float) -> Tensor:
    """Return the lower factors of symmetric matrices and a ridge, which grows tenfold until there is one.

    Args:
        matrices: shape (..., n, n).
        ridge: what is added to the diagonal, a multiple of its mean.

    Returns:
        Shape (..., n, n).
    """
    return _positive(matrices, ridge)[1]


def made_positive(covariance: Tensor) -> Tensor:
    """Return a covariance with hardly more on its diagonal than makes it positive.

    Sums of products in single precision have eigenvalues below zero where variances differ by more than that
    precision tells apart. Whitening would blow these up, and a fit find outputs there that no inputs explain.

    Args:
        covariance: symmetric, shape (n, n).
    """
    return _positive(covariance, torch.finfo(covariance.dtype).eps)[0]


def _positive(matrices: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The matrices with the least ridge that gives them Cholesky factors, and these."""
    tiny = torch.finfo(torch.float32).tiny
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp(min=0)
    while True:
        ridged = matrices.clone()
        ridged.diagonal(dim1=-2, dim2=-1).add_(ridge * mean + tiny)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not bool(failed.any()):
            return ridged, factor
        ridge, tiny = 10 * ridge, 10 * tiny
