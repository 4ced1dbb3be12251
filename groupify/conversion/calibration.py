"""What a conversion is calibrated with."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.conversion.site_fit import FitOptions
from groupify.errors import ConversionError, DataError
from groupify.stats.samples import SampleBudget

CLUSTERINGS = ("data", "norm", "none")


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images and how to use them.

    Attributes:
        images: shape (N, C, H, W), preprocessed as for inference and not augmented: augmented views
            made the fit worse (by up to 0.7 points on Fashion-MNIST).
        batch_size: images per step.
        clustering: what decides which channels form a group: ``"data"``, ``"norm"`` (weights
            alone) or ``"none"``.
        restarts: random starts of the clustering besides the given order.
        fit: options of the least-squares fit.
        budget: how many output positions are sampled for it.
        reconstruction: training of each block on the dense model's activations, after the fit.
    """

    images: Tensor
    batch_size: int = 64
    clustering: str = "data"
    restarts: int = 1
    fit: FitOptions = field(default_factory=FitOptions)
    budget: SampleBudget = field(default_factory=SampleBudget)
    reconstruction: ReconstructionOptions = field(default_factory=ReconstructionOptions)

    def check(self, input_shape: tuple[int, ...]) -> None:
        """Refuse images that no model of that input shape can be calibrated with.

        Raises:
            DataError: no images, or not of that shape or type, or NaN in them.
            ConversionError: an unknown clustering.
        """
        images = self.images
        if images.dim() != len(input_shape) + 1 or len(images) == 0:
            shape = "(N, C, H, W)" if len(input_shape) == 3 else f"(N, {', '.join(map(str, input_shape))})"
            raise DataError(f"calibration images of shape {tuple(images.shape)}, expected {shape} with N ≥ 1")
        if not images.is_floating_point():
            raise DataError(
                f"calibration images of type {images.dtype}, expected floating point, preprocessed as for "
                "inference"
            )
        if not bool(images.isfinite().all()):
            raise DataError("the calibration images hold NaN or infinity; check their preprocessing")
        if self.clustering not in CLUSTERINGS:
            known = ", ".join(CLUSTERINGS)
            raise ConversionError(f"unknown clustering {self.clustering!r}, expected one of {known}")
