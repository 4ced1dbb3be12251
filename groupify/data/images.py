"""Data sets held in memory as bytes, and augmentation: whole batches, never image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from groupify.errors import DataError


class ImageArrays(Dataset[tuple[Tensor, Tensor]]):
    """Images held as uint8, normalised when they are read: ``(x / 255 - mean) / std``.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        mean, std: one value per channel, for pixel values in [0, 1].
        channels: 3 repeats one grey channel to three; otherwise the images' own number.
        size: (height, width) to which the images are resized when they are read; None = their own.

    Raises:
        DataError: no images, another number of labels, or a channel count that cannot be made to fit.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"images of {images.dtype} and shape {tuple(images.shape)}; expected torch.uint8 (N, C, H, W)"
            )
        if len(images) == 0:
            raise DataError("the data set is empty: expected at least one image")
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images but {len(labels)} labels; expected one label per image")
        self.images = images
        self.labels = labels.long()
        self.channels = images.shape[1] if channels is None else channels
        if self.channels != images.shape[1] and images.shape[1] != 1:
            raise DataError(
                f"the images have {images.shape[1]} channels, the model takes {self.channels}: "
                "give a model with as many input channels, or grey images"
            )
        self.size = None if size == tuple(images.shape[2:]) else size
        self.mean = torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batch(torch.tensor([range(len(self))[index]]))
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return many items at once (torch's ``DataLoader`` asks for them this way)."""
        images, labels = self.batch(torch.as_tensor(indices))
        return list(zip(images, labels, strict=True))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (n, C, H, W) as float32 and labels (n,) of the given int64 indices (n,)."""
        images = self.images[indices].to(torch.float32).div_(255).sub_(self.mean).div_(self.std)
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        if self.channels != images.shape[1]:
            images = images.expand(-1, self.channels, -1, -1).contiguous()
        return images, self.labels[indices]


class FlipAndShift:
    """The standard augmentation of small images: a random horizontal flip and a random shift.

    A shift by up to ``shift`` pixels each way equals padding by as many and cropping at random;
    the border is filled with the nearest pixel, so that no value comes in that was not there.
    """

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return an augmented copy of ``images`` (N, C, H, W), drawn with ``generator``."""
        count, _, height, width = images.shape

        def draw(low: int, high: int) -> Tensor:
            drawn = torch.randint(low, high, (count, 1), generator=generator, device=generator.device)
            return drawn.to(images.device)

        rows = torch.arange(height, device=images.device) + draw(-self.shift, self.shift + 1)
        columns = torch.arange(width, device=images.device) + draw(-self.shift, self.shift + 1)
        rows, columns = rows.clamp_(0, height - 1), columns.clamp_(0, width - 1)
        columns = torch.where(draw(0, 2).bool(), width - 1 - columns, columns)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).reshape(count, 1, height * width)
        flat = images.reshape(count, -1, height * width)
        return flat.gather(2, pixels.expand_as(flat)).reshape(images.shape)


class CropAndFlip:
    """The standard augmentation of photographs: a random part of each, resized to all of it, and a flip.

    The part has 8% to 100% of the area and sides of 3:4 to 4:3. Szegedy et al., "Going Deeper with
    Convolutions" (2015).
    """

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return an augmented copy of ``images`` (N, C, H, W), drawn with ``generator``."""

        def draw(low: float, high: float) -> Tensor:
            drawn = torch.rand(len(images), generator=generator, device=generator.device)
            return low + (high - low) * drawn.to(images)

        area, ratio = draw(0.08, 1), draw(math.log(3 / 4), math.log(4 / 3)).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        right, down = draw(-1, 1) * (1 - width), draw(-1, 1) * (1 - height)
        width = torch.where(draw(-1, 1) < 0, -width, width)
        nothing = torch.zeros_like(width)
        rows = [torch.stack([width, nothing, right], 1), torch.stack([nothing, height, down], 1)]
        places = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, places, padding_mode="border", align_corners=False)
