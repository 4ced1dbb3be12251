"""A statically quantised (int8) variant beside the float file, made by ONNX Runtime's own quantiser."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnxruntime import quantization
from torch import Tensor

from groupify.errors import ArtefactError, ConversionError, DataError
from groupify.machine import int8_dot_products

_BATCH = 16


@dataclass(frozen=True)
class FloatNode:
    """A node that an int8 file computes in float32, since ONNX Runtime's quantiser cannot take it."""

    name: str
    reason: str


@dataclass(frozen=True)
class QuantizedModel:
    """An int8 file: quantize-dequantize (QDQ) pairs, weights quantised per output channel."""

    path: Path
    file_bytes: int
    calibration_images: int
    reduced_range: bool  # 7-bit weights, where the CPU's 8-bit products could overflow
    left_in_float: tuple[FloatNode, ...] = ()


def quantize_onnx(path: Path | str, target: Path | str, *, images: Tensor) -> QuantizedModel:
    """Quantise an exported file to int8, with activation ranges (minimum and maximum) from images.

    How much it changes is for ``compare_files`` to measure, and what it does to accuracy for
    ``evaluate(OnnxModule(target), data)``. It is not always faster: ONNX Runtime has no blocked kernel for
    int8 convs, so time both. What the quantiser cannot take, such as a transposed conv in groups, stays
    float32.

    Args:
        path: the float file.
        target: the file to write; an existing one is replaced.
        images: normalised inputs, shape (N, C, H, W).

    Raises:
        DataError: no images.
        ConversionError: the file has several inputs, or the quantiser fails, whatever is left in float32.
        ArtefactError: the file cannot be written.
    """
    if len(images) == 0:
        raise DataError("no images to calibrate int8 with: expected at least one, better some hundred")
    file = Path(target)
    reduced = not int8_dot_products()
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
            draft = Path(folder) / file.name
            left = _quantize(Path(path), draft, images, reduced)
            os.replace(draft, file)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {str(file)!r}: {error.strerror or error}; "
            "choose a folder that exists and is writable"
        ) from error
    return QuantizedModel(file, file.stat().st_size, len(images), reduced, left)


def _quantize(path: Path, draft: Path, images: Tensor, reduced: bool) -> tuple[FloatNode, ...]:
    """Quantise a file into another, which keeps its metadata, and check that; return what stays float32."""
    source = onnx.load(str(path))
    if len(source.graph.input) > 1:
        names = ", ".join(value.name for value in source.graph.input)
        raise ConversionError(
            f"{str(path)!r} has the inputs {names}: int8 is calibrated with images alone; deploy the "
            "float file"
        )
    quantiser = _Quantiser(path, source.graph, draft, reduced)
    left = _grouped_transposed(source.graph)
    problem = quantiser.problem(images, without=left)
    if problem is not None:
        left += quantiser.culprits(images[:1], without=left)
        problem = quantiser.problem(images, without=left)
    if problem is not None:
        raise ConversionError(
            f"ONNX Runtime's quantiser fails on {str(path)!r}: {problem}; deploy the float file"
        )
    result = onnx.load(str(draft))
    del result.metadata_props[:]
    result.metadata_props.extend(source.metadata_props)
    onnx.save(result, str(draft))
    onnx.checker.check_model(str(draft), full_check=True)
    return left


def _grouped_transposed(graph: Any) -> tuple[FloatNode, ...]:
    # Its weight has the outputs of one group along the dimension of the scales, its bias those of all.
    reason = "ONNX Runtime's quantiser takes no transposed conv in groups"
    groups = {
        node.name: attribute.i
        for node in graph.node
        if node.op_type == "ConvTranspose"
        for attribute in node.attribute
        if attribute.name == "group"
    }
    return tuple(FloatNode(name, reason) for name, count in groups.items() if count > 1)


@dataclass(frozen=True)
class _Quantiser:
    """Runs of ONNX Runtime's quantiser on one file."""

    path: Path
    graph: Any
    draft: Path
    reduced: bool

    def problem(
        self, images: Tensor, *, without: Sequence[FloatNode], only: Sequence[str] | None = None
    ) -> str | None:
        """Quantise all nodes but some, or only some; return what goes wrong, None if nothing does."""
        try:
            with _quiet():
                quantization.quantize_static(
                    str(self.path),
                    str(self.draft),
                    _reader(self.graph.input[0], images),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    reduce_range=self.reduced,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    nodes_to_quantize=list(only or ()),
                    nodes_to_exclude=[node.name for node in without],
                )
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever numpy raises inside
            return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
        return None

    def culprits(self, images: Tensor, *, without: Sequence[FloatNode]) -> tuple[FloatNode, ...]:
        """Return the nodes that the quantiser fails on, found by trying kinds of operators, then nodes."""
        left = {node.name for node in without}
        kinds: dict[str, list[str]] = {}
        for node in self.graph.node:
            if node.name not in left:
                kinds.setdefault(node.op_type, []).append(node.name)
        found: list[FloatNode] = []
        for names in kinds.values():
            problem = self.problem(images, without=without, only=names)
            if problem is not None:
                alone = {name: self.problem(images, without=without, only=[name]) for name in names}
                reasons = {name: reason for name, reason in alone.items() if reason is not None}
                found += [FloatNode(*pair) for pair in (reasons or dict.fromkeys(names, problem)).items()]
        return tuple(found)


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
