"""A data set from a spec."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from groupify.data.batches import UNLABELLED, Data, check_labels
from groupify.data.calibration import read_once
from groupify.data.calls import Inputs, iterate_calls
from groupify.data.files import find_fashion_mnist, read_cifar10, read_fashion_mnist
from groupify.data.images import CropAndFlip, FlipAndShift, ImageArrays, read_image_folder, size_in_common
from groupify.data.items import Labelled
from groupify.errors import (
    DataError,
    GroupifyError,
    GroupifyWarning,
    SpecError,
    WrongTypeError,
    expect_type,
    near_names,
)
from groupify.models import demo
from groupify.models.preprocessing import Preprocessing, PreprocessingOptions, unknown
from groupify.models.sources import import_attribute
from groupify.models.specs import ModelSpec
from groupify.models.weights import one_line

Augment = Callable[[Tensor, torch.Generator], Tensor]

DATA_SPECS = ("demo", "fashion-mnist", "cifar10", "imagefolder", "synthetic")
# Mean and standard deviation of the training images, pixel values in [0, 1].
_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR10_STD = (0.2470, 0.2435, 0.2616)
_PARTS = "a Dataset, a DataLoader, another iterable of batches, or a tensor of images"


@dataclass(frozen=True)
class DataSplits:
    """The training and the test part of a data set."""

    spec: str
    train: Data | None
    test: Data | None
    num_classes: int | None
    """None where it is not known."""
    augment: Augment | None
    """The data set's standard augmentation of a normalised batch (N, C, H, W)."""
    labelled: bool
    """False for synthetic images: no accuracy is ever reported for them."""
    preprocessing: Preprocessing | None = None
    """How images become these inputs; None where that is not known here."""

    @property
    def for_calibration(self) -> Data:
        """The training part, or the test part where there is no other.

        Raises:
            DataError: there is neither.
        """
        part = self.train if self.train is not None else self.test
        if part is None:
            raise DataError(f"data {self.spec!r} has neither a training nor a test part")
        return part


class SyntheticImages(Dataset[tuple[Tensor, Tensor]]):
    """Unlabelled standard-normal images of a given shape; each depends on the seed and its index only."""

    def __init__(self, count: int, shape: tuple[int, ...], seed: int) -> None:
        self.count = count
        self.shape = shape
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * self.count + range(self.count)[index])
        return torch.randn(self.shape, generator=generator), torch.tensor(UNLABELLED)


def load_data(
    spec: str,
    model_spec: ModelSpec,
    *,
    num_classes: int | None = None,
    preprocessing: PreprocessingOptions | None = None,
    seed: int = 0,
) -> DataSplits:
    """Return the data set of a spec, prepared for the input of a model.

    Args:
        spec: ``demo``, ``fashion-mnist[:ROOT]``, ``cifar10:ROOT``, ``imagefolder:ROOT``, ``synthetic``,
            or ``package.module:function``, a function without arguments that returns a
            :class:`DataSplits`, a pair ``(train, test)``, a dict with these keys, or one data set (the
            test part); each part a Dataset, a DataLoader, another iterable of batches, or a tensor.
            What can be read only once is read at once and kept.
        model_spec: gives the input shape, to which images are resized and grey ones repeated, and the
            preprocessing of ``imagefolder``. The other data sets are normalised with their own statistics.
        num_classes: number of the model's outputs, to be checked against the labels.
        preprocessing: what is said otherwise, for all of these data sets.
        seed: seed of ``synthetic``.

    Raises:
        SpecError: an unknown spec, a function that cannot be imported or fails, or an ``imagefolder`` for a
            model of which nothing says how images become its inputs.
        DataError: files that are missing or corrupt, or labels out of range.

    Warns:
        GroupifyWarning: the data set has fewer classes than the model.
    """
    expect_type(spec, str, "spec", "a name like demo, or package.module:function")
    expect_type(model_spec, ModelSpec, "model_spec", "the spec of a model, load_model(...).spec")
    splits = _resolve(spec, model_spec, preprocessing or PreprocessingOptions(), seed)
    if num_classes is not None:
        check_classes(splits, num_classes)
    return splits


def as_splits(
    data: DataSplits | Data | Tensor, inputs: Inputs | None = None, *, labelled: Labelled = True
) -> DataSplits:
    """Return data of the caller's own as splits: all of it is the training part.

    Args:
        data: splits, which come back as they are; a tensor of inputs, a data set, a ``DataLoader`` or another
            iterable of batches. What can be read only once is read at once and kept.
        inputs: a batch → what the model is called with, for models that take more than images.
        labelled: what labels to keep of what can be read only once.

    Raises:
        WrongTypeError: it is nothing of the kind.
        DataError: it is empty, or cannot be read.
    """
    if isinstance(data, DataSplits):
        return data
    kind = type(data).__name__
    part: Any = data
    if isinstance(data, Tensor):
        part = TensorDataset(data)
    elif isinstance(data, str | bytes | Mapping | nn.Module) or not _is_readable(data):
        raise WrongTypeError(f"data is a {kind}: expected {_PARTS}, or what load_data returns")
    elif isinstance(data, Iterator):
        part = read_once(data, labelled)
    if hasattr(part, "__len__") and len(part) == 0:
        raise DataError(f"the data ({kind}) is empty: expected at least one image")
    return DataSplits("the given images", part, None, None, None, labelled=_has_labels(part, inputs))


def _has_labels(part: Data, inputs: Inputs | None) -> bool:
    try:
        _, labels = next(iterate_calls(part, 1, inputs, limit=1))
    except DataError:  # labels of another kind; what else is wrong is said where it matters
        return False
    return int(labels[0]) != UNLABELLED


def check_classes(splits: DataSplits, num_classes: int) -> None:
    """Compare the classes of a data set with those of a model, as far as they are known.

    Raises:
        DataError: labels that the model has no output for.

    Warns:
        GroupifyWarning: the data set has fewer classes than the model.
    """
    if splits.num_classes is None:
        return
    for part in (splits.train, splits.test):
        if isinstance(part, ImageArrays):
            check_labels(part.labels, num_classes)
    if splits.num_classes > num_classes:
        check_labels(torch.tensor([splits.num_classes - 1]), num_classes)
    if splits.num_classes < num_classes:
        warnings.warn(
            f"{splits.spec} has {splits.num_classes} classes, the model {num_classes}: its accuracy says "
            "little unless their first classes are the same",
            GroupifyWarning,
            stacklevel=3,
        )


def is_function(spec: str) -> bool:
    """Whether a data spec names a function of the user's own, which gives inputs ready-made."""
    kind, colon, argument = spec.partition(":")
    return bool(colon and argument) and kind not in DATA_SPECS


def _resolve(spec: str, model_spec: ModelSpec, said: PreprocessingOptions, seed: int) -> DataSplits:
    kind, colon, argument = spec.partition(":")
    root = Path(argument).expanduser()
    if colon and not argument:
        raise SpecError(f"data {spec!r} ends in a colon: expected a folder or a function behind it")
    if spec == "demo":
        return _fashion_mnist(spec, demo.DATA_FOLDER, model_spec, said)
    if kind == "fashion-mnist":
        return _fashion_mnist(spec, find_fashion_mnist(root if argument else None), model_spec, said)
    if kind in ("cifar10", "imagefolder") and not argument:
        raise SpecError(f"data {spec!r} needs its folder: give {kind}:ROOT")
    if kind == "cifar10":
        arrays = {split: read_cifar10(root, split) for split in ("train", "test")}
        return _in_memory(spec, arrays, model_spec, _CIFAR10_MEAN, _CIFAR10_STD, said, shift=4)
    if kind == "imagefolder":
        return _image_folder(spec, root, model_spec, said)
    if spec == "synthetic":
        shape = model_spec.input_shape
        parts = [SyntheticImages(1024, shape, 2 * seed), SyntheticImages(1024, shape, 2 * seed + 1)]
        return DataSplits(spec, parts[0], parts[1], None, augment=None, labelled=False)
    if is_function(spec):
        return _from_function(spec)
    expected = (
        "demo, fashion-mnist[:ROOT], cifar10:ROOT, imagefolder:ROOT, synthetic or package.module:function"
    )
    raise SpecError(f"unknown data {spec!r}: expected {expected}{near_names(kind, DATA_SPECS)}")


def _image_folder(spec: str, root: Path, model_spec: ModelSpec, said: PreprocessingOptions) -> DataSplits:
    shape = model_spec.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError(f"an image folder does not fit input shape {shape}: expected (1 or 3, H, W)")
    preprocessing = said.over(model_spec.preprocessing, shape, model_spec.name)
    if preprocessing is None:
        size_in_common(root)  # what is wrong with the folder goes first
        raise SpecError(unknown(model_spec.name))
    train, test, classes = read_image_folder(root, preprocessing)
    return DataSplits(spec, train, test, len(classes), CropAndFlip(), True, preprocessing)


def _fashion_mnist(spec: str, folder: Path, model_spec: ModelSpec, said: PreprocessingOptions) -> DataSplits:
    arrays = {split: read_fashion_mnist(folder, split) for split in ("train", "test")}
    return _in_memory(spec, arrays, model_spec, demo.MEAN[:1], demo.STD[:1], said, shift=2)


def _in_memory(
    spec: str,
    arrays: Mapping[str, tuple[Tensor, Tensor]],
    model_spec: ModelSpec,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    said: PreprocessingOptions,
    *,
    shift: int,
) -> DataSplits:
    shape = model_spec.input_shape
    if len(shape) != 3:
        raise DataError(f"{spec} does not fit input shape {shape}: expected (C, H, W)")
    if shape[0] != len(mean):
        # A grey image is repeated; ImageArrays refuses anything else.
        mean, std = mean[:1] * shape[0], std[:1] * shape[0]
    own = Preprocessing((shape[1], shape[2]), None, "none", mean, std, "bilinear")
    preprocessing = said.over(own, shape, model_spec.name) or own
    parts = {split: ImageArrays(images, labels, preprocessing) for split, (images, labels) in arrays.items()}
    for part in parts.values():
        check_labels(part.labels, 10, "the data set")
    return DataSplits(spec, parts["train"], parts["test"], 10, FlipAndShift(shift), True, preprocessing)


def _from_function(spec: str) -> DataSplits:
    function = import_attribute(spec, "data")
    try:
        result = function()
    except GroupifyError:
        raise
    except Exception as error:  # the user's code can raise anything
        raise SpecError(f"data {spec!r}: {type(error).__name__}: {one_line(error)}") from error
    if isinstance(result, DataSplits):
        splits = replace(result, spec=spec)
    elif isinstance(result, Mapping):
        unknown = set(result) - {"train", "test", "val"}
        if unknown or not result:
            raise SpecError(
                f"data {spec!r} returned the keys {sorted(map(str, result))}: expected train, test"
            )
        test = result.get("test", result.get("val"))
        splits = DataSplits(spec, result.get("train"), test, None, None, labelled=True)
    elif isinstance(result, tuple) and len(result) == 2:
        splits = DataSplits(spec, result[0], result[1], None, None, labelled=True)
    else:
        splits = DataSplits(spec, None, result, None, None, labelled=True)
    train, test = (_readable(spec, name, getattr(splits, name)) for name in ("train", "test"))
    return replace(splits, train=train, test=test)


def _is_readable(part: Any) -> bool:
    return hasattr(part, "__iter__") or hasattr(part, "__getitem__")


def _readable(spec: str, name: str, part: Any) -> Data | None:
    """Return a part that can be read again and again."""
    if part is None:
        return None
    if isinstance(part, Tensor):
        part = TensorDataset(part)
    if isinstance(part, Iterator):
        part = read_once(part)
    if isinstance(part, str) or not _is_readable(part):
        raise SpecError(f"data {spec!r} returned a {type(part).__name__} for {name}: expected {_PARTS}")
    if hasattr(part, "__len__") and len(part) == 0:
        raise DataError(f"data {spec!r}: the {name} part is empty; expected at least one image")
    readable: Data = part
    return readable
