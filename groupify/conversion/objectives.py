"""What a grouping of one conv is worth, and which channels would be better off in another group.

A grouping is given by two membership matrices of zeros and ones: ``inputs``, shape (G, I), and
``outputs``, shape (G, O). Values count outputs: 1 for each output that is computed in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groupify.data.ranks import sharers
from groupify.stats.samples import SiteSamples

Membership = NDArray[np.float32]
Benefits = NDArray[np.float64]


class Objective(Protocol):
    """What the clustering maximises at one conv."""

    @property
    def in_channels(self) -> int:
        """Number of inputs, I."""

    @property
    def out_channels(self) -> int:
        """Number of outputs, O."""

    def value(self, inputs: Membership, outputs: Membership) -> float:
        """Return what the grouping is worth."""

    def input_benefits(self, inputs: Membership, outputs: Membership) -> Benefits:
        """Return what each input channel is worth to each group, shape (I, G)."""

    def output_benefits(self, inputs: Membership, outputs: Membership) -> Benefits:
        """Return what each output channel is worth in each group, shape (O, G)."""


class Flow:
    """What flows between channels, a cheap stand-in that takes each input for itself.

    Args:
        score: how much of each output comes through each input, shape (O, I), not negative.
    """

    def __init__(self, score: Tensor) -> None:
        self._score = score.float().numpy()
        self.out_channels, self.in_channels = self._score.shape

    def value(self, inputs: Membership, outputs: Membership) -> float:
        """Return the score inside the groups."""
        return float(((outputs @ self._score) * inputs).sum(dtype=np.float64))

    def input_benefits(self, inputs: Membership, outputs: Membership) -> Benefits:
        """Return the score from each input to each group, shape (I, G)."""
        return np.asarray((outputs @ self._score).T, dtype=np.float64)

    def output_benefits(self, inputs: Membership, outputs: Membership) -> Benefits:
        """Return the score from each group to each output, shape (O, G)."""
        return np.asarray(self._score @ inputs.T, dtype=np.float64)

    @property
    def total(self) -> float:
        """The score of the dense conv."""
        return float(self._score.sum(dtype=np.float64))


@dataclass
class _Group:
    """Least squares from the inputs of one group; d = inputs × taps.

    Attributes:
        taps: numbers of its columns among all I·k, shape (d,).
        factor: lower Cholesky factor of their covariance, shape (d, d).
        explained: ``factor⁻¹ Cov(u, y)`` for all outputs, shape (d, O).
    """

    taps: Tensor
    factor: Tensor
    explained: Tensor


class ExplainedVariance:
    """Share of each output's variance that least squares explains from its own group.

    The value is exact (on the samples), and so is the benefit of an output. An input that is in a
    group is worth what its leaving would cost, any other what its coming would bring; both follow
    from the group's Cholesky factor without fitting again, for one move at a time.

    Args:
        conv: the dense conv.
        samples: its sampled input patches.
        ridge: multiple of the mean input variance that is added to the diagonal.
    """

    def __init__(self, conv: nn.Module, samples: SiteSamples, *, ridge: float = 0.02) -> None:
        weight = conv.get_parameter("weight").detach().flatten(1)
        patches = torch.cat([part.float() for part in samples.patches])
        _, self.in_channels, self._taps = patches.shape
        self.out_channels = len(weight)
        patches = patches.flatten(1)
        ranks = sharers()
        (count,) = ranks.sums(len(patches))
        patches = patches.sub_(ranks.sum(patches.sum(0)) / count)
        self._input_input = ranks.sum(patches.T @ patches) / count
        # The dense conv is linear, so its weights give the covariance of its outputs.
        output_input = weight @ self._input_input
        variance = (output_input * weight).sum(1, keepdim=True).clamp(min=1e-12)
        self._output_input = output_input / variance.sqrt()
        self._ridge = ridge * float(self._input_input.diagonal().mean()) + 1e-12
        self._own = self._blocks(self._input_input)
        self._known: dict[Any, _Group] = {}

    def value(self, inputs: Membership, outputs: Membership) -> float:
        """Return the sum of the explained shares over all outputs."""
        return sum(
            float(group.explained[:, rows].square().sum())
            for group, rows in zip(self._groups(inputs), _members(outputs), strict=True)
        )

    def output_benefits(self, inputs: Membership, outputs: Membership) -> Benefits:
        """Return the share of each output that each group explains, shape (O, G)."""
        columns = [group.explained.square().sum(0) for group in self._groups(inputs)]
        return np.asarray(torch.stack(columns, 1), dtype=np.float64)

    def input_benefits(self, inputs: Membership, outputs: Membership) -> Benefits:
        """Return what each input channel explains, or would, in each group, shape (I, G)."""
        columns = []
        for group, rows, channels in zip(
            self._groups(inputs), _members(outputs), _members(inputs), strict=True
        ):
            gain = self._gain(group, rows)
            gain[channels] = self._loss(group, rows)
            columns.append(gain)
        return np.asarray(torch.stack(columns, 1), dtype=np.float64)

    def _groups(self, inputs: Membership) -> list[_Group]:
        """Factorise the groups that were not there a moment ago."""
        keys = [row.tobytes() for row in inputs]
        if len(self._known) > 4 * len(keys):
            self._known = {key: self._known[key] for key in keys if key in self._known}
        for key, channels in zip(keys, _members(inputs), strict=True):
            if key not in self._known:
                self._known[key] = self._factorise(channels)
        return [self._known[key] for key in keys]

    def _factorise(self, channels: Tensor) -> _Group:
        taps = (channels[:, None] * self._taps + torch.arange(self._taps)).flatten()
        covariance = self._input_input[taps[:, None], taps]
        covariance.diagonal().add_(self._ridge)
        factor = torch.linalg.cholesky(covariance)
        explained = torch.linalg.solve_triangular(factor, self._output_input[:, taps].T, upper=False)
        return _Group(taps, factor, explained)

    def _loss(self, group: _Group, rows: Tensor) -> Tensor:
        """What the outputs ``rows`` would lose without each of the group's channels, shape (I/G,)."""
        weight = torch.linalg.solve_triangular(group.factor.T, group.explained[:, rows], upper=True)
        weight = weight.unflatten(0, (-1, self._taps))  # (I/G, k, rows)
        inverse = torch.cholesky_inverse(group.factor)
        return _explained(self._blocks(inverse), weight)

    def _gain(self, group: _Group, rows: Tensor) -> Tensor:
        """What the outputs ``rows`` would gain from each channel besides the group's, shape (I,)."""
        known = torch.linalg.solve_triangular(group.factor, self._input_input[group.taps], upper=False)
        missing = self._output_input[rows] - group.explained[:, rows].T @ known
        missing = missing.unflatten(1, (-1, self._taps)).permute(1, 2, 0)  # (I, k, rows)
        if self._taps == 1:
            unknown = self._own - known.square().sum(0)[:, None, None]
        else:
            known = known.unflatten(1, (-1, self._taps)).permute(1, 2, 0)  # (I, k, d)
            unknown = self._own - known @ known.transpose(1, 2)
        unknown.diagonal(dim1=1, dim2=2).add_(self._ridge)
        return _explained(unknown, missing)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """Return the diagonal block of each channel, shape (channels, k, k)."""
        by_channel = matrix.unflatten(0, (-1, self._taps)).unflatten(2, (-1, self._taps))
        blocks: Tensor = by_channel.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return blocks


def _explained(covariance: Tensor, covariance_with_outputs: Tensor) -> Tensor:
    """What each channel explains of some outputs, all of them added up.

    Args:
        covariance: of each channel's taps, shape (channels, k, k).
        covariance_with_outputs: shape (channels, k, outputs).
    """
    weight = torch.linalg.inv(covariance) @ covariance_with_outputs
    explained: Tensor = (weight * covariance_with_outputs).sum((1, 2))
    return explained


def _members(membership: Membership) -> list[Tensor]:
    return [torch.from_numpy(np.flatnonzero(row)) for row in membership]
