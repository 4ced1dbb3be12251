"""Where a fit starts: truncations in whitened coordinates, one group beside the other.

Whatever the start, the fits end at nearly the same error; a good one spares a dozen evaluations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groupify.decomposition.eigen import eigh

# The groups of a round share the leading directions of what is left by the rounds before.
_ROUNDS = 2


def mixing_start(target: Tensor, groups: int, width: int, outputs: int) -> Tensor:
    """Return the first point of a :class:`~groupify.decomposition.objectives.Mixing`.

    The leading directions of the channels are dealt out to half of the groups in turn, and each keeps
    the best outputs of its own; then what is left to the others.

    Args:
        target: the unrestricted weight in whitened coordinates, shape (O, K, I).
        groups, width, outputs: G, latents that a group reads, latents that it writes.
    """
    left, mixtures, cores = target, [], []
    missing = groups
    while missing:
        count = min(missing, -(-groups // _ROUNDS), max(1, target.shape[2] // width))
        mixture = _leading(left.flatten(0, 1), min(count * width, target.shape[2]))
        mixture = _padded(mixture, count * width).reshape(width, count, -1).transpose(0, 1)
        seen = torch.einsum("oki,gri->gokr", left, mixture).flatten(2)
        basis = _left_vectors(seen, outputs)
        core = basis.transpose(1, 2) @ seen
        mixtures.append(mixture)
        cores.append(core)
        missing -= count
        if missing:
            maps = (basis @ core).reshape(count, *target.shape[:2], width)
            left = left - torch.einsum("gokr,gri->oki", maps, mixture)
    return torch.cat([torch.cat(mixtures).flatten(), torch.cat(cores).flatten()])


def depthwise_start(target: Tensor, groups: int) -> Tensor:
    """Return the same for groups of one channel: the leading terms of the leading patterns of the positions.

    Args:
        target: the unrestricted weight in whitened coordinates, shape (O, K, I).
        groups: number of latents.
    """
    channels = target.shape[2]
    patterns, sizes, maps = torch.linalg.svd(target.transpose(0, 1).flatten(1), full_matrices=False)
    maps = (sizes[:, None] * maps).unflatten(1, (-1, channels))  # (patterns, O, I)
    energies, vectors = eigh(maps.transpose(1, 2) @ maps)
    kept = min(groups, energies.numel())
    largest = energies.clamp(min=0).flatten().topk(kept)
    of_pattern, of_channel = largest.indices // channels, largest.indices % channels
    mixture = vectors.transpose(1, 2)[of_pattern, of_channel]
    core = patterns.T[of_pattern] * largest.values.sqrt()[:, None]
    return torch.cat([_padded(part, groups).flatten() for part in (mixture, core)])


def separate_start(target: Tensor, outputs: int) -> Tensor:
    """Return the first point of a :class:`~groupify.decomposition.objectives.Separate`.

    Args:
        target: ``E[y xᵀ]`` in whitened coordinates, shape (G, O, m).
        outputs: latents that a group writes.
    """
    return (_left_vectors(target, outputs).transpose(1, 2) @ target).flatten()


def _leading(rows: Tensor, count: int) -> Tensor:
    """The directions of the rows' space that hold the most of them, shape (count, columns)."""
    _, vectors = eigh(rows.T @ rows)
    leading: Tensor = vectors[:, -count:].flip(1).T.contiguous()
    return leading


def _padded(rows: Tensor, count: int) -> Tensor:
    """Repeat rows until there are ``count``: more latents than channels in one group."""
    return rows.repeat(-(-count // len(rows)), 1)[:count]


def _left_vectors(matrices: Tensor, count: int) -> Tensor:
    """The leading left singular vectors of each matrix, shape (G, rows, count); zeros beyond the last."""
    rows, columns = matrices.shape[1:]
    if rows <= columns:
        _, vectors = eigh(matrices @ matrices.transpose(1, 2))
    else:
        _, right = eigh(matrices.transpose(1, 2) @ matrices)
        vectors = matrices @ right
        norms = vectors.norm(dim=1, keepdim=True)
        vectors = vectors / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    vectors = vectors[:, :, -count:].flip(2)
    return torch.nn.functional.pad(vectors, (0, count - vectors.shape[2]))
