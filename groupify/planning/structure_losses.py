"""What the block-term structures of a conv lose, from a few fits to the moments of its inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from groupify.conversion.surgery import conv_shape
from groupify.decomposition.decompose import Decomposer
from groupify.decomposition.families import Cost, families
from groupify.decomposition.ladder import EVALUATIONS, ladders
from groupify.decomposition.moments import Moments
from groupify.graph.plain_layers import Conv
from groupify.planning.rules import Rules
from groupify.structures import BLOCK_TERM, Candidate, Observed

_TRIAL = 4.0  # MACs of a conv ÷ those of the version that its sensitivity is measured with
_SHRUNK = 0.8  # of the weight of a conv that no structure makes cheaper


@dataclass(frozen=True)
class SiteLosses:
    """The losses of one conv's candidates that a decomposition makes.

    Attributes:
        conv: the conv.
        run: what a forward pass showed of it.
        rules: what may become of it.
        covariance: of its inputs, shape (g, n, n).
        scale: how much each output's error weighs, shape (O,); None = all the same.
    """

    conv: Conv
    run: Observed
    rules: Rules
    covariance: Tensor
    scale: Tensor | None = None

    def relative(self, options: Sequence[Candidate]) -> dict[str, float]:
        """Return the relative errors of candidates, by their keys."""
        if BLOCK_TERM not in self.rules.families:
            return {}
        found = ladders(self._decomposer, self._cost, self.rules.cpu_block, self.rules.narrowest)
        errors = {rung.structure: rung.error for rungs in found.values() for rung in rungs}
        return {
            option.key: errors[option.site.structure] for option in options if option.site.structure in errors
        }

    def energy(self) -> float:
        """Return the weighted variance of all outputs, to which the errors are relative."""
        energies = self._moments.energy.flatten()
        return float((energies if self.scale is None else energies * self.scale.square()).sum())

    def trial_weight(self) -> Tensor:
        """Return the weight of a converted version, shape as the conv's own."""
        for family in families(self._cost, self.rules.cpu_block, self.rules.narrowest):
            members = family.members(self._cost, [_TRIAL])
            if members:
                weight = self._decomposer.fit(members[0], EVALUATIONS).weight()
                return weight.reshape(self.conv.weight.shape).to(self.conv.weight)
        return _SHRUNK * self.conv.weight.detach()

    @functools.cached_property
    def _moments(self) -> Moments:
        return Moments.of_weight(self.conv.weight.float(), self.covariance.float())

    @functools.cached_property
    def _decomposer(self) -> Decomposer:
        return Decomposer(self._moments, self._cost.conv, self.scale)

    @property
    def _cost(self) -> Cost:
        return Cost(conv_shape(self.conv), math.prod(self.run.input_size), math.prod(self.run.output_size))
