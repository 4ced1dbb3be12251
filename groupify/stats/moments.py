"""Streamed second moments, and the least-squares fit of a grouped conv from them."""

from __future__ import annotations

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


class GroupedMoments:
    """First and second moments of the inputs and outputs of each group, summed over samples.

    Only the diagonal blocks are kept: G·D² numbers, where the full matrix would have (G·D)².
    Values are shifted by their mean over the first batch, so that the sums keep their precision in
    float64 however far the mean is from zero.
    """

    def __init__(self, *, centred: bool = True) -> None:
        self.centred = centred
        self.count = 0
        self._input_shift: Tensor | None = None
        self._output_shift: Tensor | None = None
        self._factor: tuple[float, Tensor, Tensor] | None = None  # ridge, Cholesky factor, strength

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add samples.

        Args:
            inputs: shape (n, G, D).
            outputs: shape (n, G, O/G).
        """
        inputs, outputs = inputs.float().transpose(0, 1), outputs.float().transpose(0, 1)  # group first
        if self._input_shift is None or self._output_shift is None:
            groups, _, width = inputs.shape
            rows = outputs.shape[2]
            self._input_shift = inputs.mean(1, keepdim=True) * float(self.centred)
            self._output_shift = outputs.mean(1, keepdim=True) * float(self.centred)
            self.input_input = inputs.new_zeros((groups, width, width), dtype=torch.float64)
            self.output_input = inputs.new_zeros((groups, rows, width), dtype=torch.float64)
            self.output_output = inputs.new_zeros((groups, rows), dtype=torch.float64)
            self.input_sum = inputs.new_zeros((groups, width), dtype=torch.float64)
            self.output_sum = inputs.new_zeros((groups, rows), dtype=torch.float64)
        inputs, outputs = inputs - self._input_shift, outputs - self._output_shift
        self.count += inputs.shape[1]
        self._factor = None
        self._add_gram(inputs)
        self.output_input += torch.bmm(outputs.transpose(1, 2), inputs)
        self.output_output += outputs.square().sum(1)
        self.input_sum += inputs.sum(1)
        self.output_sum += outputs.sum(1)

    def _add_gram(self, inputs: Tensor) -> None:
        """Add ``UᵀU``, which is symmetric: of wide inputs only the blocks above the diagonal are computed."""
        width = inputs.shape[2]
        step = max(_GRAM_BLOCK, -(-width // _GRAM_BLOCKS))
        for start in range(0, width, step):
            block = slice(start, start + step)
            product = torch.bmm(inputs[:, :, block].transpose(1, 2), inputs[:, :, start:])
            self.input_input[:, block, start:] += product
            self.input_input[:, start + step :, block] += product[:, :, step:].transpose(1, 2)

    def replace_outputs(self, batches: Iterable[tuple[Tensor, Tensor]], *, squares: bool = True) -> None:
        """Take other outputs for the same inputs.

        Args:
            batches: (inputs, outputs) as in ``update``.
            squares: whether to sum the squared outputs; without them the error of a fit means nothing.
        """
        assert self._input_shift is not None
        assert self._output_shift is not None
        for sums in (self.output_input, self.output_output, self.output_sum):
            sums.zero_()
        for inputs, outputs in batches:
            shifted = outputs.transpose(0, 1) - self._output_shift
            total = shifted.sum(1)
            # The inputs' shift is taken off the sums: shifting all inputs again would cost a copy of them.
            self.output_input += torch.bmm(shifted.transpose(1, 2), inputs.transpose(0, 1))
            self.output_input -= total.double().unsqueeze(2) * self._input_shift
            self.output_sum += total
            if squares:
                self.output_output += shifted.square_().sum(1)

    def fit(self, *, ridge: float, prior: Tensor | None = None) -> GroupedFit:
        """Solve the ridge regression of each group.

        Args:
            ridge: multiple of the mean input variance that is added to the diagonal.
            prior: weights that the ridge draws towards, shape (G, O/G, D); zero if None.

        Returns:
            ``V = P + (Cov(y, u) − P Cov(u)) (Cov(u) + λI)⁻¹`` with prior P, and ``b = E[y] − V E[u]``
            (zero when not centred).
        """
        assert self._input_shift is not None, "no samples yet"
        assert self._output_shift is not None
        input_mean, output_mean = self.input_sum / self.count, self.output_sum / self.count
        cov_yu = self.output_input / self.count
        var_y = self.output_output / self.count
        if self.centred:
            cov_yu -= output_mean.unsqueeze(2) * input_mean.unsqueeze(1)
            var_y -= output_mean.square()
        factor, strength = self._factorise(ridge)
        start = torch.zeros((), dtype=torch.float64) if prior is None else prior.double()
        # (Cov(u) + λI) V = Cov(u, y) + λP is the same, and spares the product with Cov(u).
        target = cov_yu + strength * start
        weight = torch.cholesky_solve(target.transpose(1, 2), factor).transpose(1, 2)
        # V Cov(u) Vᵀ = V (Cov(u, y) − λ(V − P)), so the error needs no product with Cov(u) either.
        explained = (weight * (cov_yu + strength * (weight - start))).sum(2)
        error = (var_y - explained).clamp(min=0) / var_y.clamp(min=1e-12)
        if self.centred:
            input_mean = input_mean + self._input_shift.squeeze(1)
            output_mean = output_mean + self._output_shift.squeeze(1)
            bias = output_mean - (weight @ input_mean.unsqueeze(2)).squeeze(2)
        else:
            bias = torch.zeros_like(output_mean)
        return GroupedFit(weight, bias, error)

    def input_covariance(self, *, centred: bool = True) -> Tensor:
        """Return ``Cov(u)`` of each group, shape (G, D, D); not centred, the second moment."""
        covariance = self.input_input / self.count
        if centred:
            mean = self.input_sum / self.count
            covariance -= mean.unsqueeze(2) * mean.unsqueeze(1)
        return covariance

    def _factorise(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Cholesky factor of ``Cov(u) + λI``, shape (G, D, D), and λ, shape (G, 1, 1)."""
        if self._factor is None or self._factor[0] != ridge:
            covariance = self.input_covariance(centred=self.centred)
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
            self._factor = ridge, factor, strength.unsqueeze(2)
        return self._factor[1:]
