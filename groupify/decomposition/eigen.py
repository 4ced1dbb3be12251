"""Eigenvectors of symmetric matrices, also of those that the fast algorithm does not converge on."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, rising, and the eigenvectors of symmetric matrices.

    LAPACK's divide and conquer may fail on matrices of low rank, as those of few samples or of dead channels
    are; its QR algorithm, in float64, does not.

    Args:
        matrices: shape (..., n, n).

    Returns:
        Shapes (..., n) and (..., n, n).
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        exact = matrices.detach().cpu().double()
        flat = exact.flatten(0, -3) if matrices.dim() > 2 else exact[None]
        found = [scipy.linalg.eigh(matrix.numpy(), driver="ev") for matrix in flat]
        values, vectors = (torch.from_numpy(np.stack(part)).to(matrices) for part in zip(*found, strict=True))
        return values.reshape(matrices.shape[:-1]), vectors.reshape(matrices.shape)
    return values, vectors
