"""Readers of data set files: idx (Fashion-MNIST) and CIFAR-10's binary version. Never a pickle."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from groupify.errors import DataError

# Debian's package dataset-fashion-mnist, then torchvision's customary download folder.
FASHION_MNIST_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data"))
_IDX_UINT8 = 0x08


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
