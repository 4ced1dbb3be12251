"""The error of a structure as a function of its factors, the last factor solved inside.

Variable projection (Golub and Pereyra 1973): for given latents h the best expand is a least squares
``B = E[y hᵀ] E[h hᵀ]⁻¹``, so only the factors before it are searched for, and at its optimum B adds
nothing to their gradient. An evaluation costs about one product of the latents' maps with the covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from groupify.decomposition.cholesky import cholesky_with_ridge
from groupify.decomposition.minimise import Evaluation
from groupify.decomposition.whitening import ByChannel, ByGroup

_DAMPING = 1e-2


@dataclass(frozen=True)
class Expand:
    """The last factor at its optimum.

    Attributes:
        weight: Bᵀ, shape (S, O).
        gram: Bᵀ B, shape (S, S).
        error: what is left of the outputs' energy of 1.
    """

    weight: Tensor
    gram: Tensor
    error: float

    @classmethod
    def solve(cls, latents: Tensor, cross: Tensor) -> Expand:
        """Solve for the expand from ``E[h hᵀ]``, shape (S, S), and ``E[h yᵀ]``, shape (S, O)."""
        system = (latents + latents.T) / 2
        factor = cholesky_with_ridge(system, 10 * torch.finfo(system.dtype).eps)
        weight = torch.cholesky_solve(cross, factor)
        return cls(weight, weight @ weight.T, 1 - float((weight.double() * cross.double()).sum()))

    def slope(self, seen: Tensor, cross: Tensor) -> Tensor:
        """Return the error's slope along the latents' maps, ``2 Bᵀ (B E[h xᵀ] − E[y xᵀ])``, shape (S, n).

        Args:
            seen: ``E[h xᵀ]``, shape (S, n).
            cross: ``E[y xᵀ]``, shape (O, n).
        """
        latents, outputs = self.weight.shape
        if outputs < latents:
            return 2 * self.weight @ (self.weight.T @ seen - cross)
        return 2 * (self.gram @ seen - self.weight @ cross)


class Mixing:
    """Latents of groups that read any mixture of the channels: ``h = C (A ⊗ 1) x``.

    A point is A, shape (G, r, I), and C, shape (G, s, K, r), in one vector.

    Args:
        inputs: the whitened inputs.
        cross: ``E[x yᵀ]`` in their coordinates, shape (K·I, O); y has an energy of 1.
        groups, width, outputs: G, r and s.
    """

    def __init__(self, inputs: ByChannel, cross: Tensor, groups: int, width: int, outputs: int) -> None:
        self._covariance, self._cross = inputs.covariance, cross
        self._channels, self._positions = len(inputs.channels), len(inputs.positions)
        self._groups, self._width, self._outputs = groups, width, outputs

    def split(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and C; C with shape (G, s·K, r)."""
        count = self._groups * self._width * self._channels
        mixture = point[:count].reshape(self._groups, self._width, self._channels)
        return mixture, point[count:].reshape(self._groups, -1, self._width)

    def expand(self, point: Tensor) -> Expand:
        """Return the last factor at a point."""
        return self._solve(point)[0]

    def evaluate(self, point: Tensor) -> Evaluation:
        """Return the error at a point, and what a step from it needs."""
        expand, seen = self._solve(point)
        mixture, core = self.split(point)
        slope = expand.slope(seen, self._cross.T).reshape(self._groups, -1, self._channels)
        gradient = _joined(core.transpose(1, 2) @ slope, slope @ mixture.transpose(1, 2))
        return Evaluation(point, expand.error, gradient, self._preconditioner(point, expand))

    def _solve(self, point: Tensor) -> tuple[Expand, Tensor]:
        """The expand, and ``E[h xᵀ]``, shape (S, K·I)."""
        mixture, core = self.split(point)
        core = core.reshape(self._groups, self._outputs, -1)
        seen = (core @ self._read(mixture, self._covariance)).flatten(0, 1)
        latents = core @ self._read(mixture, seen.T)
        return Expand.solve(
            latents.flatten(0, 1), (core @ self._read(mixture, self._cross)).flatten(0, 1)
        ), seen

    def _read(self, mixture: Tensor, columns: Tensor) -> Tensor:
        """``(A_g ⊗ 1)`` times a matrix, shape (K·I, m), of each group; shape (G, K·r, m).

        There are fewer channels to read than latents to write, so this comes before the core.
        """
        read: Tensor = mixture.flatten(0, 1) @ columns.reshape(self._positions, self._channels, -1)
        read = read.unflatten(1, (self._groups, self._width)).transpose(0, 1)
        return read.flatten(1, 2)

    def _preconditioner(self, point: Tensor, expand: Expand) -> Callable[[Tensor], Tensor]:
        """Blocks of the Hessian for inputs of covariance 1, which these nearly have."""
        mixture, core = self.split(point)
        gram = _blocks(expand.gram, self._groups)
        weighted = (gram @ core.reshape(self._groups, self._outputs, -1)).reshape(core.shape)
        of_mixture = _factor(weighted.transpose(1, 2) @ core)
        of_outputs, of_latents = _factor(gram), _factor(mixture @ mixture.transpose(1, 2))

        def precondition(vector: Tensor) -> Tensor:
            for_mixture, for_core = self.split(vector)
            by_output = for_core.reshape(self._groups, self._outputs, -1)
            by_output = torch.cholesky_solve(by_output, of_outputs).reshape(core.shape)
            by_latent = torch.cholesky_solve(by_output.transpose(1, 2), of_latents).transpose(1, 2)
            return _joined(torch.cholesky_solve(for_mixture, of_mixture), by_latent) / 2

        return precondition


class Separate:
    """Latents of groups that read their own channels: ``h_g = C_g x_g``.

    A point is C, shape (G, s, m), in one vector; m = inputs of a group.

    Args:
        inputs: the whitened inputs.
        cross: ``E[x yᵀ]`` in their coordinates, shape (G·m, O); y has an energy of 1.
    """

    def __init__(self, inputs: ByGroup, cross: Tensor) -> None:
        self._covariance = inputs.covariance
        self._groups, self._inputs = inputs.covariance.shape[:2]
        self._cross = cross.reshape(self._groups, self._inputs, -1)

    def split(self, point: Tensor) -> Tensor:
        """Return C."""
        return point.reshape(self._groups, -1, self._inputs)

    def expand(self, point: Tensor) -> Expand:
        """Return the last factor at a point."""
        return self._solve(point)[0]

    def evaluate(self, point: Tensor) -> Evaluation:
        """Return the error at a point, and what a step from it needs."""
        expand, seen = self._solve(point)
        grams = expand.gram.reshape(self._groups, -1, len(expand.gram))
        weights = expand.weight.reshape(self._groups, -1, self._cross.shape[2])
        gradient = 2 * (grams @ seen - weights @ self._cross.transpose(1, 2))
        factor = _factor(_blocks(expand.gram, self._groups))

        def precondition(vector: Tensor) -> Tensor:
            return torch.cholesky_solve(self.split(vector), factor).flatten() / 2

        return Evaluation(point, expand.error, gradient.flatten(), precondition)

    def _solve(self, point: Tensor) -> tuple[Expand, Tensor]:
        """The expand, and ``E[h x_gᵀ]`` of all latents with the inputs of each group, shape (G, S, m)."""
        core = self.split(point)
        seen = (core @ self._covariance).reshape(-1, self._groups, self._inputs).transpose(0, 1)
        latents = (seen @ core.transpose(1, 2)).transpose(0, 1).flatten(1)
        return Expand.solve(latents, (core @ self._cross).flatten(0, 1)), seen


def _joined(mixture: Tensor, core: Tensor) -> Tensor:
    return torch.cat([mixture.flatten(), core.flatten()])


def _blocks(matrix: Tensor, groups: int) -> Tensor:
    """The diagonal blocks of a square matrix, shape (G, s, s)."""
    width = len(matrix) // groups
    return matrix.reshape(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _factor(matrices: Tensor) -> Tensor:
    """Cholesky factors of damped matrices, shape (G, n, n); one that is zero counts like a small one."""
    scale = matrices.diagonal(dim1=1, dim2=2).mean(1)
    added = _DAMPING * (scale + _DAMPING * scale.mean()) + torch.finfo(matrices.dtype).tiny
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    factor: Tensor = torch.linalg.cholesky(matrices + added[:, None, None] * identity)
    return factor
