"""One group of a conv: all its outputs read all its inputs, and a structure's factors are fitted to that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from groupify.decomposition.low_rank import LowRank, least_squares
from groupify.decomposition.minimise import minimise
from groupify.decomposition.objectives import Mixing, Separate
from groupify.decomposition.starts import depthwise_start, mixing_start, separate_start
from groupify.decomposition.whitening import ByChannel, ByGroup
from groupify.structures import Structure


@dataclass(frozen=True)
class Part:
    """Factors of one group of a conv.

    Attributes:
        reduce: shape (R, I), or None.
        core: shape (S, R/G, K).
        expand: shape (O, S), or None.
        left: energy of the outputs that is not explained, after each evaluation; the last is the result.
    """

    reduce: Tensor | None
    core: Tensor
    expand: Tensor | None
    left: list[float]


class Problem:
    """Inputs and outputs of one group of a conv, ready to be fitted by many structures.

    Args:
        covariance: ``E[x xᵀ]``, shape (I·K, I·K).
        cross: ``E[x yᵀ]``, shape (I·K, O).
        energies: ``E[y²]``, shape (O,).
        channels: I.
        whitened: the whitened inputs, where they are known.
    """

    def __init__(
        self,
        covariance: Tensor,
        cross: Tensor,
        energies: Tensor,
        channels: int,
        whitened: ByChannel | None = None,
    ) -> None:
        self._covariance, self._cross, self._energies = covariance, cross, energies
        self._energy = float(energies.double().sum())
        self._channels, self._positions = channels, len(covariance) // channels
        self._outputs = cross.shape[1]
        if whitened is not None:
            self.whitened = whitened
        self._separate: dict[int, ByGroup] = {}

    @cached_property
    def whitened(self) -> ByChannel:
        """The inputs where all channels may be mixed."""
        return ByChannel.of(self._covariance, self._channels)

    @cached_property
    def _whitened_outputs(self) -> tuple[Tensor, Tensor]:
        """``E[x yᵀ]`` with whitened inputs and outputs of an energy of 1, and their regression."""
        cross = self.whitened.inputs(self._cross / self._root)
        return cross, self.whitened.regression(cross)

    @cached_property
    def low_rank(self) -> LowRank:
        """The linear maps of low rank."""
        return LowRank.of(self._covariance, self._cross)

    @property
    def _root(self) -> float:
        """What the outputs are divided by to have an energy of 1."""
        return math.sqrt(self._energy) if self._energy > 0 else 1.0

    def fit(self, structure: Structure, evaluations: int) -> Part:
        """Return the factors of a structure, its totals being those of this one group."""
        reduce, groups, expand = structure.reduce, structure.groups, structure.expand
        if expand is None:
            if groups > 1:
                return self._by_output_group(structure, evaluations)
            if reduce is None:
                return self._dense()
            if self._positions == 1:
                down, up = self.low_rank.maps(reduce)
                return Part(down, up.unsqueeze(2), None, [self._left(reduce)])
            return _folded(self._mixing(reduce, 1, self._outputs, evaluations))
        if reduce is None:
            if groups > 1:
                return self._grouped_then_dense(groups, expand, evaluations)
            down, up = self.low_rank.maps(expand)
            return Part(None, self._by_channel(down), up, [self._left(expand)])
        return self._mixing(reduce, groups, expand, evaluations)

    def _left(self, rank: int) -> float:
        return self._energy - float(self.low_rank.explained[:rank].double().sum())

    def _by_channel(self, maps: Tensor) -> Tensor:
        return maps.reshape(len(maps), -1, self._positions)

    def _dense(self) -> Part:
        weight = least_squares(self._covariance, self._cross)
        left = self._energy - float((weight.T * self._cross).sum())
        return Part(None, self._by_channel(weight.to(self._cross.dtype)), None, [left])

    def _mixing(self, reduce: int, groups: int, expand: int, evaluations: int) -> Part:
        inputs, root = self.whitened, self._root
        cross, target = self._whitened_outputs
        width, outputs = reduce // groups, expand // groups
        objective = Mixing(inputs, cross, groups, width, outputs)
        depthwise = width == outputs == 1
        start = depthwise_start(target, groups) if depthwise else mixing_start(target, groups, width, outputs)
        best, values = minimise(objective.evaluate, start, evaluations)
        mixture, core = objective.split(best.point)
        core = inputs.positions.T @ core.reshape(expand, self._positions, width)
        return Part(
            mixture.reshape(reduce, -1) @ inputs.channels,
            core.transpose(1, 2),
            objective.expand(best.point).weight.T * root,
            [value * root**2 for value in values],
        )

    def _grouped_then_dense(self, groups: int, expand: int, evaluations: int) -> Part:
        if groups not in self._separate:
            self._separate[groups] = ByGroup.of(self._covariance, groups)
        inputs, root = self._separate[groups], self._root
        cross = inputs.inputs(self._cross / root)
        objective = Separate(inputs, cross)
        target = cross.reshape(groups, -1, self._outputs).transpose(1, 2)
        best, values = minimise(objective.evaluate, separate_start(target, expand // groups), evaluations)
        core = objective.split(best.point) @ inputs.maps
        return Part(
            None,
            self._by_channel(core.flatten(0, 1)),
            objective.expand(best.point).weight.T * root,
            [value * root**2 for value in values],
        )

    def _by_output_group(self, structure: Structure, evaluations: int) -> Part:
        """Without an expand every group of outputs is a problem of its own."""
        alone = Structure(None if structure.reduce is None else structure.reduce // structure.groups)
        parts = [
            self._of_output_group(group, structure).fit(alone, evaluations)
            for group in range(structure.groups)
        ]
        return joined(parts)

    def _of_output_group(self, group: int, structure: Structure) -> Problem:
        outputs = self._outputs // structure.groups
        mine = slice(group * outputs, (group + 1) * outputs)
        cross, energies = self._cross[:, mine], self._energies[mine]
        if structure.reduce is not None:
            shared = self.whitened if self._positions > 1 else None
            return Problem(self._covariance, cross, energies, self._channels, shared)
        inputs = len(self._covariance) // structure.groups
        read = slice(group * inputs, (group + 1) * inputs)
        return Problem(
            self._covariance[read, read], cross[read], energies, self._channels // structure.groups
        )


def joined(parts: Sequence[Part]) -> Part:
    """Return parts beside each other, each with its own inputs or latents and its own outputs."""
    return Part(
        _beside([part.reduce for part in parts]),
        torch.cat([part.core for part in parts]),
        _beside([part.expand for part in parts]),
        _sums([part.left for part in parts]),
    )


def _beside(weights: Sequence[Tensor | None]) -> Tensor | None:
    present = [weight for weight in weights if weight is not None]
    return torch.cat(present) if present else None


def _sums(lists: Sequence[list[float]]) -> list[float]:
    """Sums of the nth numbers, a list that ends early standing still."""
    longest = max(map(len, lists))
    full = [numbers + numbers[-1:] * (longest - len(numbers)) for numbers in lists]
    return [sum(numbers) for numbers in zip(*full, strict=True)]


def _folded(part: Part) -> Part:
    """Multiply the expand into the core."""
    assert part.expand is not None
    return Part(part.reduce, torch.einsum("os,srk->ork", part.expand, part.core), None, part.left)
