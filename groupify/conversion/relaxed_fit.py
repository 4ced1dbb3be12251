"""Least squares for a grouped map whose outputs a ReLU may cut off."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from groupify.stats.moments import GroupedFit, GroupedMoments

# Samples that are worked on at a time: few enough to stay in the cache.
_CHUNK = 2048


class GroupedSamples:
    """What a grouped map reads and should give at some positions.

    Attributes:
        inputs: shape (n, G, D).
        outputs: shape (n, G, O/G).
        thresholds: up to which output the ReLU behind is off, shape (n, G, O/G); None without a ReLU.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, thresholds: Tensor | None = None) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.thresholds = thresholds

    @staticmethod
    def joined(parts: Sequence[GroupedSamples]) -> GroupedSamples:
        """Return the samples of several parts as one."""
        if len(parts) == 1:
            return parts[0]
        thresholds = [part.thresholds for part in parts if part.thresholds is not None]
        return GroupedSamples(
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.outputs for part in parts]),
            torch.cat(thresholds) if thresholds else None,
        )

    def split(self, count: int) -> list[GroupedSamples]:
        """Return them in parts of ``count`` samples; the last may be smaller."""
        if len(self.inputs) <= count:
            return [self]
        inputs, outputs = self.inputs.split(count), self.outputs.split(count)
        thresholds = [None] * len(inputs) if self.thresholds is None else self.thresholds.split(count)
        return [GroupedSamples(*part) for part in zip(inputs, outputs, thresholds, strict=True)]

    def thinned(self, every: int) -> GroupedSamples:
        """Return a copy of one of ``every`` so many samples."""
        thresholds = None if self.thresholds is None else self.thresholds[::every].clone()
        return GroupedSamples(self.inputs[::every].clone(), self.outputs[::every].clone(), thresholds)

    @functools.cached_property
    def _off(self) -> Tensor | None:
        """Where the ReLU should be off, shape (G, n, O/G)."""
        return None if self.thresholds is None else (self.outputs <= self.thresholds).transpose(0, 1)

    def predicted(self, fit: GroupedFit) -> Tensor:
        """Return what a map gives, shape (G, n, O/G)."""
        weight, bias = fit.weight.float(), fit.bias.float()
        return torch.baddbmm(bias.unsqueeze(1), self.inputs.transpose(0, 1), weight.transpose(1, 2))

    def relaxed(self, predicted: Tensor) -> Tensor:
        """Return the outputs, but where the ReLU should be off, whatever of the prediction keeps it off.

        Shapes (G, n, O/G); the prediction is overwritten.
        """
        outputs = self.outputs.transpose(0, 1)
        if self.thresholds is None or self._off is None:
            return outputs
        torch.minimum(predicted, self.thresholds.transpose(0, 1), out=predicted)
        return torch.where(self._off, predicted, outputs)

    def squared_error(self, fit: GroupedFit, *, relaxed: bool) -> float:
        """Return the squared error of a map, summed over positions and outputs.

        Args:
            fit: the map.
            relaxed: whether only what gets through the ReLU counts.
        """
        predicted = self.predicted(fit)
        wanted = self.relaxed(predicted.clone()) if relaxed else self.outputs.transpose(0, 1)
        return float((wanted - predicted).square_().sum())


class RelaxedFit:
    """A ridge regression, then targets relaxed in front of a ReLU and fitted again, a few times.

    Relaxing minimises the convex ``Σ_on (y − ŷ)² + Σ_off relu(ŷ)²`` by majorisation: each fit is to the
    targets that cost the present prediction the least.

    Attributes:
        moments: of all samples so far.
    """

    def __init__(self, moments: GroupedMoments, prior: Tensor | None, iterations: int) -> None:
        """Start without samples.

        Args:
            moments: empty.
            prior: what the ridge draws towards, shape (G, O/G, D); zero if None.
            iterations: how often the targets are relaxed.
        """
        self.moments = moments
        self._prior = prior
        self._iterations = iterations
        self._samples: list[GroupedSamples] = []
        self._plain = True  # whether the moments are those of the given outputs

    def add(self, samples: Sequence[GroupedSamples]) -> None:
        """Add samples to fit."""
        chunks = [chunk for part in samples for chunk in part.split(_CHUNK)]
        for chunk in chunks:
            self.moments.update(chunk.inputs, chunk.outputs)
        self._samples += chunks

    def plain(self, ridge: float, *, rough: bool = False) -> GroupedFit:
        """Fit the outputs as they are; ``rough``: in single precision."""
        if not self._plain:
            self.moments.replace_outputs((part.inputs, part.outputs) for part in self._samples)
            self._plain = True
        return self.moments.fit(ridge=ridge, prior=self._prior, rough=rough)

    def fit(self, ridge: float) -> GroupedFit:
        """Fit the outputs as far as they matter behind the ReLU."""
        if not self._iterations:
            return self.plain(ridge)
        self.moments.ridge(ridge)  # the last fit needs it, and the others take it, rounded
        present = self.plain(ridge, rough=True)
        for left in reversed(range(self._iterations)):
            self._relax(present, squares=not left)
            present = self.moments.fit(ridge=ridge, prior=self._prior, rough=left > 0)
        return present

    def _relax(self, present: GroupedFit, *, squares: bool) -> None:
        """Aim at the outputs that cost a fit the least."""
        relaxed = (
            (part.inputs, part.relaxed(part.predicted(present)).transpose(0, 1)) for part in self._samples
        )
        self.moments.replace_outputs(relaxed, squares=squares)
        self._plain = False
