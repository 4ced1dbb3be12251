"""What a model is called with for batches of a data set, where that is more than a tensor of images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, default_collate

from groupify.data.batches import BatchDataset, Data, is_map_style, iterate_batches, iterate_items
from groupify.data.items import Labelled, as_batch, labels_of
from groupify.errors import DataError, GroupifyError
from groupify.graph.call import Call

Inputs: TypeAlias = Callable[[Any], tuple[tuple[Any, ...], Mapping[str, Any]]]
"""What a model is called with for a batch: the batch → positional and keyword arguments."""


def model_inputs(batch: Any, inputs: Inputs | None = None) -> Call:
    """Return what a model is called with for a batch.

    Args:
        batch: images, a pair of images and labels, or a dict of them.
        inputs: says it for models that take more than one tensor; None = the images alone.

    Raises:
        DataError: ``inputs`` fails or returns something else, or the batch holds no images.
    """
    if inputs is None:
        return Call((as_batch(batch, labelled=False)[0],))
    try:
        found: Any = inputs(batch)
    except (GroupifyError, MemoryError):
        raise
    except Exception as error:  # the caller's own code can raise anything
        reason = " ".join(str(error).split()) or "no message"
        raise DataError(
            f"inputs failed on a batch of type {type(batch).__name__} ({type(error).__name__}: {reason}): it "
            "gets each batch as the data gives it, labels included"
        ) from error
    if isinstance(found, tuple) and len(found) == 2:
        args, kwargs = found
        if isinstance(args, tuple) and isinstance(kwargs, Mapping):
            return Call(args, dict(kwargs))
    raise DataError(
        f"inputs gave a {type(found).__name__} for a batch: expected a tuple of arguments and a dict of "
        "keyword arguments, like (batch['image'], batch['mask']), {}"
    )


def iterate_calls(
    data: Tensor | Data,
    batch_size: int,
    inputs: Inputs | None = None,
    *,
    shuffle_seed: int | None = None,
    limit: int | None = None,
    first_batch: int = 0,
    share: tuple[int, int] = (0, 1),
    labelled: Labelled = True,
) -> Iterator[tuple[Call, Tensor]]:
    """Iterate over what a model is called with, and the labels, int64 (n,).

    Args:
        data: any of the kinds of :data:`Data`; with ``inputs`` also a tensor, and samples of any form,
            which ``torch.utils.data.default_collate`` makes batches of.
        batch_size, shuffle_seed, limit, first_batch, share, labelled: as for :func:`iterate_batches`.
        inputs: a batch → what the model is called with; None = its images. Labels are then the last entry of
            a tuple, or those that a dict has under ``labels`` or a similar key.

    Raises:
        DataError: as :func:`iterate_batches` and :func:`model_inputs`.
    """
    if inputs is None:
        images = iterate_batches(
            cast(Data, data), batch_size, shuffle_seed=shuffle_seed, limit=limit, first_batch=first_batch,
            share=share, labelled=labelled,
        )  # fmt: skip
        yield from ((Call((some,)), labels) for some, labels in images)
        return
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch size {batch_size}, limit {limit}: expected at least 1")
    indexed = is_map_style(data)
    batches = _batches(data, batch_size, shuffle_seed, limit)
    seen = 0
    for batch in batches:
        call = model_inputs(batch, inputs)
        labels = labels_of(batch, call.batch_size, labelled=labelled)
        if limit is not None and not indexed:
            call, labels = call.head(limit - seen), labels[: limit - seen]
        _check(call, seen)
        seen += len(labels)
        if first_batch > 0:
            first_batch -= 1
        elif len(labels) > share[0]:
            yield (call, labels) if share == (0, 1) else (_shared(call, share), labels[share[0] :: share[1]])
        if limit is not None and seen >= limit:
            return
    if seen == 0:
        raise DataError(
            "the data set is empty: expected at least one example (a generator can be read only once)"
        )


def calibration_calls(data: Any, inputs: Inputs, batch_size: int) -> tuple[Call, ...]:
    """Return all that a model is called with for a data set, read once and kept in memory.

    Raises:
        DataError: as :func:`iterate_calls`.
    """
    if isinstance(data, tuple) and all(isinstance(call, Call) for call in data):
        return data
    calls = iterate_calls(data, batch_size, inputs, labelled=False)
    return tuple(call.map(lambda tensor: tensor.detach().to("cpu", copy=True)) for call, _ in calls)


def _batches(data: Any, size: int, shuffle_seed: int | None, limit: int | None) -> Iterator[Any]:
    if isinstance(data, Tensor):
        yield from data.split(size)
    elif is_map_style(data):
        total = len(cast(Any, data))
        order = torch.arange(total)
        if shuffle_seed is not None:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(shuffle_seed))
        for indices in order[:limit].split(size):
            yield _gather(data, indices)
    elif isinstance(data, IterableDataset):
        samples = iterate_items(data)
        while some := list(itertools.islice(samples, size)):
            yield _collate(some)
    else:
        yield from iterate_items(data)


def _gather(data: Dataset[Any], indices: Tensor) -> Any:
    if isinstance(data, Subset):
        return _gather(data.dataset, torch.as_tensor(data.indices)[indices])
    if isinstance(data, BatchDataset):
        return data.batch(indices)
    if hasattr(data, "__getitems__"):
        return _collate(data.__getitems__(indices.tolist()))
    return _collate([data[index] for index in indices.tolist()])


def _collate(samples: Sequence[Any]) -> Any:
    try:
        return default_collate(list(samples))
    except (TypeError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"samples of type {type(samples[0]).__name__} make no batch ({reason}): give a DataLoader with a "
            "collate_fn of your own"
        ) from error


def _shared(call: Call, share: tuple[int, int]) -> Call:
    return call.part(slice(share[0], None, share[1]))


def _check(call: Call, seen: int) -> None:
    for tensor in call.tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(
                f"what inputs gave for the batch behind example {seen} holds NaN or infinite values: clean "
                "or drop it"
            )
