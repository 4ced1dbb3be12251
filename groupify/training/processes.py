"""Whether several processes on CPUs train faster than one would: timed before the training.

Processes pay where a step takes much longer than what they exchange, and threads of one process do not help
as much. Neither is known beforehand, so both ways do a few steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from groupify.data.ranks import ALONE, Ranks
from groupify.graph.call import Call
from groupify.machine import describe_machine
from groupify.training.learner import Learner

# Of a training: the few steps that are timed would be a large part of a shorter one.
LEAST_STEPS = 100
_TIMED_STEPS = 2  # behind one that warms up


@dataclass(frozen=True)
class Speeds:
    """Images per second.

    Attributes:
        together: of the processes, as they are.
        alone: of one of them with all cores of its machine, while the others wait.
        processes, threads: how many.
    """

    together: float
    alone: float
    processes: int
    threads: int

    @property
    def pays(self) -> bool:
        """Whether the processes are faster."""
        return self.together >= self.alone

    def __str__(self) -> str:
        return (
            f"{self.processes} processes train {self.together:.0f} images/s here, one process with "
            f"{self.threads} thread{'s' if self.threads != 1 else ''} {self.alone:.0f}"
        )


def measure_speeds(make: Callable[[Ranks], Learner], call: Call, labels: Tensor, ranks: Ranks) -> Speeds:
    """Return how fast a few steps are, with all processes and with one; each process makes this call.

    Args:
        make: makes a learner to be thrown away, for some processes.
        call: a batch, the same in all processes.
        labels: its labels, shape (N,).
        ranks: the processes.
    """
    own = slice(ranks.rank, None, ranks.world)
    together = _seconds(make(ranks), call.part(own), labels[own], call.batch_size)
    threads, before, alone = describe_machine().cores, torch.get_num_threads(), 0.0
    if ranks.first:
        torch.set_num_threads(threads)
        try:
            alone = _seconds(make(ALONE), call, labels, call.batch_size)
        finally:
            torch.set_num_threads(before)
    # The first process's figures; the others wait here.
    alone, together = ranks.sums(alone, together if ranks.first else 0.0)
    return Speeds(call.batch_size / together, call.batch_size / alone, ranks.world, threads)


def _seconds(learner: Learner, call: Call, labels: Tensor, whole: int) -> float:
    """The shortest of some steps that learn nothing."""
    found = []
    for number in range(1 + _TIMED_STEPS):
        start = time.perf_counter()
        learner.step(number + 1, call, labels, whole, 0.0, lambda *_: None)
        found.append(time.perf_counter() - start)
    return min(found[1:])
