"""CIFAR-10 from its binary or its Python version, without ever unpickling.

The files of the Python version are pickles. They are read with an unpickler that can make nothing
but plain containers and inert records of arrays: it knows three names, and maps each of them to a
class of this module that only remembers what it was given.
"""

from __future__ import annotations

import io
import pickle  # the file format, not a way to load objects: see _ArrayUnpickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groupify.errors import DataError

_RECORD = 1 + 3 * 32 * 32
_BINARY = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
_PYTHON = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


def read_cifar10(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) and labels (N,), both uint8, of ``split`` "train" or "test".

    ``root`` holds, or is, the folder ``cifar-10-batches-bin`` or ``cifar-10-batches-py``.

    Raises:
        DataError: no such folder, or a file that is missing or corrupt.
    """
    for folder in (root / "cifar-10-batches-bin", root):
        if (folder / _BINARY["test"][0]).is_file():
            return _join([_read_binary(_existing(folder / name)) for name in _BINARY[split]])
    for folder in (root / "cifar-10-batches-py", root):
        if (folder / _PYTHON["test"][0]).is_file():
            return _join([_read_python(_existing(folder / name)) for name in _PYTHON[split]])
    raise DataError(
        f"no CIFAR-10 in {root}: expected the folder cifar-10-batches-bin or cifar-10-batches-py there; "
        "unpack cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} is missing: unpack the CIFAR-10 archive again")
    return path


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _read_binary(path: Path) -> tuple[Tensor, Tensor]:
    content = path.read_bytes()
    if len(content) == 0 or len(content) % _RECORD:
        raise DataError(
            f"{path} has {len(content)} bytes: expected a multiple of {_RECORD}, a label and 3 * 1024 pixels"
        )
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, _RECORD).copy())
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


class _Dtype:
    """Stands in for ``numpy.dtype``: remembers its name."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like mean nothing for single bytes."""


class _Array:
    """Stands in for ``numpy.ndarray``: remembers its shape and its bytes."""

    shape: Any = None
    name: Any = None
    fortran: Any = None
    content: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, dtype, self.fortran, self.content = state
        self.name = dtype.name


def _empty_array(*_: object) -> _Array:
    return _Array()


class _ArrayUnpickler(pickle.Unpickler):
    """Makes containers, numbers, bytes and ``_Array``; any other name in the file is refused."""

    def find_class(self, module: str, name: str) -> Any:
        stand_ins = {"_reconstruct": _empty_array, "ndarray": _Array, "dtype": _Dtype}
        if module.partition(".")[0] == "numpy" and name in stand_ins:
            return stand_ins[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_python(path: Path) -> tuple[Tensor, Tensor]:
    problem = f"{path} is not a batch of CIFAR-10's Python version"
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        array, numbers = batch[b"data"], batch[b"labels"]
        if not isinstance(array, _Array) or array.name not in ("u1", "uint8") or array.fortran:
            raise ValueError("data is no array of bytes")
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError("labels are no numbers")
        labels = torch.tensor(numbers, dtype=torch.uint8)
        pixels = np.frombuffer(array.content, np.uint8).reshape(-1, 3, 32, 32).copy()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{problem} ({error}): unpack the archive again") from error
    if len(pixels) != len(labels):
        raise DataError(f"{problem}: {len(pixels)} images but {len(labels)} labels")
    return torch.from_numpy(pixels), labels
