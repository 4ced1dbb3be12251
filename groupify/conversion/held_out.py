"""Fits judged on images that they did not see, with a stronger ridge where they have learned theirs by heart.

With few images, a wide layer has more inputs than independent samples: it fits those that it sees almost
exactly and is far off on all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groupify.conversion.relaxed_fit import GroupedSamples, RelaxedFit
from groupify.documents import Amount
from groupify.stats.positions import Positions

# One image in so many is held out, where there are at least twice as many.
_SHARE = 8
# Held-out over in-sample error above which a fit is tried again. With enough images it is 1.03 to 1.2.
_MOST = 2.0
# Errors below are rounding.
_NEGLIGIBLE = 1e-4
# The stronger ridges, as multiples of the first, or of this where that is less.
_LADDER = (3.0, 10.0, 100.0)
_LEAST = 0.01
# The weakest ridge is taken whose error is at most so many times the least: what it shrinks is lost for good,
# while the errors of a weak one partly average out behind the layer.
_NEAR = 1.1


@dataclass(frozen=True)
class HeldOutCheck:
    """What a layer's fit is worth on held-out images.

    Attributes:
        in_sample: mean squared error ÷ variance of the target on the images that the fit saw.
        held_out: the same on the others.
        overfitted: whether that is so much more that there are too few images.
        ridge: strength of the one that was kept, as a multiple of the mean input variance.
        gain: squared error on the held-out images with this one ÷ with the first, where a ReLU follows behind
            that.
    """

    in_sample: Amount
    held_out: Amount
    overfitted: bool
    ridge: Amount
    gain: Amount = 1.0


class HeldOutImages:
    """Which images of a calibration are held out: every eighth of 16 or more, spread since they may be in
    some order.

    Args:
        batch_sizes: images in each batch.
    """

    def __init__(self, batch_sizes: Sequence[int]) -> None:
        self._starts = [sum(batch_sizes[:index]) for index in range(len(batch_sizes))]
        self._any = sum(batch_sizes) >= 2 * _SHARE

    def rows(self, positions: Positions, batch: int) -> Tensor:
        """Return which positions of a batch lie in held-out images, shape (count,)."""
        if not self._any:
            return torch.zeros(len(positions), dtype=torch.bool, device=positions.image.device)
        return (self._starts[batch] + positions.image) % _SHARE == _SHARE - 1


def best_ridge(fitting: RelaxedFit, held_out: GroupedSamples, ridge: float) -> HeldOutCheck:
    """Choose the strength of the ridge by the error on held-out images.

    It stays what it is unless the error is more than twice that in sample. Then three stronger ones are
    tried, and the weakest of all four is taken whose error on the held-out images is within a tenth of the
    least.

    Args:
        fitting: of the images that are not held out.
        held_out: samples from the others.
        ridge: strength asked for, as a multiple of the mean input variance.
    """
    fit = fitting.plain(ridge, rough=True)
    variance = fitting.moments.output_variance()
    total = float(variance.sum().clamp(min=1e-12))
    in_sample = float((fit.error * variance).sum()) / total
    first = held_out.squared_error(fit, relaxed=False) / (len(held_out.inputs) * total)
    if not is_overfitted(in_sample, first):
        return HeldOutCheck(in_sample, first, overfitted=False, ridge=ridge)

    def error(strength: float) -> float:
        return held_out.squared_error(fitting.fit(strength), relaxed=True)

    best, gain = weakest_good(ridge, error(ridge), error)
    return HeldOutCheck(in_sample, first, overfitted=True, ridge=best, gain=gain)


def is_overfitted(in_sample: float, held_out: float) -> bool:
    """Whether a relative error on held-out images is so much larger that stronger ridges are worth a try."""
    return held_out > max(_MOST * in_sample, _NEGLIGIBLE)


def weakest_good(ridge: float, first: float, error: Callable[[float], float]) -> tuple[float, float]:
    """Return the weakest ridge whose error is within a tenth of the least, and that error ÷ the first.

    Stronger ones are tried until the error rises.

    Args:
        ridge: strength asked for, a multiple of the mean input variance.
        first: error on the held-out images with it.
        error: strength of a ridge → error on the held-out images.
    """
    errors, last = {ridge: first}, first
    for factor in _LADDER:
        strength = factor * max(ridge, _LEAST)
        before, last = last, error(strength)
        errors[strength] = last
        if last > before:
            break
    enough = _NEAR * min(errors.values())
    best = min(strength for strength, found in errors.items() if found <= enough)
    return best, errors[best] / max(first, 1e-30)


def overfitting_note(checks: Mapping[str, HeldOutCheck | None]) -> str | None:
    """Say which layers were far worse on held-out images than on those that they were fitted to; None if
    none.

    Args:
        checks: by the name of the layer.
    """
    poor = {name: check for name, check in checks.items() if check is not None and check.overfitted}
    if not poor:
        return None
    name, worst = max(poor.items(), key=lambda item: item[1].held_out / max(item[1].in_sample, _NEGLIGIBLE))
    return (
        f"too few calibration images for {len(poor)} of {len(checks)} layers, which were fitted with the "
        f"ridge that does best on held-out ones: {name}, the worst, had an error of {worst.in_sample:.2g} on "
        f"those that it saw, of {worst.held_out:.2g} on others; give more images"
    )
