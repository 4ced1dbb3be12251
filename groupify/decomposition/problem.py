"""One group of a conv: all its outputs read all its inputs, and a structure's factors are fitted to that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from groupify.decomposition.cholesky import made_positive
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


class Inputs:
    """What one group of a conv reads.

    Args:
        covariance: ``E[x xᵀ]``, shape (I·K, I·K).
        channels: I.
        positive: whether the covariance is known to be positive definite, see ``Moments``.
    """

    def __init__(self, covariance: Tensor, channels: int, *, positive: bool = False) -> None:
        self.covariance, self.channels, self.positive = covariance, channels, positive
        self.positions = len(covariance) // channels
        self._by_group: dict[int, ByGroup] = {}

    @cached_property
    def whitened(self) -> ByChannel:
        """They where all channels may be mixed."""
        return ByChannel.of(self._positive, self.channels)

    def by_group(self, groups: int) -> ByGroup:
        """They where the channels of each group stay by themselves."""
        if groups not in self._by_group:
            self._by_group[groups] = ByGroup.of(self._positive, groups)
        return self._by_group[groups]

    @cached_property
    def _positive(self) -> Tensor:
        return self.covariance if self.positive else made_positive(self.covariance)


class Problem:
    """Inputs and outputs of one group of a conv, ready to be fitted by many structures.

    Args:
        inputs: what it reads.
        cross: ``E[x yᵀ]``, shape (I·K, O).
        energies: ``E[y²]``, shape (O,).
        starts: where to start the fits of structures; None = truncations.
    """

    def __init__(
        self, inputs: Inputs, cross: Tensor, energies: Tensor, starts: dict[Structure, Tensor] | None = None
    ) -> None:
        self._inputs, self._cross, self._energies = inputs, cross, energies
        self._covariance, self._channels, self._positions = (
            inputs.covariance,
            inputs.channels,
            inputs.positions,
        )
        self._energy = float(energies.double().sum())
        self._outputs = cross.shape[1]
        self._starts = {} if starts is None else starts

    def with_outputs(self, cross: Tensor, energies: Tensor) -> Problem:
        """Return the problem of the same inputs with other outputs; its fits start where these have ended."""
        return Problem(self._inputs, cross, energies, dict(self._starts))

    @cached_property
    def _whitened_outputs(self) -> tuple[Tensor, Tensor]:
        """``E[x yᵀ]`` with whitened inputs and outputs of an energy of 1, and their regression."""
        whitened = self._inputs.whitened
        cross = whitened.inputs(self._cross / self._root)
        return cross, whitened.regression(cross)

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

    def left(self, structure: Structure, evaluations: int) -> list[float]:
        """Return what a fit of a structure leaves after each evaluation, without its factors."""
        reduce, groups, expand = structure.reduce, structure.groups, structure.expand
        if reduce is not None and expand is not None:
            _, _, values = self._mix(reduce, groups, expand, evaluations)
        elif expand is not None and groups > 1:
            _, _, values = self._separate(groups, expand, evaluations)
        elif self._positions == 1 and reduce is not None and groups == 1:
            return [self._left(reduce)]
        else:
            return self.fit(structure, evaluations).left
        return [value * self._root**2 for value in values]

    def _mixing(self, reduce: int, groups: int, expand: int, evaluations: int) -> Part:
        inputs, root = self._inputs.whitened, self._root
        width = reduce // groups
        objective, point, values = self._mix(reduce, groups, expand, evaluations)
        mixture, core = objective.split(point)
        core = inputs.positions.T @ core.reshape(expand, self._positions, width)
        return Part(
            mixture.reshape(reduce, -1) @ inputs.channels,
            core.transpose(1, 2),
            objective.expand(point).weight.T * root,
            [value * root**2 for value in values],
        )

    def _mix(
        self, reduce: int, groups: int, expand: int, evaluations: int
    ) -> tuple[Mixing, Tensor, list[float]]:
        """The best point of groups that read mixtures, and the values on the way, of an energy of 1."""
        cross, target = self._whitened_outputs
        width, outputs = reduce // groups, expand // groups
        objective = Mixing(self._inputs.whitened, cross, groups, width, outputs)
        structure = Structure(reduce, groups, expand)
        start = self._starts.get(structure)
        if start is None and width == outputs == 1:
            start = depthwise_start(target, groups)
        elif start is None:
            start = mixing_start(target, groups, width, outputs)
        best, values = minimise(objective.evaluate, start, evaluations)
        self._starts[structure] = best.point
        return objective, best.point, values

    def _grouped_then_dense(self, groups: int, expand: int, evaluations: int) -> Part:
        root = self._root
        objective, point, values = self._separate(groups, expand, evaluations)
        core = objective.split(point) @ self._inputs.by_group(groups).maps
        return Part(
            None,
            self._by_channel(core.flatten(0, 1)),
            objective.expand(point).weight.T * root,
            [value * root**2 for value in values],
        )

    def _separate(self, groups: int, expand: int, evaluations: int) -> tuple[Separate, Tensor, list[float]]:
        """The same for groups that read their own channels."""
        inputs = self._inputs.by_group(groups)
        cross = inputs.inputs(self._cross / self._root)
        objective = Separate(inputs, cross)
        structure = Structure(None, groups, expand)
        start = self._starts.get(structure)
        if start is None:
            target = cross.reshape(groups, -1, self._outputs).transpose(1, 2)
            start = separate_start(target, expand // groups)
        best, values = minimise(objective.evaluate, start, evaluations)
        self._starts[structure] = best.point
        return objective, best.point, values

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
            return Problem(self._inputs, cross, energies)
        count = len(self._covariance) // structure.groups
        read = slice(group * count, (group + 1) * count)
        own = Inputs(
            self._covariance[read, read], self._channels // structure.groups, positive=self._inputs.positive
        )
        return Problem(own, cross[read], energies)


def joined(parts: Sequence[Part]) -> Part:
    """Return parts beside each other, each with its own inputs or latents and its own outputs."""
    return Part(
        _beside([part.reduce for part in parts]),
        torch.cat([part.core for part in parts]),
        _beside([part.expand for part in parts]),
        sums([part.left for part in parts]),
    )


def _beside(weights: Sequence[Tensor | None]) -> Tensor | None:
    present = [weight for weight in weights if weight is not None]
    return torch.cat(present) if present else None


def sums(lists: Sequence[list[float]]) -> list[float]:
    """Return the sums of the nth numbers, a list that ends early standing still."""
    longest = max(map(len, lists))
    full = [numbers + numbers[-1:] * (longest - len(numbers)) for numbers in lists]
    return [sum(numbers) for numbers in zip(*full, strict=True)]


def _folded(part: Part) -> Part:
    """Multiply the expand into the core."""
    assert part.expand is not None
    return Part(part.reduce, torch.einsum("os,srk->ork", part.expand, part.core), None, part.left)
