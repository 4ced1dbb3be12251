"""Batch norms over the images of several processes, on any device.

On a GPU they are torch's own ``SyncBatchNorm``, which refuses a CPU; there this module does what that does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from groupify.data.ranks import Ranks

_BatchNorm = nn.modules.batchnorm._BatchNorm


def synchronise_batch_norms(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Let all batch norms below ``model`` use the statistics of the whole batch; returns the model.

    Parameters and buffers keep their names.
    """
    if next((parameter.is_cuda for parameter in model.parameters()), False):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return]
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(module, name, SharedBatchNorm(child, ranks))
    return model


class SharedBatchNorm(_BatchNorm):
    """A batch norm over the images of all ranks, in training; in inference the one that it replaces."""

    def __init__(self, norm: _BatchNorm, ranks: Ranks) -> None:
        super().__init__(0, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.num_features = norm.num_features
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        # The very parameters and buffers, so that the names of the state stay as they are.
        for name, parameter in norm.named_parameters(recurse=False):
            setattr(self, name, parameter)
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(self, name, buffer)
        self.training = norm.training
        self.ranks = ranks

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        pass

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalise with the statistics of the whole batch; shape (N, C, …)."""
        if not self.training:
            return super().forward(input)
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        mean, variance, total = _statistics(values.detach(), self.ranks)
        self._track(mean, variance * (total / (total - 1).clamp(min=1)))
        result: Tensor = _Normalise.apply(
            values, self.weight, self.bias, mean, variance, total, self.eps, self.ranks
        )
        return result.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def _statistics(values: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance of each channel, shape (C,), and the number of values, over all ranks.

    Put together from each rank's own as in Chan, Golub and LeVeque (1983), which cancels nothing.
    """
    mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)  # 30 times as fast as var_mean
    count = mean.new_tensor([values.numel() // values.shape[1]])
    gathered = ranks.gather(torch.cat([mean, variance, count]))  # (ranks, 2C + 1)
    means, variances = gathered[:, :-1].chunk(2, dim=1)
    counts, total = gathered[:, -1:], gathered[:, -1].sum()
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, variance, total


class _Normalise(torch.autograd.Function):
    """Batch norm with given statistics of all ranks, whose gradient knows what they come from."""

    @staticmethod
    def forward(
        context: Any, values: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
        variance: Tensor, total: Tensor, eps: float, ranks: Ranks,
    ) -> Tensor:  # fmt: skip
        """Normalise; shape (N, C, …)."""
        context.save_for_backward(values, weight, mean, variance, total)
        context.eps, context.ranks = eps, ranks
        return torch.batch_norm(values, weight, bias, mean, variance, False, 0.0, eps, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the values, the weight and the bias; Ioffe and Szegedy (2015)."""
        values, weight, mean, variance, total = context.saved_tensors
        with_constants = torch.ops.aten.native_batch_norm_backward(
            gradient, values, weight, mean, variance, None, None, False, context.eps, [True, True, True]
        )
        of_values, of_weight, of_bias = with_constants
        sums = context.ranks.gather(torch.cat([of_weight, of_bias])).sum(0)
        through_deviation, through_mean = (sums / total).chunk(2)
        inverse = torch.rsqrt(variance + context.eps)
        scale = inverse if weight is None else inverse * weight
        slope = scale * inverse * through_deviation
        shape = (1, -1) + (1,) * (values.dim() - 2)
        of_values.addcmul_(values - mean.view(shape), -slope.view(shape))
        of_values.sub_((scale * through_mean).view(shape))
        affine = weight is not None
        return of_values, of_weight if affine else None, of_bias if affine else None, *[None] * 5
