"""The processes that share a piece of work, as torchrun starts them; one process is the plain case."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A rank may wait while rank 0 converts, exports and times the model, or while another reads a large data set.
_TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place; every rank gets the same bits."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sums(self, *values: float, device: torch.device | None = None) -> tuple[float, ...]:
        """Sum numbers over all ranks."""
        if self.world == 1:
            return values
        return tuple(self.sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist())

    def share_weights(self, model: nn.Module) -> nn.Module:
        """Give every rank the weights and buffers of rank 0's model, in place; returns the model.

        Args:
            model: of one architecture on all ranks.
        """
        for value in (*model.parameters(), *model.buffers()) if self.world > 1 else ():
            # Laid out alike on all ranks, whatever memory format each has it in.
            sent = value.detach().contiguous()
            dist.broadcast(sent, 0)
            value.detach().copy_(sent)
        return model

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, stacked; they have one shape."""
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        if self.world == 1:
            return tensor.unsqueeze(0)
        dist.all_gather(parts, tensor)
        return torch.stack(parts)


ALONE = Ranks()


def current_ranks() -> Ranks:
    """Return this process's place in the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return ALONE


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the processes of torchrun for a while: NCCL where there is a GPU for each, else gloo.

    Without torchrun, or inside a group that exists already, nothing is started or ended.
    """
    ours = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if not ours:
        yield current_ranks()
        return
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local_world
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Some numbers are summed on the CPU, also where the models are on GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    try:
        yield current_ranks()
    finally:
        dist.destroy_process_group()
