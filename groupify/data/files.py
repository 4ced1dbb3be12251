"""Readers of data set files: idx (Fashion-MNIST), and CIFAR-10 in its binary and its Python version.

The files of CIFAR-10's Python version are pickles, which are never unpickled: an unpickler reads them that
can make nothing but plain containers and inert records of arrays. It knows three names, and maps each of
them to a class of this module that only remembers what it was given.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle  # the file format, not a way to load objects: see _ArrayUnpickler
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groupify.errors import DataError

# Debian's package dataset-fashion-mnist, then torchvision's customary download folder.
FASHION_MNIST_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data"))
_IDX_UINT8 = 0x08
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_BINARY = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
_CIFAR_PYTHON = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


def read_idx(path: Path) -> Tensor:
    """Return the uint8 array of an idx file, gzipped or not (LeCun's MNIST format).

    Raises:
        DataError: the file is missing, is no idx file of unsigned bytes, or is truncated.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; download the file again") from error
    if len(content) < 4 or content[:3] != bytes([0, 0, _IDX_UINT8]):
        raise DataError(
            f"{path} starts with 0x{content[:4].hex()}; expected an idx file of unsigned bytes (0x000008..)"
        )
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{path} is truncated: its idx header needs {header} bytes, it has {len(content)}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"{path} holds {len(content) - header} bytes of data, its header says {math.prod(shape)}: "
            "download the file again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def write_idx(path: Path, array: Tensor) -> None:
    """Write a uint8 array as a gzipped idx file; the same array gives the same bytes."""
    header = bytes([0, 0, _IDX_UINT8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.contiguous().numpy().tobytes(), 9, mtime=0))


def find_fashion_mnist(root: Path | None) -> Path:
    """Return the folder of the four idx files under ``root`` (flat, or torchvision's layout).

    Without ``root``, Debian's folder and ``./data`` are searched.

    Raises:
        DataError: no such folder.
    """
    roots = FASHION_MNIST_FOLDERS if root is None else (root,)
    for candidate in roots:
        for folder in (candidate, candidate / "FashionMNIST" / "raw", candidate / "raw"):
            if _idx_file(folder, "train-images-idx3-ubyte") is not None:
                return folder
    searched = " or ".join(str(folder) for folder in roots)
    raise DataError(
        f"no Fashion-MNIST in {searched}: expected train-images-idx3-ubyte[.gz] and its companions there "
        "or in FashionMNIST/raw; give the folder as fashion-mnist:ROOT"
    )


def read_fashion_mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, H, W) and labels (N,), both uint8, of ``split`` "train" or "test".

    Raises:
        DataError: a file is missing, corrupt, or does not fit its companion.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    arrays = []
    for name, dimensions in ((f"{prefix}-images-idx3-ubyte", 3), (f"{prefix}-labels-idx1-ubyte", 1)):
        path = _idx_file(folder, name)
        if path is None:
            raise DataError(f"{folder} has no {name}[.gz]: all four idx files of Fashion-MNIST are needed")
        array = read_idx(path)
        if array.dim() != dimensions:
            raise DataError(f"{path} has {array.dim()} dimensions; expected {dimensions}")
        arrays.append(array)
    images, labels = arrays
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {split} images but {len(labels)} labels")
    return images.unsqueeze(1), labels


def _idx_file(folder: Path, name: str) -> Path | None:
    for candidate in (name, f"{name}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    return None


def read_cifar10(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) and labels (N,), both uint8, of ``split`` "train" or "test".

    ``root`` holds, or is, the folder ``cifar-10-batches-bin`` or ``cifar-10-batches-py``.

    Raises:
        DataError: no such folder, or a file that is missing or corrupt.
    """
    for folder in (root / "cifar-10-batches-bin", root):
        if (folder / _CIFAR_BINARY["test"][0]).is_file():
            return _join([_read_binary(_existing(folder / name)) for name in _CIFAR_BINARY[split]])
    for folder in (root / "cifar-10-batches-py", root):
        if (folder / _CIFAR_PYTHON["test"][0]).is_file():
            return _join([_read_python(_existing(folder / name)) for name in _CIFAR_PYTHON[split]])
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
    if len(content) == 0 or len(content) % _CIFAR_RECORD:
        raise DataError(
            f"{path} has {len(content)} bytes: expected a multiple of {_CIFAR_RECORD}, a label and "
            "3 * 1024 pixels"
        )
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD).copy())
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
