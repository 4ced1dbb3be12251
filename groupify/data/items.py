"""One item of a data set, of whatever form: a pair, a dict, an image alone; checked and made tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from groupify.errors import DataError

Batch: TypeAlias = tuple[Tensor, Tensor]
Labelled: TypeAlias = bool | Literal["any"]
"""How labels are read: True: class numbers, one for each image. False: they are not looked at. ``"any"``:
tensors of any type with an entry for each image, such as maps of classes or images."""

UNLABELLED = -1
"""The label of an image that has none."""

# Where dicts keep images and labels; the first is Hugging Face's name.
_IMAGE_KEYS = ("pixel_values", "images", "image", "inputs", "input", "x", "data")
_LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def collate(samples: Sequence[Any], *, labelled: Labelled) -> Batch:
    """Return samples as a batch; without ``labelled`` their labels are not looked at.

    Raises:
        DataError: samples that are no images of one shape, or labels that are not what ``labelled`` says.
    """
    pairs = [_split(sample) for sample in samples]
    images = [_as_images(image) for image, _ in pairs]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise DataError(
            f"images of shapes {shapes[0]} and {shapes[1]} in one data set: resize or crop them to one shape"
        )
    given = [label for _, label in pairs]
    if labelled == "any":
        return torch.stack(images), _stacked(given)
    labels = [UNLABELLED if label is None or not labelled else label for label in given]
    return torch.stack(images), _as_labels(labels)


def as_batch(item: Any, *, labelled: Labelled) -> Batch:
    """Return a ready batch, checked; without ``labelled`` its labels are not looked at.

    Raises:
        DataError: as :func:`collate`, or it is no batch.
    """
    images, labels = _split(item)
    images = _as_images(images)
    if images.dim() < 3:
        raise DataError(
            f"a batch of images has shape {tuple(images.shape)}: expected (N, C, H, W), or (N, C, L) of 1-d "
            "inputs; give single samples as a Dataset or an IterableDataset"
        )
    if isinstance(labels, int) or (isinstance(labels, Tensor) and labels.dim() == 0):
        raise DataError(
            f"an image of shape {tuple(images.shape)} with one label, where a batch was expected: give "
            "single samples as a Dataset or an IterableDataset"
        )
    return images, _labels_of_batch(labels, len(images), labelled)


def labels_of(batch: Any, count: int, *, labelled: Labelled) -> Tensor:
    """Return the labels in a batch of any form, int64 (count,) on the CPU, ``UNLABELLED`` where it has none.

    Where they may be ``"any"``, (count, …) of their own type.

    Args:
        batch: a dict that has them under a usual key, or a tuple or list whose last entry they are.
        count: number of examples.
        labelled: whether they are looked at.

    Raises:
        DataError: they are not what ``labelled`` says, or another number of them.
    """
    labels = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        labels = batch[-1]
    return _labels_of_batch(labels, count, labelled)


def _labels_of_batch(labels: Any, count: int, labelled: Labelled) -> Tensor:
    if labelled == "any":
        found = _as_any_labels(labels)
        if found.dim() == 0 or len(found) != count:
            raise DataError(
                f"a batch of {count} images has labels of shape {tuple(found.shape)}: expected an entry for "
                f"each image, ({count}, …)"
            )
        return found
    if labels is None or not labelled:
        return torch.full((count,), UNLABELLED)
    found = _as_labels(labels)
    if found.shape != (count,):
        raise DataError(
            f"a batch of {count} images has labels of shape {tuple(found.shape)}: "
            f"expected one class number per image, ({count},)"
        )
    return found


def _split(item: Any) -> tuple[Any, Any]:
    """Return image and label; None for a label that is not there."""
    if isinstance(item, Mapping):
        return _split_mapping(item)
    if isinstance(item, tuple | list):
        if len(item) >= 2:
            return item[0], item[1]
        if len(item) == 1:
            return item[0], None
        raise DataError("an item of the data is empty: expected (image, label)")
    return item, None


def _split_mapping(item: Mapping[Any, Any]) -> tuple[Any, Any]:
    label = next((item[key] for key in _LABEL_KEYS if key in item), None)
    for key in _IMAGE_KEYS:
        if key in item:
            return item[key], label
    floats = [value for value in item.values() if isinstance(value, Tensor) and value.is_floating_point()]
    if len(floats) != 1:
        keys = ", ".join(map(repr, item))
        raise DataError(
            f"an item of the data has the keys {keys}: expected the image under {_IMAGE_KEYS[1]!r}"
        )
    return floats[0], label


def _as_images(value: Any) -> Tensor:
    try:
        images = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"an image is a {type(value).__name__}: expected a float tensor (C, H, W); "
            "give the data set a transform that ends in a tensor"
        ) from error
    if not images.is_floating_point():
        raise DataError(
            f"the images are {images.dtype}: expected floats, normalised as in training; "
            "scale and normalise them in the data set's transform"
        )
    return images.to(torch.float32)


def _as_labels(value: Any) -> Tensor:
    try:
        labels = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels of type {type(value).__name__}: expected class numbers") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"the labels are {labels.dtype}: expected class numbers (integers)")
    return labels.long().cpu()


def _stacked(labels: Sequence[Any]) -> Tensor:
    """Return labels of any form, one for each image, as one tensor."""
    found = [_as_any_labels(label) for label in labels]
    shapes = sorted({tuple(label.shape) for label in found})
    if len(shapes) > 1:
        raise DataError(
            f"labels of shapes {shapes[0]} and {shapes[1]} in one batch: resize or crop them to one shape"
        )
    return torch.stack(found)


def _as_any_labels(value: Any) -> Tensor:
    if value is None:
        raise DataError("the data has no labels, and the loss compares outputs with them")
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"labels of type {type(value).__name__}: expected a tensor with an entry for each image"
        ) from error
