"""Streamed second moments, and what follows from them: least squares, principal directions."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Narrower blocks would cost the matrix product more speed than the other half of the matrix is worth.
_GRAM_BLOCK, _GRAM_BLOCKS = 128, 4


@dataclass(frozen=True)
class GroupedFit:
    """A fitted grouped linear map.

    Attributes:
        weight: shape (G, O/G, D), D = inputs per group.
        bias: shape (G, O/G).
        error: mean squared error on the moments ÷ variance, for each output; shape (G, O/G).
    """

    weight: Tensor
    bias: Tensor
    error: Tensor


class InputMoments:
    """First and second moments of the inputs of each group, summed over samples.

    Only the diagonal blocks are kept: G·D² numbers, where the full matrix would have (G·D)².
    Values are shifted by their mean over the first batch, so that the sums keep their precision
    however far the mean is from zero.

    Attributes:
        centred: whether the mean is taken off; else the second moments are those about zero.
        precision: type of the sums, and of what is computed from them.
        count: number of samples.
    """

    def __init__(self, *, centred: bool = True, precision: torch.dtype = torch.float64) -> None:
        self.centred = centred
        self.precision = precision
        self.count = 0
        self._input_shift: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Add samples, shape (n, G, D)."""
        self._add_inputs(inputs.float().transpose(0, 1))

    def input_covariance(self) -> Tensor:
        """Return ``Cov(u)`` of each group, shape (G, D, D); the second moment where not centred."""
        covariance = self._input_input / self.count
        step, width = self._step, covariance.shape[2]
        for start in range(0, width - step, step):
            block = slice(start, start + step)
            covariance[:, start + step :, block] = covariance[:, block, start + step :].transpose(1, 2)
        if self.centred:
            mean = self._input_sum / self.count
            covariance.sub_(mean.unsqueeze(2) * mean.unsqueeze(1))
        return covariance

    def _add_inputs(self, inputs: Tensor) -> Tensor:
        """Add samples, shape (G, n, D), and return them shifted."""
        if self._input_shift is None:
            groups, _, width = inputs.shape
            self._input_shift = inputs.mean(1, keepdim=True) * float(self.centred)
            self._input_input = inputs.new_zeros((groups, width, width), dtype=self.precision)
            self._input_sum = inputs.new_zeros((groups, width), dtype=self.precision)
        inputs = inputs - self._input_shift
        self.count += inputs.shape[1]
        self._add_gram(inputs)
        self._input_sum += inputs.sum(1)
        return inputs

    def _add_gram(self, inputs: Tensor) -> None:
        """Add ``UᵀU``, which is symmetric: of wide inputs only the blocks on and above the diagonal."""
        for start in range(0, inputs.shape[2], self._step):
            block = slice(start, start + self._step)
            self._input_input[:, block, start:] += torch.bmm(
                inputs[:, :, block].transpose(1, 2), inputs[:, :, start:]
            )

    @property
    def _step(self) -> int:
        """Width of the blocks of ``UᵀU``."""
        return max(_GRAM_BLOCK, -(-self._input_input.shape[2] // _GRAM_BLOCKS))


class GroupedMoments(InputMoments):
    """Moments of the inputs and outputs of each group."""

    def __init__(self, *, centred: bool = True, precision: torch.dtype = torch.float64) -> None:
        super().__init__(centred=centred, precision=precision)
        self._output_shift: Tensor | None = None
        self._known_ridge: tuple[float, Ridge] | None = None
        self._known_rough: tuple[float, Ridge] | None = None

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add samples.

        Args:
            inputs: shape (n, G, D).
            outputs: shape (n, G, O/G).
        """
        inputs, outputs = inputs.float().transpose(0, 1), outputs.float().transpose(0, 1)  # group first
        if self._output_shift is None:
            groups, _, rows = outputs.shape
            self._output_shift = outputs.mean(1, keepdim=True) * float(self.centred)
            self._output_input = inputs.new_zeros((groups, rows, inputs.shape[2]), dtype=self.precision)
            self._output_output = inputs.new_zeros((groups, rows), dtype=self.precision)
            self._output_sum = inputs.new_zeros((groups, rows), dtype=self.precision)
        self._known_ridge = self._known_rough = None
        inputs, outputs = self._add_inputs(inputs), outputs - self._output_shift
        self._output_input += torch.bmm(outputs.transpose(1, 2), inputs)
        self._output_output += outputs.square().sum(1)
        self._output_sum += outputs.sum(1)

    def replace_outputs(self, batches: Iterable[tuple[Tensor, Tensor]], *, squares: bool = True) -> None:
        """Take other outputs for the same inputs.

        Args:
            batches: (inputs, outputs) as in ``update``.
            squares: whether to sum the squared outputs; without them the error of a fit means nothing.
        """
        assert self._input_shift is not None
        assert self._output_shift is not None
        for sums in (self._output_input, self._output_output, self._output_sum):
            sums.zero_()
        for inputs, outputs in batches:
            shifted = outputs.transpose(0, 1) - self._output_shift
            total = shifted.sum(1)
            # The inputs' shift is taken off the sums: shifting all inputs again would cost a copy of them.
            self._output_input += torch.bmm(shifted.transpose(1, 2), inputs.transpose(0, 1))
            self._output_input -= total.to(self.precision).unsqueeze(2) * self._input_shift
            self._output_sum += total
            if squares:
                self._output_output += shifted.square_().sum(1)

    def fit(self, *, ridge: float, prior: Tensor | None = None, rough: bool = False) -> GroupedFit:
        """Solve the ridge regression of each group.

        Args:
            ridge: multiple of the mean input variance that is added to the diagonal.
            prior: weights that the ridge draws towards, shape (G, O/G, D); zero if None.
            rough: solve in single precision, in half the time: for a fit that is judged or improved on, and
                not kept.

        Returns:
            ``V = P + (Cov(y, u) − P Cov(u)) (Cov(u) + λI)⁻¹`` with prior P, and ``b = E[y] − V E[u]``
            (zero when not centred).
        """
        system = self._rough_ridge(ridge) if rough else self.ridge(ridge)
        precision = system.strength.dtype
        cov_yu, var_y = self.cross_covariance().to(precision), self.output_variance()
        start = torch.zeros((), dtype=precision) if prior is None else prior.to(precision)
        # (Cov(u) + λI) V = Cov(u, y) + λP is the same, and spares the product with Cov(u).
        weight = system.solve(cov_yu + system.strength * start)
        # V Cov(u) Vᵀ = V (Cov(u, y) − λ(V − P)), so the error needs no product with Cov(u) either.
        explained = (weight * (cov_yu + system.strength * (weight - start))).sum(2)
        error = (var_y - explained).clamp(min=0) / var_y.clamp(min=1e-12)
        input_mean, output_mean = self.means()
        bias = torch.zeros_like(output_mean)
        if self.centred:
            bias = output_mean - (weight @ input_mean.to(precision).unsqueeze(2)).squeeze(2)
        return GroupedFit(weight, bias, error)

    def cross_covariance(self) -> Tensor:
        """Return ``Cov(y, u)`` of each group, shape (G, O/G, D); the second moment where not centred."""
        cross = self._output_input / self.count
        if self.centred:
            cross -= (self._output_sum / self.count).unsqueeze(2) * (self._input_sum / self.count).unsqueeze(
                1
            )
        return cross

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the means of the inputs and outputs of each group, shapes (G, D) and (G, O/G)."""
        assert self._input_shift is not None, "no samples yet"
        assert self._output_shift is not None
        return (
            self._input_sum / self.count + self._input_shift.squeeze(1),
            self._output_sum / self.count + self._output_shift.squeeze(1),
        )

    def output_variance(self) -> Tensor:
        """Return the variance of each output, shape (G, O/G); the second moment where not centred."""
        variance = self._output_output / self.count
        return variance - (self._output_sum / self.count).square() if self.centred else variance

    def ridge(self, ridge: float) -> Ridge:
        """Return the factorised system of a ridge; the last one is kept until there are more samples."""
        if self._known_ridge is None or self._known_ridge[0] != ridge:
            self._known_ridge = ridge, Ridge(self.input_covariance(), ridge)
        return self._known_ridge[1]

    def _rough_ridge(self, ridge: float) -> Ridge:
        """Do the same in single precision."""
        if self._known_rough is None or self._known_rough[0] != ridge:
            if self._known_ridge is not None and self._known_ridge[0] == ridge:
                system = self._known_ridge[1].rounded()
            else:
                system = Ridge(self.input_covariance().float(), ridge)
            self._known_rough = ridge, system
        return self._known_rough[1]


class Ridge:
    """``Cov(u) + λI`` of each group, factorised.

    Args:
        covariance: ``Cov(u)``, shape (G, D, D); overwritten.
        ridge: λ as a multiple of the mean variance of a group's inputs.

    Attributes:
        strength: λ of each group, shape (G, 1, 1).
    """

    def __init__(self, covariance: Tensor, ridge: float) -> None:
        diagonal = torch.diagonal(covariance, dim1=1, dim2=2)
        # The tiny floor keeps a group of dead inputs solvable.
        strength = (ridge * diagonal.mean(1) + 1e-12 * (1 + diagonal.amax(1))).unsqueeze(1)
        diagonal.add_(strength)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        while bool(failed.any()):
            # Almost no ridge and fewer samples than inputs: rounding has made it indefinite.
            more = 9 * strength.clamp(min=1e-9 * float(diagonal.amax()))
            diagonal.add_(more)
            strength = strength + more
            factor, failed = torch.linalg.cholesky_ex(covariance)
        self.strength = strength.unsqueeze(2)
        self._factor = factor

    def rounded(self) -> Ridge:
        """Return it in single precision."""
        result = copy.copy(self)
        result.strength, result._factor = self.strength.float(), self._factor.float()
        return result

    def solve(self, cross: Tensor) -> Tensor:
        """Return the maps ``Cov(y, u) (Cov(u) + λI)⁻¹`` from ``Cov(y, u)``, both of shape (G, rows, D)."""
        return torch.cholesky_solve(cross.transpose(1, 2), self._factor).transpose(1, 2)


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
