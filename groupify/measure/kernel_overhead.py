"""What a kernel takes longer alone, as a latency table times it, than inside of a network.

ONNX Runtime's profiler takes time in each kernel, and alone a conv finds its input and its weights farther
away than behind the conv in front of it. In kernels of a few microseconds that is most of what is measured:
the sums of thin convs came to twice the latency of a network of them. It is told by one network in which all
convs are thin: how much faster that is than the dense one, as a whole and without a profiler, is what the
single times must add up to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_LEAST = 0.1  # of its time alone, that a conv takes in a network whatever the overhead
_MOST = 0.95  # of the shortest kernel, that an overhead may be
_STEPS = 40


@dataclass(frozen=True)
class Alone:
    """A conv, or what replaces it, as it was timed by itself.

    Attributes:
        milliseconds: of one call.
        kernels: number of kernels that run it.
    """

    milliseconds: float
    kernels: int

    def without(self, overhead_ms: float) -> float:
        """Return its milliseconds without the overhead of each kernel."""
        return max(self.milliseconds - self.kernels * overhead_ms, _LEAST * self.milliseconds)


@dataclass(frozen=True)
class Replaced:
    """A conv of a network and what takes its place.

    Attributes:
        inside_ms: what the conv takes in the dense network, over all its calls.
        dense, replacement: both alone.
    """

    inside_ms: float
    dense: Alone
    replacement: Alone

    def predicted_ms(self, overhead_ms: float) -> float:
        """Return what the replacement takes in the network: of the conv's time, the share it takes alone."""
        dense = self.dense.without(overhead_ms)
        return self.inside_ms * self.replacement.without(overhead_ms) / dense if dense else self.inside_ms


def find_overhead(convs: Sequence[Replaced], measured_ms: float) -> float:
    """Return the overhead per kernel, milliseconds, with which the predictions add up to what was measured.

    Args:
        convs: all that are replaced.
        measured_ms: what they take together in the network.

    Returns:
        0 where the predictions are below that already.
    """

    def exceeds(overhead_ms: float) -> bool:
        return sum(conv.predicted_ms(overhead_ms) for conv in convs) > measured_ms

    alone = [one for conv in convs for one in (conv.dense, conv.replacement)]
    low, high = 0.0, _MOST * min((one.milliseconds / one.kernels for one in alone), default=0.0)
    if not exceeds(low):
        return low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    return low
