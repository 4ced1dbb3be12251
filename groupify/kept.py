"""Tensors that wait for later: in memory up to a limit, beyond it in files, which go with the last use."""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

import torch
from torch import Tensor

from groupify.errors import ConversionError


class Kept:
    """A tensor that waits on a shelf, until the last reference to this is gone."""

    def __init__(self, values: Tensor | _File) -> None:
        self._values = values

    def tensor(self) -> Tensor:
        """Return it, on the device that it came from."""
        return self._values if isinstance(self._values, Tensor) else self._values.read()

    def rows(self, numbers: Tensor) -> Tensor:
        """Return some of its rows, given by their numbers; of one in a file only these are read."""
        if isinstance(self._values, Tensor):
            return self._values[numbers.to(self._values.device)]
        return self._values.rows(numbers)


class _File:
    """A tensor in a file, laid out as it was in memory."""

    def __init__(self, path: Path, tensor: Tensor) -> None:
        strides = tensor.stride()
        self._order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
        self._back = [self._order.index(dim) for dim in range(tensor.dim())]
        self._path, self._dtype, self._device = path, tensor.dtype, tensor.device
        laid_out = tensor.detach().cpu().permute(self._order).contiguous()
        self._shape = laid_out.shape
        flat = laid_out.as_strided((laid_out.numel(),), (1,))  # of a single number a view may have any stride
        flat.view(torch.uint8).numpy().tofile(path)

    def read(self) -> Tensor:
        """Return the tensor; on the CPU it is a mapping of the file, whose pages need not stay in memory."""
        return self._mapped().to(self._device)

    def rows(self, numbers: Tensor) -> Tensor:
        """Return some of its rows."""
        return self._mapped()[numbers.cpu()].to(self._device)

    def _mapped(self) -> Tensor:
        count = math.prod(self._shape)
        flat = torch.from_file(str(self._path), shared=False, size=count, dtype=self._dtype)
        return flat.view(self._shape).permute(self._back)


class Shelf:
    """Keeps tensors as they are, in memory or, where they would be too many, in files.

    Args:
        limit: bytes of the tensors held in memory at the same time; None = all.

    Attributes:
        limit: as given.
        held: bytes that are held in memory now.
        most: bytes that were held at the same time so far.
        spilled: bytes written to files so far.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = itertools.count()
        self.held = self.most = self.spilled = 0

    def __enter__(self) -> Shelf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def keep(self, tensor: Tensor) -> Kept:
        """Return what the tensor can be had from later.

        Raises:
            ConversionError: there is no room in the temporary folder.
        """
        size = tensor.numel() * tensor.element_size()
        if not size or self.limit is None or self.held + size <= self.limit:
            kept = Kept(tensor)
            self.held += size
            self.most = max(self.most, self.held)
            weakref.finalize(kept, self._forget, size)
            return kept
        try:
            path = self._new_file()
            kept = Kept(_File(path, tensor))
        except OSError as error:
            raise ConversionError(
                f"no room for activations in the temporary folder ({error.strerror or error}): give fewer "
                "calibration images, more memory (--memory), or another folder in TMPDIR"
            ) from error
        self.spilled += size
        weakref.finalize(kept, _remove, path)
        return kept

    def _forget(self, size: int) -> None:
        self.held -= size

    def _new_file(self) -> Path:
        if self._folder is None:
            # Windows removes no file that is still mapped.
            self._folder = tempfile.TemporaryDirectory(prefix="groupify-", ignore_cleanup_errors=True)
        return Path(self._folder.name, str(next(self._numbers)))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


class KeptTensors(Sequence[Tensor]):
    """A list of tensors on a shelf; reading one may read a file."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._kept: list[Kept] = []
        self._lengths: list[int] = []

    def append(self, tensor: Tensor) -> None:
        """Keep one more."""
        self._kept.append(self._shelf.keep(tensor))
        self._lengths.append(len(tensor))

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._lengths.clear()

    def map(self, function: Callable[[Tensor], Tensor]) -> KeptTensors:
        """Return the list of what a function makes of each."""
        found = KeptTensors(self._shelf)
        for tensor in self:
            found.append(function(tensor))
        return found

    @property
    def row_count(self) -> int:
        """Number of rows of all together."""
        return sum(self._lengths)

    def rows(self, numbers: Tensor) -> Tensor:
        """Return rows of all tensors, one behind the other, by their numbers, shape (n,)."""
        starts = torch.tensor([0, *itertools.accumulate(self._lengths)])
        owner = torch.searchsorted(starts, numbers, right=True) - 1
        parts, order = [], []
        for index in owner.unique().tolist():
            here = (owner == index).nonzero().squeeze(1)
            parts.append(self._kept[index].rows(numbers[here] - starts[index]))
            order.append(here)
        rows = torch.cat(parts)
        return rows[torch.argsort(torch.cat(order)).to(rows.device)]

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (kept.tensor() for kept in self._kept)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [kept.tensor() for kept in self._kept[index]]
        return self._kept[index].tensor()
