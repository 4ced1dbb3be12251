"""A statically quantised (int8) variant beside the float file, made by ONNX Runtime's own quantiser."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnxruntime import quantization
from torch import Tensor

from groupify.errors import ArtefactError, DataError
from groupify.machine import int8_dot_products

_BATCH = 16


@dataclass(frozen=True)
class QuantizedModel:
    """An int8 file: quantize-dequantize (QDQ) pairs, weights quantised per output channel."""

    path: Path
    file_bytes: int
    calibration_images: int
    reduced_range: bool  # 7-bit weights, where the CPU's 8-bit products could overflow


def quantize_onnx(path: Path | str, target: Path | str, *, images: Tensor) -> QuantizedModel:
    """Quantise an exported file to int8, with activation ranges (minimum and maximum) from images.

    How much it changes is for ``compare_files`` to measure, and what it does to accuracy for
    ``evaluate(OnnxModule(target), data)``. It is not always faster: ONNX Runtime has no blocked kernel for
    int8 convs, so time both.

    Args:
        path: the float file.
        target: the file to write; an existing one is replaced.
        images: normalised inputs, shape (N, C, H, W).

    Raises:
        DataError: no images.
        ArtefactError: the file cannot be written.
    """
    if len(images) == 0:
        raise DataError("no images to calibrate int8 with: expected at least one, better some hundred")
    file = Path(target)
    reduced = not int8_dot_products()
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
            draft = Path(folder) / file.name
            _quantize(Path(path), draft, images, reduced)
            os.replace(draft, file)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {str(file)!r}: {error.strerror or error}; "
            "choose a folder that exists and is writable"
        ) from error
    return QuantizedModel(file, file.stat().st_size, len(images), reduced)


def _quantize(path: Path, draft: Path, images: Tensor, reduced: bool) -> None:
    """Quantise a file into another, which keeps its metadata, and check that."""
    source = onnx.load(str(path))
    with _quiet():
        quantization.quantize_static(
            str(path),
            str(draft),
            _reader(source.graph.input[0], images),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduced,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    result = onnx.load(str(draft))
    del result.metadata_props[:]
    result.metadata_props.extend(source.metadata_props)
    onnx.save(result, str(draft))
    onnx.checker.check_model(str(draft), full_check=True)


def _reader(source: Any, images: Tensor) -> Any:
    """Feed the images to the calibrator, in batches that the file takes."""
    fixed = source.type.tensor_type.shape.dim[0].dim_value
    batches = list(images.float().split(fixed or _BATCH))
    if fixed and len(batches[-1]) < fixed and len(batches) > 1:
        batches.pop()
    feeds = iter([{source.name: batch.numpy()} for batch in batches])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(feeds, None)

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice, logged by the root logger, from the user."""
    root = logging.getLogger()
    refuse = _Refuse()
    root.addFilter(refuse)
    try:
        yield
    finally:
        root.removeFilter(refuse)


class _Refuse(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR
