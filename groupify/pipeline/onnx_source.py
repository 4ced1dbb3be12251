"""An ONNX file from anywhere as a model to evaluate."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from groupify.errors import ArtefactError, SpecError
from groupify.models.preprocessing import Preprocessing
from groupify.models.specs import ModelSpec, Source, WeightsOrigin
from groupify.onnx.exporting import PREPROCESSING, VERSION
from groupify.onnx.runtime import OnnxModule


def is_onnx_file(name: str) -> bool:
    """Whether a target is meant as an ONNX file."""
    return name.endswith(".onnx")


def onnx_source(name: str, input_shape: tuple[int, ...] | None) -> Source:
    """Open an ONNX file of one float32 input; what groupify has written says its preprocessing itself.

    Args:
        name: the file.
        input_shape: of one input, as the user says; None = as the file does.

    Raises:
        ArtefactError: there is no such file.
        SpecError: it takes other inputs than images, or another shape.
        GroupifyError: ONNX Runtime cannot open it.
    """
    if not Path(name).is_file():
        raise ArtefactError(f"no file {name!r}; expected an ONNX file")
    model = OnnxModule(name)
    shape = _shape(name, model, input_shape)
    preprocessing = _preprocessing(model.metadata) if shape is not None else None
    if preprocessing is not None and shape is not None and len(shape) == 3:
        preprocessing = preprocessing.of_size(shape[1:])
    spec = ModelSpec(name, {}, shape or (3, 224, 224), preprocessing)
    return Source(model, spec, WeightsOrigin("factory"), shape is not None, None)


def _shape(name: str, model: OnnxModule, said: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the shape of one input; None where neither the file nor the user says it."""
    inputs = model.inputs
    if len(inputs) != 1 or inputs[0][1] != "tensor(float)":
        taken = ", ".join(f"{source} ({kind})" for source, kind, _ in inputs)
        raise SpecError(f"{name!r} takes {taken}: expected one input, tensor(float), that holds images")
    own = inputs[0][2][1:]
    if said is not None:
        fits = len(said) == len(own) and all(
            not isinstance(size, int) or size == wanted for size, wanted in zip(own, said, strict=True)
        )
        if not fits:
            raise SpecError(f"{name!r} takes inputs of shape {own}, not {list(said)}: leave out --input-size")
        return said
    sizes = tuple(size for size in own if isinstance(size, int))
    return sizes if len(sizes) == len(own) else None


def _preprocessing(metadata: dict[str, str]) -> Preprocessing | None:
    if VERSION not in metadata or PREPROCESSING not in metadata:
        return None
    try:
        return TypeAdapter(Preprocessing).validate_json(metadata[PREPROCESSING])
    except ValidationError:  # of another version
        return None
