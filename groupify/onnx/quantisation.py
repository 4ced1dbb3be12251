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

import numpy as np
import onnx
import torch
from onnxruntime import quantization
from torch import Tensor, nn

from groupify.errors import ArtefactError, DataError, GroupifyError
from groupify.machine import int8_dot_products
from groupify.onnx.comparison import Array
from groupify.onnx.runtime import open_session

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
    source = onnx.load(str(path))
    reduced = not int8_dot_products()
    reader = _reader(source.graph.input[0], images)
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
            draft = Path(folder) / file.name
            with _quiet():
                quantization.quantize_static(
                    str(path),
                    str(draft),
                    reader,
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
            os.replace(draft, file)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {str(file)!r}: {error.strerror or error}; "
            "choose a folder that exists and is writable"
        ) from error
    return QuantizedModel(file, file.stat().st_size, len(images), reduced)


class OnnxModule(nn.Module):
    """An ONNX file that is called like a module: tensor in, first output out, on the CPU.

    It lets everything that measures a model, accuracy first of all, measure the file. A file of fixed batch
    size is run as often as the images need, the last batch filled up with zeros.
    """

    def __init__(self, path: Path | str, *, threads: int = 1) -> None:
        super().__init__()
        self._path = str(path)
        self._session = open_session(path, threads=threads)
        source = self._session.get_inputs()[0]
        self._name = source.name
        self._batch = source.shape[0] if isinstance(source.shape[0], int) else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the file on a batch."""
        return torch.from_numpy(next(iter(self.outputs(inputs).values())))

    def outputs(self, inputs: Tensor) -> dict[str, Array]:
        """Run the file on a batch and return all outputs by name.

        Raises:
            GroupifyError: the file does not take inputs of that shape.
        """
        values = inputs.detach().float().cpu()
        if self._batch is None:
            return self._run(values)
        filler = -len(values) % self._batch
        filled = torch.cat([values, values.new_zeros(filler, *values.shape[1:])])
        parts = [self._run(part) for part in filled.split(self._batch)]
        return {name: np.concatenate([part[name] for part in parts])[: len(values)] for name in parts[0]}

    def _run(self, values: Tensor) -> dict[str, Array]:
        try:
            results = self._session.run(None, {self._name: values.numpy()})
        except Exception as error:  # onnxruntime raises bare pybind classes of its own
            reason = str(error).splitlines()[0]
            raise GroupifyError(
                f"ONNX Runtime cannot run {self._path!r} on {tuple(values.shape)}: {reason}"
            ) from error
        return {
            output.name: result for output, result in zip(self._session.get_outputs(), results, strict=True)
        }


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
