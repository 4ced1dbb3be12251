"""The principal output directions of each input group of a conv."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_maps(weight: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """Return the best rank-r map of each input group: which r numbers to compute from its inputs.

    Of group g's share ``W_g u_g`` of the output, the projection on the first r eigenvectors U of
    ``W_g Cov(u_g) W_gᵀ`` keeps the most, so the map is ``Uᵀ W_g``.

    Args:
        weight: shape (G, O, D), the share of the dense weight that reads each group.
        covariance: of the inputs of each group, shape (G, D, D).
        rank: r.

    Returns:
        Shape (G, r, D); zero rows where the rank exceeds D.
    """
    outputs, inputs = weight.shape[1:]
    if outputs <= inputs:
        _, vectors = torch.linalg.eigh(weight @ covariance @ weight.transpose(1, 2))
        first: Tensor = vectors[:, :, -rank:].transpose(1, 2) @ weight
        return first
    # Few inputs (a depthwise conv): with Cov = L Lᵀ and W L = U S Vᵀ the map is Uᵀ W = S⁻¹ Vᵀ Lᵀ Wᵀ W,
    # and V comes from the small Lᵀ Wᵀ W L.
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(1)  # (G, D, D), Cov = root rootᵀ
    gram = weight.transpose(1, 2) @ weight
    values, vectors = torch.linalg.eigh(root.transpose(1, 2) @ gram @ root)
    kept = min(rank, inputs)
    values, vectors = values[:, -kept:], vectors[:, :, -kept:]
    scale = torch.rsqrt(values.clamp(min=1e-300)).where(values > 1e-14 * values[:, -1:], 0.0)
    maps: Tensor = scale.unsqueeze(2) * (vectors.transpose(1, 2) @ root.transpose(1, 2) @ gram)
    if kept < rank:
        maps = torch.cat([maps.new_zeros(len(maps), rank - kept, inputs), maps], 1)
    return maps
