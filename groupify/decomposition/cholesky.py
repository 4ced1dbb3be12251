"""A Cholesky factor of what is positive definite but for rounding."""

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
    size, tiny = matrices.shape[-1], torch.finfo(torch.float32).tiny
    identity = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=0)
    while True:
        factor, failed = torch.linalg.cholesky_ex(matrices + (ridge * mean + tiny) * identity)
        if not bool(failed.any()):
            found: Tensor = factor
            return found
        ridge, tiny = 10 * ridge, 10 * tiny
