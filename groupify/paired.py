"""How many points of accuracy a model loses against another, measured on the same images, and how surely.

The bounds are Tango's score bounds for the difference of two paired proportions (T. Tango, "Equivalence
test and confidence interval for the difference in proportions for the paired-sample design", Statistics in
Medicine 17:891-908, 1998; recommended by Fagerland, Lydersen and Laake, ibid. 33:2850-2875, 2014). Counted
out over all outcomes of 100, 250 and 1,000 images, with drops of 0.5 to 3 points and up to 1 in 100 images
gained, the one-sided bound of 95% holds for 94.4 to 100% of them, that of 99.2% for 99.3 to 100%; the plain
normal approximation for as little as 39%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from groupify.data.ranks import ALONE, Ranks
from groupify.documents import Count, Count1

# One-sided, of a limit on the drop; two-sided, of what is shown with its error.
CONFIDENCE = 0.95
_HALVINGS = 50


@dataclass(frozen=True)
class Paired:
    """Two models on the same images; the drop is in percentage points.

    Attributes:
        lost: images that the first has right and the second has wrong.
        gained: those the other way round.
        images: all of them.
    """

    lost: Count
    gained: Count
    images: Count1

    @property
    def drop(self) -> float:
        """Accuracy of the first minus that of the second."""
        return 100 * (self.lost - self.gained) / self.images

    @property
    def error(self) -> float:
        """Half the width of the interval that holds the drop on other images with 95%."""
        low, high = self.interval()
        return (high - low) / 2

    def at_most(self, confidence: float = CONFIDENCE) -> float:
        """Return what the drop on other images of the kind does not exceed, at a one-sided confidence."""
        return 100 * _upper(self.lost, self.gained, self.images, NormalDist().inv_cdf(confidence))

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return the two-sided interval of the drop on other images."""
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        low = -_upper(self.gained, self.lost, self.images, z)
        return 100 * low, 100 * _upper(self.lost, self.gained, self.images, z)


@dataclass(frozen=True, eq=False)
class Answers:
    """Which images of a data set a model has right, in the order in which they came.

    Attributes:
        right: shape (N,), boolean; those of one process.
        labels: class numbers, shape (N,).
    """

    right: Tensor
    labels: Tensor

    def against(self, other: Answers, ranks: Ranks = ALONE) -> Paired | None:
        """Return what another model changes; None where the images came in another order, as if shuffled."""
        same = torch.equal(self.labels, other.labels)
        lost = int((self.right & ~other.right).sum()) if same else 0
        gained = int((~self.right & other.right).sum()) if same else 0
        different, *counts = (int(one) for one in ranks.sums(not same, lost, gained, len(self.right)))
        return None if different or not counts[-1] else Paired(*counts)


def images_for(drop: float, confidence: float = CONFIDENCE) -> int:
    """Return from how many images on a drop can be told: where no image changes, the bound is below it.

    >>> Paired(0, 0, images_for(0.5)).at_most() <= 0.5 < Paired(0, 0, images_for(0.5) - 1).at_most()
    True
    """
    z = NormalDist().inv_cdf(confidence)
    return math.ceil(z * z * (100 / drop - 1)) if drop < 100 else 1


def _upper(lost: int, gained: int, images: int, z: float) -> float:
    """The difference whose score test is rejected by no more than ``z``, by bisection."""
    low, high = (lost - gained) / images, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _score(middle, lost, gained, images) > -z else (low, middle)
    return high


def _score(difference: float, lost: int, gained: int, images: int) -> float:
    """Tango's statistic, with the most likely share of gained images at that difference."""
    a = 2 * images
    b = (2 * images - lost + gained) * difference - lost - gained
    c = -gained * difference * (1 - difference)
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = images * (2 * share + difference * (1 - difference))
    return (lost - gained - images * difference) / math.sqrt(variance) if variance > 0 else 0.0
