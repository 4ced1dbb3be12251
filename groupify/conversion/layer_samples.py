"""What a layer reads and should output at sampled positions: what a fit is made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from groupify.conversion.held_out import HeldOutImages
from groupify.devices import with_float64
from groupify.stats.samples import SiteSamples


@dataclass(frozen=True)
class Part:
    """Samples of a layer from one batch.

    Attributes:
        inputs: input patches, shape (n, I, taps).
        target: what the layer should output there.
        held_out: whether they are of images that judge a fit instead of making it.
    """

    inputs: Tensor
    target: Target
    held_out: bool = False

    def solvable(self) -> Part:
        """Return them where float64 is to be had, in which they are solved for."""
        device = with_float64(self.inputs.device)
        return Part(self.inputs.to(device), self.target.on(device), self.held_out)


@dataclass(frozen=True)
class Target:
    """What a layer should output at some positions.

    Attributes:
        outputs: shape (n, O).
        thresholds: the output at which the ReLU behind switches, shape (n, O); None without a ReLU.
        signs: +1 where the ReLU is off below the threshold, −1 where above, shape (O,).
    """

    outputs: Tensor
    thresholds: Tensor | None = None
    signs: Tensor | None = None

    def subset(self, rows: Tensor) -> Target:
        """Return the targets at some of the positions, given as a mask or as numbers."""
        thresholds = None if self.thresholds is None else self.thresholds[rows]
        return Target(self.outputs[rows], thresholds, self.signs)

    def on(self, device: torch.device) -> Target:
        """Return the targets on a device."""
        thresholds, signs = (
            None if part is None else part.to(device) for part in (self.thresholds, self.signs)
        )
        return Target(self.outputs.to(device), thresholds, signs)

    def mirrored(self) -> Target:
        """Negate the outputs whose ReLU is off above the threshold, so that every ReLU is off below."""
        if self.thresholds is None or self.signs is None or bool((self.signs > 0).all()):
            return self
        return Target(self.outputs * self.signs, self.thresholds * self.signs, self.signs.abs())


def dense_parts(samples: SiteSamples, held_out: HeldOutImages) -> list[Part]:
    """Return what the dense model's own layer read and gave, those of held-out images apart."""
    parts = []
    for index, positions in enumerate(samples.patch_positions):
        held = held_out.rows(positions, index // samples.calls)
        inputs, target = samples.patches[index], Target(samples.patch_outputs[index].float())
        parts += [
            Part(inputs[rows].float(), target.subset(rows), bool(rows is held)).solvable()
            for rows in (~held, held)
            if bool(rows.any())
        ]
    return parts
