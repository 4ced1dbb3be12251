"""Batches from data of any kind: map-style data sets, iterable ones, and loaders of ready batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from groupify.data.items import UNLABELLED, Batch, Labelled, as_batch, collate
from groupify.errors import DataError

__all__ = [
    "UNLABELLED",
    "Batch",
    "BatchDataset",
    "Data",
    "calibration_images",
    "check_labels",
    "first_input",
    "is_map_style",
    "iterate_batches",
    "split_validation",
]

Data: TypeAlias = Dataset[Any] | Iterable[Any]
"""A map-style ``Dataset`` or an ``IterableDataset`` of samples ``(image, label)`` or ``image``, or an
iterable (a ``DataLoader``) of batches ``(images, labels)`` or ``images``; images are floating-point. In the
place of a pair there may be a dict, as Hugging Face has it."""

# How many times the wanted images are looked at in a stream, whose length is unknown.
_STREAM_FACTOR = 20


@runtime_checkable
class BatchDataset(Protocol):
    """A map-style data set that reads many items at once, in place of one by one."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch:
        """Return images (n, C, H, W) as float32 and labels (n,) of the int64 ``indices`` (n,)."""


def iterate_batches(
    data: Data,
    batch_size: int,
    *,
    shuffle_seed: int | None = None,
    limit: int | None = None,
    first_batch: int = 0,
    share: tuple[int, int] = (0, 1),
    labelled: Labelled = True,
) -> Iterator[Batch]:
    """Iterate over ``(images, labels)``: float32 (n, C, H, W) and int64 (n,).

    Args:
        data: any of the kinds of :data:`Data`; a loader keeps its own batch size and order.
        batch_size: images per batch; the last batch may be smaller.
        shuffle_seed: a map-style data set is read in the random order of this seed; None = in order.
        limit: stop after this many images.
        first_batch: leave out so many batches; those of a map-style data set are not even read.
        share: (r, n): of each batch only every n-th image from the r-th on, for the r-th of n processes;
            a batch without such an image is left out. What a map-style data set has besides is not read.
        labelled: whether labels are wanted; without, they may be anything, and come as ``UNLABELLED``; with
            ``"any"``, those of any form, (n, …).

    Raises:
        DataError: no images, NaN or infinite images, images that are not floating-point tensors, or
            images of different shapes in a batch.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch size {batch_size}, limit {limit}: expected at least 1")
    if is_map_style(data):
        dataset = cast(Dataset[Any], data)
        parts = _map_style_batches(dataset, batch_size, shuffle_seed, limit, first_batch, share, labelled)
        return _checked(parts, limit, whole=(first_batch, share) == (0, (0, 1)))
    if isinstance(data, IterableDataset):
        batches = _sample_stream(data, batch_size, labelled)
    else:
        batches = (as_batch(item, labelled=labelled) for item in iterate_items(data))
    checked = itertools.islice(_checked(batches, limit), first_batch, None)
    return checked if share == (0, 1) else _shared(checked, share)


def calibration_images(data: Data, count: int, *, seed: int) -> Tensor:
    """Return a random subset of the images, without replacement: float32 (count, C, H, W).

    Labels may be of any type; they are not looked at. A map-style data set is sampled as a whole; of a
    stream, at most the first 20 × ``count`` images.
    If there are fewer than ``count`` images, all of them are returned, in random order.

    Example:
        >>> data = groupify.load_data("demo", groupify.load_model("demo").spec)
        >>> groupify.calibration_images(data.train, 100, seed=0).shape
        torch.Size([100, 3, 28, 28])

    Raises:
        DataError: as :func:`iterate_batches`.
    """
    if count < 1:
        raise DataError(f"{count} calibration images: expected at least 1")
    batch_size = min(count, 256)
    if is_map_style(data):
        batches = iterate_batches(data, batch_size, shuffle_seed=seed, limit=count, labelled=False)
        return torch.cat([images for images, _ in batches])
    # The images with the largest random keys are a uniform sample of the stream.
    generator = torch.Generator().manual_seed(seed)
    kept, keys = torch.empty(0), torch.empty(0)
    for images, _ in iterate_batches(data, batch_size, limit=_STREAM_FACTOR * count, labelled=False):
        keys = torch.cat([keys, torch.rand(len(images), generator=generator)])
        kept = torch.cat([kept, images]) if len(kept) else images
        keys, order = keys.topk(min(count, len(keys)))
        kept = kept[order]
    return kept


def first_input(data: Data) -> Tensor:
    """Return the first input, float32 (C, H, W) or whatever shape it has; labels are not looked at.

    Raises:
        DataError: as :func:`iterate_batches`.
    """
    images, _ = next(iterate_batches(data, 1, limit=1, labelled=False))
    return images[0]


def split_validation(data: Data, fraction: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Split a map-style data set at random into ``(train, validation)``.

    Args:
        data: a map-style data set of at least two items.
        fraction: the validation part, between 0 and 1; each part gets one item at least.
        seed: the same seed gives the same parts.

    Raises:
        DataError: data that has no length to split, fewer than two items, or a bad fraction.
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation fraction {fraction}: expected a number between 0 and 1")
    if not is_map_style(data):
        raise DataError(
            f"a {type(data).__name__} cannot be split: expected a map-style data set; "
            "give the validation images as data of their own"
        )
    total = len(cast(Any, data))
    if total < 2:
        raise DataError(f"{total} images cannot be split: expected at least 2")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(max(round(total * fraction), 1), total - 1)
    dataset = cast(Dataset[Any], data)
    return Subset(dataset, sorted(order[held_out:])), Subset(dataset, sorted(order[:held_out]))


def is_map_style(data: Data) -> bool:
    """Whether ``data`` is indexed sample by sample; a list or tuple holds ready batches."""
    if isinstance(data, IterableDataset | list | tuple):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _map_style_batches(
    data: Dataset[Any],
    batch_size: int,
    shuffle_seed: int | None,
    limit: int | None,
    first_batch: int,
    share: tuple[int, int],
    labelled: Labelled,
) -> Iterator[Batch]:
    total = len(cast(Any, data))
    if shuffle_seed is None:
        order = torch.arange(total)
    else:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(shuffle_seed))
    order = order[:limit]
    rank, world = share
    for start in range(first_batch * batch_size, len(order), batch_size):
        indices = order[start : start + batch_size][rank::world]
        if len(indices):
            yield _gather(data, indices, labelled)


def _shared(batches: Iterable[Batch], share: tuple[int, int]) -> Iterator[Batch]:
    rank, world = share
    for images, labels in batches:
        if len(images) > rank:
            yield images[rank::world], labels[rank::world]


def _gather(data: Dataset[Any], indices: Tensor, labelled: Labelled) -> Batch:
    if isinstance(data, Subset):
        return _gather(data.dataset, torch.as_tensor(data.indices)[indices], labelled)
    if isinstance(data, BatchDataset):
        return data.batch(indices)
    if hasattr(data, "__getitems__"):
        return collate(data.__getitems__(indices.tolist()), labelled=labelled)
    return collate([data[index] for index in indices.tolist()], labelled=labelled)


def _sample_stream(data: Iterable[Any], batch_size: int, labelled: Labelled) -> Iterator[Batch]:
    samples: list[Any] = []
    for sample in iterate_items(data):
        samples.append(sample)
        if len(samples) == batch_size:
            yield collate(samples, labelled=labelled)
            samples = []
    if samples:
        yield collate(samples, labelled=labelled)


def iterate_items(data: Any) -> Iterator[Any]:
    """Iterate over what is no map-style data set, item by item.

    Raises:
        DataError: it cannot be iterated over, or a worker of a loader died.
    """
    try:
        return _watched(iter(data))
    except TypeError as error:
        raise DataError(
            f"data of type {type(data).__name__}: expected a Dataset, an IterableDataset or a DataLoader"
        ) from error


def _watched(items: Iterator[Any]) -> Iterator[Any]:
    workers = getattr(items, "_workers", [])
    try:
        try:
            yield from items
        except (EOFError, ConnectionError) as error:
            # Perhaps a worker died while it was handing over a tensor. What a data set itself raises in a
            # worker comes as "Caught ...".
            if not workers or str(error).startswith("Caught "):
                raise
            _await_a_death(workers)
            raise DataError(_death(error)) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(_death(error)) from error


def _await_a_death(workers: Sequence[Any]) -> None:
    """Wait, for seconds at most, till a worker that has closed its files is dead.

    A dying process closes its files first; then torch's handler of SIGCHLD raises RuntimeError, wherever the
    program is by then: here, where that is expected, and not in the caller's own handler of the error.
    """
    closed = wait([worker.sentinel for worker in workers], timeout=5)
    for worker in workers:
        if worker.sentinel in closed:
            worker.join(timeout=5)


def _death(error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"a worker of the data loader died ({reason}): out of memory, or a crash in the data set; "
        "num_workers=0 shows which"
    )


def _checked(batches: Iterator[Batch], limit: int | None, *, whole: bool = True) -> Iterator[Batch]:
    seen = 0
    for images, labels in batches:
        if limit is not None and seen + len(images) > limit:
            images, labels = images[: limit - seen], labels[: limit - seen]
        if not bool(images.isfinite().all()):
            bad = (~images.flatten(1).isfinite().all(1)).nonzero()[0].item()
            raise DataError(f"image {seen + int(bad)} holds NaN or infinite values: clean or drop it")
        if len(images):
            yield images, labels
        seen += len(images)
        if limit is not None and seen >= limit:
            break
    if seen == 0 and whole:
        raise DataError(
            "the data set is empty: expected at least one image (a generator can be read only once)"
        )


def check_labels(labels: Tensor, num_classes: int, owner: str = "the model") -> None:
    """Raise a DataError that names the first label outside 0 … ``num_classes`` - 1."""
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if len(bad):
        raise DataError(
            f"label {int(bad[0])} is out of range: {owner} has {num_classes} classes, from 0 on; "
            "use a model with one output per class of the data"
        )
