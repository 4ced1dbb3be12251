"""Data-parallel training that gives what one process would give with the same batches."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from groupify.data.ranks import Ranks
from groupify.errors import SpecError


def synchronise_batch_norms(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Let all batch norms of ``model`` use the statistics of the whole batch; returns the model.

    Parameters and buffers keep their names. Unlike ``torch.nn.SyncBatchNorm`` this runs on a CPU too.
    """
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, _SharedBatchNorm(child, ranks))
    return model


def wrapped(model: nn.Module, example: Tensor, ranks: Ranks) -> nn.Module:
    """Wrap a model, its batch norms synchronised, in DistributedDataParallel.

    Args:
        model: in train mode.
        example: two images or more, of the model's device.
        ranks: the processes.

    Raises:
        SpecError: the model has layers whose result depends on how the batch is divided.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise SpecError(f"{name!r} keeps statistics of its own batch: train in one process")
    unused = not _uses_all_of_its_outputs(model, example)
    synchronise_batch_norms(model, ranks)
    device = example.device
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        # The buffers are those of the synchronised norms, alike on all ranks.
        broadcast_buffers=False,
        find_unused_parameters=unused,
    )


def _uses_all_of_its_outputs(model: nn.Module, example: Tensor) -> bool:
    """Whether the loss reads everything: auxiliary outputs leave parameters without a gradient."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return isinstance(copy.deepcopy(model).train()(example), Tensor)


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm over the images of all ranks, in training; in inference the one that it replaces."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, ranks: Ranks) -> None:
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
        dims = [0, *range(2, values.dim())]
        shape = (1, -1) + (1,) * (values.dim() - 2)
        count = values.new_tensor([values.numel() // values.shape[1]])
        packed = _summed(torch.cat([values.sum(dims), count]))
        total = packed[-1].detach()
        mean = packed[:-1] / total
        centred = values - mean.view(shape)
        variance = _summed(centred.square().sum(dims)) / total
        self._track(mean.detach(), variance.detach() * total / (total - 1).clamp(min=1))
        result = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
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


def _summed(values: Tensor) -> Tensor:
    summed: Tensor = _AllReduce.apply(values)
    return summed


class _AllReduce(torch.autograd.Function):
    """The sum over all ranks; what flows back is the sum over all ranks too."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        """Sum up."""
        summed = values.detach().clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Sum up."""
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        return summed
