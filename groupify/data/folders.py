"""Folders of images, one per class, prepared as the model's own weights were trained."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from groupify.errors import DataError
from groupify.models.specs import ModelSpec, Preprocessing

_TEST_NAMES = ("val", "test", "validation")


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
        image = F.resize(image, resize, InterpolationMode(preprocessing.interpolation), antialias=True)
        pixels = F.to_tensor(F.center_crop(image, self.size))
        return F.normalize(pixels, preprocessing.mean, preprocessing.std), torch.tensor(label)

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
