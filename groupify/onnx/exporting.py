"""A model as one ONNX file that ONNX Runtime's optimisers know how to speed up."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from torch import nn

from groupify.errors import ArtefactError, ConversionError
from groupify.graph.call import one_example
from groupify.graph.forward import evaluating
from groupify.machine import package_version
from groupify.models.wrappers import unwrapped
from groupify.onnx.any_size import image_shape, other_shape
from groupify.onnx.lowering import optimise
from groupify.onnx.tracing import quiet_exporter, trace_to_onnx

if TYPE_CHECKING:
    from groupify.models.preprocessing import Preprocessing


# Keys of the metadata.
VERSION, PREPROCESSING = "groupify.version", "preprocessing"


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file and what a caller needs to run it."""

    path: Path
    opset: int
    file_bytes: int  # with the external data, if there is any
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    shuffles: int  # channel permutations that the model has
    shuffles_left: int  # of them, those that still move data at run time


def export_onnx(
    model: nn.Module,
    path: Path | str,
    *,
    input_shape: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    preprocessing: Preprocessing | None = None,
    static_batch: int | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportedModel:
    """Export a model to ONNX, in evaluation mode, with its batch norms and channel shuffles folded.

    The file has one input, ``input``, of shape (batch, *input_shape), float32, or one for each tensor of
    ``example_inputs``, under the names of the parameters of the model's forward (``batch.image`` for an entry
    of a dict); what is no tensor is part of the file. It has one output for each tensor that the model
    returns, however nested; dictionaries give their keys as names. Weights go to a second file only above
    2 GB. The file is written aside and renamed; the model is left as it was.

    Args:
        model: any module that ``torch.export`` can trace.
        path: the file to write; an existing one is replaced.
        input_shape: shape of one input, without the batch dimension.
        example_inputs: in its place, what the model is called with: a tensor with a batch dimension, a tuple
            of positional arguments, a dict of keyword arguments, or a tuple of these two.
        preprocessing: what the inputs went through, recorded in the metadata.
        static_batch: a fixed batch size; None leaves it dynamic.
        dynamic_size: leave height and width open as well, for models that take images of any size, or of
            any multiple of 32, say. ``input_shape`` is then one of them. Whether the file is right at others
            too is for :func:`check_parity` to say, with ``other_shape``.
        opset: of the ONNX operators. None takes 18, the fastest in ONNX Runtime, or the lowest above it that
            has all operators of the model.
        metadata: more entries for the file's metadata.

    Raises:
        SpecError: neither ``input_shape`` nor ``example_inputs``, or both; ``dynamic_size`` for a model that
            is not called with one tensor of images.
        ConversionError: the model does not run on such inputs, cannot be traced, or has operators that
            the opset lacks; or it takes inputs of one size only: says which module does.
        ArtefactError: the file cannot be written.
    """
    file = Path(path)
    model = unwrapped(model)
    example = one_example(input_shape, example_inputs)
    if dynamic_size:
        other_shape(model, image_shape(example))  # refuses what takes no other
    with evaluating(model):
        traced = trace_to_onnx(
            model, example, static_batch=static_batch, opset=opset, dynamic_size=dynamic_size
        )
    folding = optimise(traced.program.model.graph)
    traced.program.model.metadata_props.update(_metadata(preprocessing, metadata))
    size = _write(traced.program, file)
    return ExportedModel(
        file, traced.opset, size, traced.input_names, traced.output_names, folding.found, folding.kept
    )


def _metadata(preprocessing: Preprocessing | None, more: Mapping[str, str] | None) -> dict[str, str]:
    entries = {VERSION: package_version("groupify") or "unknown"}
    if preprocessing is not None:
        entries[PREPROCESSING] = json.dumps(asdict(preprocessing))
    return {**entries, **(more or {})}


def _write(program: Any, target: Path) -> int:
    """Write, check and rename; return the bytes of all files."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            # Same name inside, since a file above 2 GB holds the name of its data file.
            draft = Path(folder) / target.name
            with quiet_exporter():
                program.save(draft)
            _check(draft)
            files = sorted(Path(folder).iterdir(), key=lambda file: file == draft)
            size = sum(file.stat().st_size for file in files)
            for file in files:
                os.replace(file, target.parent / file.name)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {str(target)!r}: {error.strerror or error}; "
            "choose a folder that exists and is writable"
        ) from error
    return size


def _check(draft: Path) -> None:
    try:
        onnx.checker.check_model(str(draft), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).splitlines()[0]
        raise ConversionError(
            f"PyTorch's exporter wrote what is no valid ONNX: {reason}; put another operation in its place"
        ) from error
