"""Streamed second moments, and the least-squares fit of a grouped conv from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


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
        self.input_input += torch.bmm(inputs.transpose(1, 2), inputs)
        self.output_input += torch.bmm(outputs.transpose(1, 2), inputs)
        self.output_output += outputs.square().sum(1)
        self.input_sum += inputs.sum(1)
        self.output_sum += outputs.sum(1)

    def replace_outputs(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take other outputs for the same inputs; ``batches`` holds (inputs, outputs) as in ``update``."""
        assert self._input_shift is not None
        assert self._output_shift is not None
        for total in (self.output_input, self.output_output, self.output_sum):
            total.zero_()
        for inputs, outputs in batches:
            shifted_inputs = inputs.transpose(0, 1) - self._input_shift
            shifted_outputs = outputs.transpose(0, 1) - self._output_shift
            self.output_input += torch.bmm(shifted_outputs.transpose(1, 2), shifted_inputs)
            self.output_output += shifted_outputs.square().sum(1)
            self.output_sum += shifted_outputs.sum(1)

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
        count = float(self.count)
        input_mean, output_mean = self.input_sum / count, self.output_sum / count
        cov_uu = self.input_input / count
        cov_yu = self.output_input / count
        var_y = self.output_output / count
        if self.centred:
            cov_uu = cov_uu - input_mean.unsqueeze(2) * input_mean.unsqueeze(1)
            cov_yu = cov_yu - output_mean.unsqueeze(2) * input_mean.unsqueeze(1)
            var_y = var_y - output_mean.square()
        diagonal = torch.diagonal(cov_uu, dim1=1, dim2=2)
        # The tiny floor keeps a group of dead inputs solvable.
        strength = ridge * diagonal.mean(1) + 1e-12 * (1 + diagonal.amax(1))
        regularised = cov_uu.clone()
        torch.diagonal(regularised, dim1=1, dim2=2).add_(strength.unsqueeze(1))
        factor = torch.linalg.cholesky(regularised)
        start = torch.zeros_like(cov_yu) if prior is None else prior.double()
        residual = cov_yu - start @ cov_uu
        weight = start + torch.cholesky_solve(residual.transpose(1, 2), factor).transpose(1, 2)
        explained = 2 * (weight * cov_yu).sum(2) - ((weight @ cov_uu) * weight).sum(2)
        error = (var_y - explained).clamp(min=0) / var_y.clamp(min=1e-12)
        if self.centred:
            input_mean = input_mean + self._input_shift.squeeze(1)
            output_mean = output_mean + self._output_shift.squeeze(1)
            bias = output_mean - (weight @ input_mean.unsqueeze(2)).squeeze(2)
        else:
            bias = torch.zeros_like(output_mean)
        return GroupedFit(weight, bias, error)
