"""A file with weights and activations in half precision (float16) beside the float file."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16

from groupify.errors import ArtefactError, ConversionError

_LARGEST = 65_504.0  # finite number


def halve_onnx(path: Path | str, target: Path | str) -> Path:
    """Write an exported file with float16 weights and activations; its inputs and outputs stay float32.

    It has half the size, and is for processors that compute in float16: ONNX Runtime's own CPU kernels for
    convs do not, and cast to float32.

    Args:
        path: the float file.
        target: the file to write; an existing one is replaced.

    Raises:
        ConversionError: ONNX Runtime's converter fails.
        ArtefactError: the file cannot be written.
    """
    file, source = Path(target), onnx.load(str(path))
    try:
        with warnings.catch_warnings():
            # Of numbers that are cut off: what comes of it is for ``compare_files`` to tell.
            warnings.simplefilter("ignore")
            converted = convert_float_to_float16(source, keep_io_types=True, max_finite_val=_LARGEST)
        halved = ir.from_proto(converted)
        halved.graph.sort()  # the casts of the inputs come last
        result = ir.to_proto(halved)
        onnx.checker.check_model(result, full_check=True)
    except Exception as error:  # whatever the converter, the checker or the shape inference raise
        reason = " ".join(str(error).split())
        raise ConversionError(
            f"{str(path)!r} has no form in float16: {type(error).__name__}: {reason}; deploy the float file"
        ) from error
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
            draft = Path(folder) / file.name
            onnx.save(result, str(draft))
            os.replace(draft, file)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {str(file)!r}: {error.strerror or error}; "
            "choose a folder that exists and is writable"
        ) from error
    return file
