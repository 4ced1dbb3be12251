"""About how long the stages of a run take, from one measurement of how fast this machine runs the model.

Estimates for people, right within a factor of two or so: the constants were measured on ResNet-18 at 28×28
and 64×64, in plain groups and in structures of several convs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import nn

from groupify.devices import device_of, synchronise
from groupify.graph.call import Example, as_call
from groupify.graph.forward import evaluating
from groupify.structures import Choices, SitePlan

_IMAGES = 16
# Forward passes over all images that a fit takes, besides its solves; and a measurement of sensitivities.
_FIT_PASSES, _SENSITIVITY_PASSES = 4, 4
# Operations of a solve, as multiply-accumulates, over the square of the number of a conv's inputs: of plain
# groups, of a structure whose factors are fitted to the end, and of all that may become of a conv.
_PLAIN, _FACTORS, _CANDIDATES = 1.7e4, 1.3e5, 6.8e4
# Seconds of a multiply-accumulate: in a tiny net the calls take longer than the sums.
_SLOWEST = 1e-10
# Of timing one conv in ONNX Runtime: seconds for its session, and runs of it; and of timing whole networks.
_SESSION_SECONDS, _TIMED_RUNS, _NETWORKS_SECONDS = 0.02, 30, 15


class Pace:
    """How fast this machine runs a model; measured when it is first asked for.

    Args:
        model: the dense model; left untouched.
        example: how it is called.
        macs: multiply-accumulates of its convs for one image.
    """

    def __init__(self, model: nn.Module, example: Example, macs: int) -> None:
        self._model, self._example, self._macs = model, example, macs

    @cached_property
    def seconds(self) -> float:
        """Of one image in a batch: the second of two runs."""
        call, seconds = as_call(self._example, self._model, batch=_IMAGES), 0.0
        device = device_of(self._model)
        with evaluating(self._model), torch.no_grad():
            for _ in range(2):
                synchronise(device)
                start = time.perf_counter()
                call.run(self._model)
                synchronise(device)
                seconds = time.perf_counter() - start
        return seconds / _IMAGES

    def fit(self, sites: Iterable[SitePlan], images: int) -> float:
        """Seconds of fitting what replaces some convs."""
        solves = sum(
            (_PLAIN if site.structure.is_one_conv else _FACTORS) * _inputs(site) ** 2
            for site in sites
            if site.converted
        )
        return _FIT_PASSES * images * self.seconds + self._work(solves)

    def sensitivity(self, choices: Choices, images: int) -> float:
        """Seconds of measuring what each conv would lose."""
        solves = sum(_CANDIDATES * _inputs(options[0].site) ** 2 for options in choices.open_sites)
        return _SENSITIVITY_PASSES * images * self.seconds + self._work(solves)

    def timing(self, choices: Choices, missing: int) -> float:
        """Seconds of timing some of the candidates of all convs, and the networks around them."""
        candidates = [option.site for options in choices.open_sites for option in options]
        macs = sum(site.macs.grouped for site in candidates) / max(1, len(candidates))
        return _NETWORKS_SECONDS + missing * (_SESSION_SECONDS + self._work(_TIMED_RUNS * macs))

    def passes(self, images: float) -> float:
        """Seconds of running the model on so many images."""
        return images * self.seconds

    def _work(self, macs: float) -> float:
        return macs * min(self.seconds / max(1, self._macs), _SLOWEST)


def _inputs(site: SitePlan) -> int:
    """Number of inputs of one output of a conv."""
    return site.in_channels * math.prod(site.kernel_size) // site.groups_before
