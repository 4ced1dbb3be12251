"""Data sets of images, in memory as bytes or in a folder per class, and augmentation; in whole batches."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transform

from groupify.errors import DataError
from groupify.models.specs import ModelSpec, Preprocessing

_TEST_NAMES = ("val", "test", "validation")


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


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images of the class folders in ``root``: resized, centre-cropped, normalised.

    Args:
        root: a folder with one sub-folder per class.
        classes: the names of the class folders; label = position in this list.
        input_shape: (C, H, W) of the model; C is 1 (grey) or 3.
        preprocessing: the model's own.

    Raises:
        DataError: a class folder without images; when read, a damaged image.
    """

    def __init__(
        self, root: Path, classes: list[str], input_shape: tuple[int, ...], preprocessing: Preprocessing
    ) -> None:
        try:
            self.samples: list[tuple[str, int]] = make_dataset(
                root, {name: label for label, name in enumerate(classes)}, extensions=IMG_EXTENSIONS
            )
        except FileNotFoundError as error:
            raise DataError(f"{root}: {error}") from error
        self.mode = "L" if input_shape[0] == 1 else "RGB"
        self.size = [input_shape[1], input_shape[2]]
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
        preprocessing = self.preprocessing
        # The shorter side must fill the crop, also where the crop is not the weights' own.
        resize = max(preprocessing.resize or min(image.size), *self.size)
        image = transform.resize(
            image, resize, InterpolationMode(preprocessing.interpolation), antialias=True
        )
        pixels = transform.to_tensor(transform.center_crop(image, self.size))
        return transform.normalize(pixels, preprocessing.mean, preprocessing.std), torch.tensor(label)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (n, C, H, W) and labels (n,) of the given indices, decoded in threads."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            items = list(pool.map(self.__getitem__, indices.tolist()))
        return torch.stack([image for image, _ in items]), torch.stack([label for _, label in items])


def read_image_folder(root: Path, model_spec: ModelSpec) -> tuple[ImageFolder | None, ImageFolder, list[str]]:
    """Return ``(train, test, classes)`` of ``root/train`` and ``root/val`` (or ``test``).

    A ``root`` that holds the class folders itself is the test part, and there is no training part.

    Raises:
        DataError: a missing or empty folder, or parts with different classes.
    """
    if not root.is_dir():
        raise DataError(
            f"no folder {root}: expected ROOT/train and ROOT/val with one folder of images per class"
        )
    if len(model_spec.input_shape) != 3 or model_spec.input_shape[0] not in (1, 3):
        raise DataError(
            f"an image folder does not fit input shape {model_spec.input_shape}: expected (1 or 3, H, W)"
        )
    train = root / "train" if (root / "train").is_dir() else None
    test = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if train is None and test is None:
        test = root
    elif test is None:
        raise DataError(
            f"{root} has a folder train, but none of {', '.join(_TEST_NAMES)}: add the test images"
        )
    assert test is not None
    classes = _class_names(test)
    if train is not None and _class_names(train) != classes:
        odd = sorted(set(_class_names(train)) ^ set(classes))
        raise DataError(f"{train} and {test} hold different classes: {odd[0]!r} is in only one of them")
    preprocessing = model_spec.preprocessing or _customary(model_spec.input_shape)
    parts = [
        None if part is None else ImageFolder(part, classes, model_spec.input_shape, preprocessing)
        for part in (train, test)
    ]
    assert parts[1] is not None
    return parts[0], parts[1], classes


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise DataError(f"{folder} has no sub-folders: expected one folder of images per class")
    return names


def _customary(input_shape: tuple[int, ...]) -> Preprocessing:
    """ImageNet's customary preprocessing, for a model that does not say its own."""
    resize = round(min(input_shape[1:]) * 256 / 224)
    if input_shape[0] == 1:
        return Preprocessing((0.449,), (0.226,), resize, "bilinear")
    return Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize, "bilinear")


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
