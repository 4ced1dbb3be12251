"""A model as one ONNX file that ONNX Runtime's optimisers know how to speed up."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor, nn

from groupify.errors import ArtefactError, ConversionError, GroupifyError
from groupify.graph.forward import evaluating
from groupify.machine import package_version
from groupify.onnx.lowering import optimise

if TYPE_CHECKING:
    from groupify.models.specs import Preprocessing

# The highest opset whose Conv (11), AveragePool (11) and pooling all have a rule in ONNX Runtime's
# NCHWc transformer: AveragePool-19 and Conv-22 have none in the versions groupify supports.
OPSET = 18
INPUT_NAME = "input"
OUTPUT_NAME = "output"


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file and what a caller needs to run it."""

    path: Path
    opset: int
    file_bytes: int  # with the external data, if there is any
    input_name: str
    output_names: tuple[str, ...]
    shuffles: int  # channel permutations that the model has
    shuffles_left: int  # of them, those that still move data at run time


def export_onnx(
    model: nn.Module,
    path: Path | str,
    *,
    input_shape: tuple[int, ...],
    preprocessing: Preprocessing | None = None,
    static_batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportedModel:
    """Export a model to ONNX, in evaluation mode, with its batch norms and channel shuffles folded.

    The file has one input, ``input``, of shape (batch, *input_shape), float32. A model that returns a
    dictionary keeps its keys as output names. Weights go to a second file only above 2 GB. The file is
    written aside and renamed; the model is left as it was.

    Args:
        model: any module that ``torch.export`` can trace.
        path: the file to write; an existing one is replaced.
        input_shape: shape of one input, without the batch dimension.
        preprocessing: what the inputs went through, recorded in the metadata.
        static_batch: a fixed batch size; None leaves it dynamic.
        metadata: more entries for the file's metadata.

    Raises:
        ConversionError: the model does not run on the input shape, or cannot be traced.
        ArtefactError: the file cannot be written.
    """
    file = Path(path)
    with evaluating(model):
        names = _output_names(model, input_shape)
        program = _trace(model, input_shape, names, static_batch)
    _name_nodes(program.model)
    folding = optimise(program.model.graph)
    program.model.metadata_props.update(_metadata(input_shape, preprocessing, metadata))
    size = _write(program, file)
    return ExportedModel(file, OPSET, size, INPUT_NAME, names, folding.found, folding.kept)


def _example(model: nn.Module, input_shape: tuple[int, ...], batch_size: int) -> Tensor:
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    if parameter is not None and parameter.dtype != torch.float32:
        raise ConversionError(f"cannot export {parameter.dtype} weights: call model.float() before exporting")
    return torch.zeros(batch_size, *input_shape, device=device)


def _output_names(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[str, ...]:
    try:
        with torch.no_grad():
            outputs = model(_example(model, input_shape, 1))
    except (GroupifyError, MemoryError):
        raise
    except Exception as error:  # the user's model can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"the model does not run on an input of shape (1, {', '.join(map(str, input_shape))}): {reason}; "
            "give the shape it was made for"
        ) from error
    if isinstance(outputs, Tensor):
        return (OUTPUT_NAME,)
    if isinstance(outputs, Mapping) and all(isinstance(value, Tensor) for value in outputs.values()):
        return tuple(str(key) for key in outputs)
    if isinstance(outputs, (tuple, list)) and all(isinstance(value, Tensor) for value in outputs):
        return tuple(f"{OUTPUT_NAME}_{index}" for index in range(len(outputs)))
    raise ConversionError(
        f"cannot export a model that returns {type(outputs).__name__}: expected a tensor, or a dict, tuple "
        "or list of tensors; wrap the model in one that returns these"
    )


def _trace(
    model: nn.Module, input_shape: tuple[int, ...], names: tuple[str, ...], static_batch: int | None
) -> Any:
    # A batch of one would be taken for a constant, so that a dynamic batch is traced with two.
    example = _example(model, input_shape, static_batch or 2)
    dynamic = None if static_batch is not None else ({0: torch.export.Dim("batch")},)
    try:
        with _quiet():
            return torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=list(names),
                dynamic_shapes=dynamic,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever went wrong in its own private classes
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ConversionError(
            f"torch.export cannot trace {type(model).__name__}: {reason.strip()}; "
            "groupify needs a model without data-dependent control flow"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, log lines and deprecation warnings about itself from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.filterwarnings(
                "ignore", category=category, module=r"(torch|onnxscript|onnx_ir|copyreg)\b"
            )
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _name_nodes(model: Any) -> None:
    """Name each node after the module whose output it computes, and drop what the exporter notes.

    The notes hold stack traces with the paths of this machine.
    """
    taken: dict[str, int] = {}
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        module = _last_module(scopes) if scopes else ""
        name = f"{module}/{node.op_type}" if module else node.op_type
        count = taken.get(name, 0)
        taken[name] = count + 1
        node.name = f"{name}_{count}" if count else name
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _last_module(scopes: str) -> str:
    """Return ``layer1.0.relu`` of ``"['', 'layer1', 'layer1.0', 'layer1.0.relu', 'relu_1']"``."""
    parts = [part.strip().strip("'\"") for part in scopes.strip("[]").split(",")]
    return parts[-2] if len(parts) > 1 else ""


def _metadata(
    input_shape: tuple[int, ...], preprocessing: Preprocessing | None, more: Mapping[str, str] | None
) -> dict[str, str]:
    entries = {"groupify.version": package_version("groupify") or "unknown"}
    if preprocessing is not None:
        entries["preprocessing"] = json.dumps({**asdict(preprocessing), "size": list(input_shape[1:])})
    return {**entries, **(more or {})}


def _write(program: Any, target: Path) -> int:
    """Write, check and rename; return the bytes of all files."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            # Same name inside, since a file above 2 GB holds the name of its data file.
            draft = Path(folder) / target.name
            with _quiet():
                program.save(draft)
            onnx.checker.check_model(str(draft), full_check=True)
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
