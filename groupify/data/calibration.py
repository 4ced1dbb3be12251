"""Data that is read once and then kept: inputs to calibrate with, and what a generator gives."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from groupify.data.batches import Data, iterate_batches
from groupify.data.items import Labelled, as_batch
from groupify.errors import DataError

_BATCH_SIZE = 64
# More goes to a file.
_IN_MEMORY_BYTES = 2**28


def calibration_inputs(data: Tensor | Data) -> Tensor:
    """Return all inputs of a data set, shape (N, ...).

    They are read once and then kept, since not all data can be read again (a generator), and not all give
    the same again (a loader that shuffles): in memory, or, above 256 MiB, in a file that vanishes
    with the tensor. A tensor is returned as it is.

    Args:
        data: a tensor, or any of the kinds of :data:`Data`. Labels may be of any type, or missing.

    Raises:
        DataError: data of another type, no inputs, NaN or infinite ones, inputs of several shapes, or
            no room for the file.
    """
    if isinstance(data, Tensor):
        return data
    if isinstance(data, Mapping) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise DataError(
            f"calibration data of type {type(data).__name__}: expected a tensor (N, C, H, W), a Dataset, or "
            "an iterable of batches such as a DataLoader"
        )
    store = _Store()
    for images, _ in iterate_batches(data, _BATCH_SIZE, labelled=False):
        store.add(images)
    return store.whole()


def read_once(batches: Iterable[Any], labelled: Labelled = True) -> TensorDataset:
    """Return a data set of what can be read only once, such as a generator; it is kept as for calibration.

    Labels that are no class numbers count as none, unless ``labelled`` is ``"any"``; those stay in memory.

    Raises:
        DataError: as :func:`calibration_inputs`, or there are no labels where they may be ``"any"``.
    """
    store, labels = _Store(), []
    for item in batches:
        images, none = as_batch(item, labelled=False)
        store.add(images)
        try:
            labels.append(as_batch(item, labelled=labelled)[1].clone())
        except DataError:
            if labelled == "any":
                raise
            labels.append(none)
    if not labels:
        raise DataError("the data set is empty: expected at least one batch")
    return TensorDataset(store.whole(), torch.cat(labels))


class _Store:
    """Batches of one shape, gathered in memory till they are many, and then in a file."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._shape: tuple[int, ...] = ()
        self._count = 0
        self._file: IO[bytes] | None = None

    def add(self, images: Tensor) -> None:
        """Keep a batch (n, ...), float32."""
        shape = tuple(images.shape[1:])
        if self._count and shape != self._shape:
            raise DataError(
                f"calibration inputs of shapes {self._shape} and {shape}: resize or crop them to one shape"
            )
        self._shape = shape
        self._count += len(images)
        # A clone: loaders may give the same memory again.
        self._batches.append(images.detach().to("cpu", copy=True).contiguous())
        if self._file is not None or 4 * self._count * self._batches[0][0].numel() > _IN_MEMORY_BYTES:
            self._write()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="groupify-")  # noqa: SIM115 (whole() closes it)
            for batch in self._batches:
                self._file.write(batch.numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"no room for the calibration inputs in {tempfile.gettempdir()}: {error.strerror}; give "
                "fewer of them, or another folder in TMPDIR"
            ) from error
        self._batches.clear()

    def whole(self) -> Tensor:
        """Return all batches as one tensor."""
        if self._file is None:
            return torch.cat(self._batches)
        # The mapping lives as long as the tensor; closing the file removes its name alone.
        with self._file:
            mapped = np.memmap(self._file, np.float32, "r+", shape=(self._count, *self._shape))
        return torch.from_numpy(mapped)
