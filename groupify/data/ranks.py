"""The processes that share a piece of work, as torchrun starts them; one process is the plain case."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# A rank may wait while rank 0 exports and times the model, or while another reads a large data set.
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

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks; the tensor stays as it is."""
        return tensor if self.world == 1 else self.sum(tensor.clone())

    def sums(self, *values: float, device: torch.device | None = None) -> tuple[float, ...]:
        """Sum numbers over all ranks."""
        if self.world == 1:
            return values
        return tuple(self.sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist())

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Give every rank the tensor of rank 0, in place."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, stacked; they have one shape."""
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        if self.world == 1:
            return tensor.unsqueeze(0)
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def wait(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


def current_ranks() -> Ranks:
    """Return this process's place in the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return ALONE


def launched_rank() -> int:
    """Return the rank that torchrun gave this process, before any group exists; 0 without it."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdigit() else 0


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


_SHARING: ContextVar[Ranks] = ContextVar("groupify_sharing", default=ALONE)


@contextlib.contextmanager
def sharing(ranks: Ranks) -> Iterator[None]:
    """Let everything inside the block divide its batches among the ranks and add its sums up."""
    token = _SHARING.set(ranks)
    try:
        yield
    finally:
        _SHARING.reset(token)


def sharers() -> Ranks:
    """Return the ranks of the ``sharing`` block around; this process alone where there is none."""
    return _SHARING.get()
