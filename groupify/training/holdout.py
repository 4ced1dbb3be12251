"""Training data split into what is trained on and what the best weights are chosen on."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

from groupify.data.batches import Data, is_map_style, iterate_batches, split_validation
from groupify.data.calls import Inputs, iterate_calls
from groupify.data.items import Labelled
from groupify.data.ranks import ALONE, Ranks
from groupify.errors import DataError
from groupify.graph.call import Call
from groupify.training.settings import FinetuneSettings

CallBatch: TypeAlias = tuple[Call, Tensor]
"""What the model is called with, and the labels, (n,) or of any form (n, …)."""

# More do not choose better, and each validation reads them several times.
_MOST_IMAGES = 5_000
# A stream's held-out images stay in memory.
_MAX_STREAM_IMAGES = 2_048


@dataclass(frozen=True)
class TrainingPart:
    """What is trained on: ``data`` without its first ``skipped`` images.

    Attributes:
        data: what the batches are read from.
        steps_per_epoch: batches of one pass.
        skipped: the images at the start of a stream that are held out, shape (K, C, H, W).
        inputs: a batch of the data → what the model is called with; None = its images.
        labelled: how its labels are read.
    """

    data: Data
    steps_per_epoch: int
    skipped: Tensor | None = None
    inputs: Inputs | None = None
    labelled: Labelled = True

    def batches(
        self,
        settings: FinetuneSettings,
        epoch: int,
        first: int = 0,
        ranks: Ranks = ALONE,
        on_first: Callable[[int | None], None] | None = None,
    ) -> Iterator[tuple[CallBatch, int]]:
        """Return the batches of one pass, in an order that depends on the seed and the epoch only.

        Args:
            settings: seed and batch size.
            epoch: number of the pass.
            first: leave out so many batches; those of a map-style data set are not read.
            ranks: the processes that share each batch.
            on_first: called behind the batches that are left out, before the first one is read, with the
                checksum of their labels, or None where they were not read.

        Returns:
            This rank's share of each batch, and the number of images of the whole batch. Where the
            number is smaller than that of the ranks, some ranks get no batch.

        Raises:
            DataError: bad data, a stream that starts with other images than in the first pass, or one
                that ends within the batches to leave out.
        """
        on_first = on_first or (lambda _: None)
        if is_map_style(self.data):
            on_first(None)
            yield from self._indexed(settings, epoch, first, ranks)
            return
        batches, checksum = self._streamed(settings, epoch, first)
        on_first(checksum)
        for call, labels in batches:
            own = slice(ranks.rank, None, ranks.world)
            yield (call if ranks.world == 1 else call.part(own), labels[own]), len(labels)

    def _indexed(
        self, settings: FinetuneSettings, epoch: int, first: int, ranks: Ranks
    ) -> Iterator[tuple[CallBatch, int]]:
        size, total, seed = settings.batch_size, len(cast(Any, self.data)), order_seed(settings, epoch)
        share = (ranks.rank, ranks.world)
        batches = iterate_calls(
            self.data, size, self.inputs, shuffle_seed=seed, first_batch=first, share=share,
            labelled=self.labelled,
        )  # fmt: skip
        for number, batch in enumerate(batches, start=first):
            yield batch, min(size, total - number * size)

    def _streamed(
        self, settings: FinetuneSettings, epoch: int, first: int
    ) -> tuple[Iterator[CallBatch], int]:
        """Return the batches behind the ``first`` ones, and the checksum of those."""
        _start_pass(self.data, settings, epoch)
        batches = iterate_calls(self.data, settings.batch_size, self.inputs, labelled=self.labelled)
        if self.skipped is not None:
            batches = _skip(batches, self.skipped)
        checksum, left_out = 0, 0
        for _, labels in islice(batches, first):
            checksum, left_out = checksum_of(labels, checksum), left_out + 1
        if left_out < first:
            raise DataError(f"the data gave {first} batches before and ends after {left_out} now")
        return batches, checksum


def checksum_of(labels: Tensor, before: int = 0) -> int:
    """Return the checksum of labels behind those whose checksum is ``before``."""
    # As bytes, since NumPy does not have all types.
    return zlib.crc32(labels.contiguous().view(torch.uint8).numpy().tobytes(), before)


def order_seed(settings: FinetuneSettings, epoch: int) -> int:
    """Return the seed of one pass; spread, so that neighbouring seeds do not share passes."""
    return settings.seed * 1_000_003 + epoch


def _start_pass(data: Data, settings: FinetuneSettings, epoch: int) -> None:
    """Let what gives the batches start a pass whose order depends on the seed and the epoch only."""
    for generator in generators_of(data):
        generator.manual_seed(order_seed(settings, epoch))
    for owner in (data, getattr(data, "sampler", None), getattr(data, "dataset", None)):
        if callable(set_epoch := getattr(owner, "set_epoch", None)):
            set_epoch(epoch)


def generators_of(data: Data) -> list[torch.Generator]:
    """Return a loader's own random generators, which its order comes from."""
    found = [getattr(owner, "generator", None) for owner in (data, getattr(data, "sampler", None))]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def hold_out(
    data: Data,
    validation: Data | None,
    settings: FinetuneSettings,
    inputs: Inputs | None = None,
    labelled: Labelled = True,
) -> tuple[TrainingPart, Data]:
    """Split training data into the part that is trained on and the held-out part.

    A map-style data set, or a ``DataLoader`` of one, is split at random, at most 5,000 images from the rest.
    Of any other stream the first images are held out, which is sound only if every pass starts with the same
    images; this is checked in every pass.

    Args:
        data: the training data.
        validation: held-out data of the caller's; ``data`` is then trained on as a whole.
        settings: seed, fraction, batch size and, for data of unknown length, images per epoch.
        inputs: a batch of the data → what the model is called with; None = its images.
        labelled: how labels are read.

    Raises:
        DataError: too little data, data of unknown length, or data that cannot be split.
    """
    if validation is not None:
        images = _images_per_epoch(data, settings, inputs)
        steps = _steps(data, images, settings, inputs)
        return TrainingPart(data, steps, inputs=inputs, labelled=labelled), validation
    seed = settings.seed
    if is_map_style(data):
        train, held_out = split_validation(data, _fraction(data, settings), seed)
        steps = math.ceil(len(cast(Any, train)) / settings.batch_size)
        return TrainingPart(train, steps, inputs=inputs, labelled=labelled), held_out
    if isinstance(data, DataLoader) and _can_be_rebuilt(data):
        train, held_out = split_validation(data.dataset, _fraction(data.dataset, settings), seed)
        shuffled = isinstance(data.sampler, RandomSampler)
        loader = _rebuilt(data, train, seed, shuffle=shuffled)
        part = TrainingPart(loader, len(loader), inputs=inputs, labelled=labelled)
        return part, _rebuilt(data, held_out, seed)
    return _hold_out_first(data, settings, inputs, labelled)


def _fraction(data: Any, settings: FinetuneSettings) -> float:
    """Return which share of map-style data is held out."""
    return min(settings.validation_fraction, _MOST_IMAGES / max(1, len(data)))


def _hold_out_first(
    data: Data, settings: FinetuneSettings, inputs: Inputs | None, labelled: Labelled
) -> tuple[TrainingPart, Data]:
    """Hold out the first images of a stream."""
    if inputs is not None:
        raise DataError(
            f"a {type(data).__name__} with inputs cannot be split: give a Dataset, a DataLoader of one, or "
            "the validation data as data of their own"
        )
    images = _images_per_epoch(data, settings, None)
    wanted = min(max(1, round(settings.validation_fraction * images)), _MAX_STREAM_IMAGES)
    batches = list(iterate_batches(data, settings.batch_size, limit=wanted, labelled=labelled))
    first = torch.cat([images for images, _ in batches])
    if len(first) < wanted:
        raise DataError(
            f"the training data ends after {len(first)} images, where {wanted} of {images} are to be held "
            "out: say how many it has, images_per_epoch=N or --images-per-epoch N"
        )
    steps = _steps(data, images - len(first), settings, None)
    return TrainingPart(data, steps, first, labelled=labelled), batches


def _steps(data: Data, images: int, settings: FinetuneSettings, inputs: Inputs | None) -> int:
    """Number of batches that ``images`` images make."""
    size = settings.batch_size
    if not is_map_style(data):
        # A loader has its own batch size.
        size = len(next(iterate_calls(data, size, inputs, labelled=False))[1])
    return max(1, math.ceil(images / size))


def _images_per_epoch(data: Data, settings: FinetuneSettings, inputs: Inputs | None) -> int:
    if settings.images_per_epoch is not None:
        return settings.images_per_epoch
    if isinstance(data, DataLoader):
        if data.batch_size is not None and hasattr(data.dataset, "__len__"):
            return len(data) * data.batch_size
    elif isinstance(data, list | tuple):
        calls = iterate_calls(data, settings.batch_size, inputs, labelled=False)
        return sum(len(labels) for _, labels in calls)
    elif is_map_style(data) or (isinstance(data, Dataset) and hasattr(data, "__len__")):
        return len(cast(Any, data))
    raise DataError(
        f"the length of the training data ({type(data).__name__}) is not known: "
        "say how many images make an epoch, images_per_epoch=N or --images-per-epoch N"
    )


def _can_be_rebuilt(loader: DataLoader[Any]) -> bool:
    standard = type(loader.sampler) in (RandomSampler, SequentialSampler)
    return is_map_style(loader.dataset) and standard and type(loader.batch_sampler) is BatchSampler


def _rebuilt(
    loader: DataLoader[Any], dataset: Subset[Any], seed: int, *, shuffle: bool = False
) -> DataLoader[Any]:
    """Return a loader like ``loader`` for other data."""
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        shuffle=shuffle,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(seed),
    )


def _skip(batches: Iterator[CallBatch], skipped: Tensor) -> Iterator[CallBatch]:
    done = 0
    for call, labels in batches:
        images = call.tensors[0]
        left_out = min(len(images), len(skipped) - done)
        if left_out and not torch.equal(images[:left_out], skipped[done : done + left_out]):
            raise DataError(
                "the training stream starts with other images than in its first pass, so none is held out: "
                "give validation images apart, or a Dataset"
            )
        done += left_out
        if left_out < len(images):
            yield call.part(slice(left_out, None)), labels[left_out:]
