"""Data sets of images, in memory as bytes or in a folder per class, and augmentation; in whole batches."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transform

from groupify.errors import DataError, GroupifyWarning
from groupify.models.preprocessing import Preprocessing

_TEST_NAMES = ("val", "test", "validation")
_LOOKED_AT = 8


class ImageArrays(Dataset[tuple[Tensor, Tensor]]):
    """Images held as uint8, prepared when they are read.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        preprocessing: how they become inputs; as many channels as the inputs have.

    Raises:
        DataError: no images, another number of labels, or a channel count that cannot be made to fit: one
            grey channel is repeated, and nothing else.
    """

    def __init__(self, images: Tensor, labels: Tensor, preprocessing: Preprocessing) -> None:
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
        self.preprocessing = preprocessing
        self.channels = len(preprocessing.mean)
        if images.shape[1] not in (1, self.channels):
            raise DataError(
                f"the images have {images.shape[1]} channels, the model takes {self.channels}: "
                "give a model with as many input channels, or grey images"
            )
        self._mean, self._std = (_per_channel(preprocessing.mean), _per_channel(preprocessing.std))

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
        images = self.images[indices].to(torch.float32).div_(255)
        if tuple(images.shape[2:]) != self.preprocessing.size or self.preprocessing.crop != "none":
            images = resized_and_cropped(images, self.preprocessing).clamp_(0, 1)  # bicubic goes beyond
        if self._mean.shape[1] > images.shape[1]:
            images = images.expand(-1, self.channels, -1, -1).clone()
        images = images.sub_(self._mean).div_(self._std)
        return images.expand(-1, self.channels, -1, -1).contiguous(), self.labels[indices]


def _per_channel(values: Sequence[float]) -> Tensor:
    """Return a tensor to compute with images (N, C, H, W): one value where all are the same."""
    values = values[:1] if len(set(values)) == 1 else values
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def resized_and_cropped(image: Any, preprocessing: Preprocessing) -> Any:
    """Return an image of Pillow, or a tensor (..., H, W), in the size that a preprocessing gives it."""
    size = list(preprocessing.size)
    mode = InterpolationMode(preprocessing.interpolation)
    if isinstance(image, Tensor) and mode is InterpolationMode.NEAREST:
        mode = InterpolationMode.NEAREST_EXACT  # as Pillow's
    if preprocessing.crop == "none":
        return transform.resize(image, size, mode, antialias=True)
    shorter = min(transform.get_dimensions(image)[1:])
    # The shorter side must fill the crop, also of small images that keep their size.
    shorter = max(preprocessing.resize or shorter, *size)
    return transform.center_crop(transform.resize(image, shorter, mode, antialias=True), size)


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images of the class folders in ``root``, prepared when they are read.

    Args:
        root: a folder with one sub-folder per class.
        classes: the names of the class folders; label = position in this list.
        preprocessing: the model's own, of one channel (grey) or three.

    Raises:
        DataError: a class folder without images; when read, a damaged image.
    """

    def __init__(self, root: Path, classes: list[str], preprocessing: Preprocessing) -> None:
        self.samples = _samples(root, classes)
        self.mode = "L" if len(preprocessing.mean) == 1 else "RGB"
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self.samples[index]
        try:
            with open(path, "rb") as file:
                image = Image.open(file).convert(self.mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the image {path}: {error}; replace or remove it") from error
        pixels = transform.to_tensor(resized_and_cropped(image, self.preprocessing))
        mean, std = self.preprocessing.mean, self.preprocessing.std
        return transform.normalize(pixels, mean, std), torch.tensor(label)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (n, C, H, W) and labels (n,) of the given indices, decoded in threads."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            items = list(pool.map(self.__getitem__, indices.tolist()))
        return torch.stack([image for image, _ in items]), torch.stack([label for _, label in items])


def read_image_folder(
    root: Path, preprocessing: Preprocessing
) -> tuple[ImageFolder | None, ImageFolder, list[str]]:
    """Return ``(train, test, classes)`` of ``root/train`` and ``root/val`` (or ``test``).

    A ``root`` that holds the class folders itself is the test part, and there is no training part.

    Raises:
        DataError: a missing or empty folder, or parts with different classes.

    Warns:
        GroupifyWarning: the images are smaller than the model's input.
    """
    train, test, classes = _parts(root)
    height, width = preprocessing.size
    sizes = _some_sizes(test, classes)
    if sizes and all(own[0] < height and own[1] < width for own in sizes):
        warnings.warn(
            f"the images of {root} are smaller than the model's input, as {sizes[0][0]}×{sizes[0][1]} to "
            f"{height}×{width}, and are enlarged: if the model was trained on images of another size, give "
            "that with --input-size",
            GroupifyWarning,
            stacklevel=2,
        )
    tests = ImageFolder(test, classes, preprocessing)
    return None if train is None else ImageFolder(train, classes, preprocessing), tests, classes


def size_in_common(root: Path) -> tuple[int, int] | None:
    """Return the size (H, W) of the images in a folder of class folders; None where they differ.

    Some images are looked at.

    Raises:
        DataError: as :func:`read_image_folder`.
    """
    _, test, classes = _parts(root)
    sizes = set(_some_sizes(test, classes))
    return sizes.pop() if len(sizes) == 1 else None


def _some_sizes(root: Path, classes: list[str]) -> list[tuple[int, int]]:
    """Return (H, W) of a few images from all classes."""
    samples = _samples(root, classes)
    sizes = []
    for path, _ in samples[:: max(1, len(samples) // _LOOKED_AT)][:_LOOKED_AT]:
        # A damaged image gets its error where it is read.
        with (
            contextlib.suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError),
            Image.open(path) as image,
        ):
            sizes.append((image.height, image.width))
    return sizes


def _samples(root: Path, classes: list[str]) -> list[tuple[str, int]]:
    labels = {name: label for label, name in enumerate(classes)}
    try:
        samples: list[tuple[str, int]] = make_dataset(root, labels, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise DataError(f"{root}: {error}") from error
    return samples


def _parts(root: Path) -> tuple[Path | None, Path, list[str]]:
    """Return the folders of the training and the test part, and the names of the classes."""
    if not root.is_dir():
        raise DataError(
            f"no folder {root}: expected ROOT/train and ROOT/val with one folder of images per class"
        )
    train = root / "train" if (root / "train").is_dir() else None
    test = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if test is None and train is not None:
        raise DataError(
            f"{root} has a folder train, but none of {', '.join(_TEST_NAMES)}: add the test images"
        )
    test = test or root
    classes = _class_names(test)
    if train is not None and _class_names(train) != classes:
        odd = sorted(set(_class_names(train)) ^ set(classes))
        raise DataError(f"{train} and {test} hold different classes: {odd[0]!r} is in only one of them")
    return train, test, classes


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise DataError(f"{folder} has no sub-folders: expected one folder of images per class")
    return names


class FlipAndShift:
    """The standard augmentation of small images: a random horizontal flip and a random shift.

    A shift by up to ``shift`` pixels each way equals padding by as many and cropping at random;
    the border is filled with the nearest pixel, so that no value comes in that was not there.

    Args:
        shift: in pixels.
        flip: False for images that a mirror makes into something else, such as characters.
    """

    def __init__(self, shift: int, *, flip: bool = True) -> None:
        self.shift = shift
        self.flip = flip

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return an augmented copy of ``images`` (N, C, H, W), drawn with ``generator``."""
        count, _, height, width = images.shape

        def draw(low: int, high: int) -> Tensor:
            drawn = torch.randint(low, high, (count, 1), generator=generator, device=generator.device)
            return drawn.to(images.device)

        rows = torch.arange(height, device=images.device) + draw(-self.shift, self.shift + 1)
        columns = torch.arange(width, device=images.device) + draw(-self.shift, self.shift + 1)
        rows, columns = rows.clamp_(0, height - 1), columns.clamp_(0, width - 1)
        if self.flip:
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
