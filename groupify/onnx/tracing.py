"""A model as an ONNX graph, by PyTorch's own exporter, and what to say where that does not work."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from groupify.errors import ConversionError, GroupifyError
from groupify.graph.call import Call, Example
from groupify.onnx.any_size import open_axes
from groupify.onnx.attention import PlainAttention
from groupify.onnx.graph_edits import ValueNames
from groupify.onnx.inputs import input_places
from groupify.onnx.outputs import named_outputs
from groupify.onnx.torch_operators import operators_read_once

# The highest opset whose Conv (11), AveragePool (11) and pooling all have a rule in ONNX Runtime's
# NCHWc transformer: AveragePool-19 and Conv-22 have none in the versions groupify supports.
OPSET = 18
# The highest that PyTorch's exporter writes.
LAST_OPSET = 23

_LONGEST_REASON = 200
_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


@dataclass(frozen=True)
class TracedModel:
    """An ONNX program that is still in memory, its inputs, outputs, weights and nodes under their final
    names."""

    program: Any
    opset: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]


def trace_to_onnx(
    model: nn.Module,
    example: Example,
    *,
    static_batch: int | None,
    opset: int | None,
    dynamic_size: bool = False,
) -> TracedModel:
    """Trace a model in evaluation mode.

    Args:
        model: any module that ``torch.export`` can trace.
        example: shape of one input, without the batch dimension; or how the model is called.
        static_batch: a fixed batch size; None leaves it dynamic.
        opset: of the ONNX operators; None takes 18, or the lowest that has all operators of the model.
        dynamic_size: leave height and width open too.

    Raises:
        SpecError: ``dynamic_size`` for a model that is not called with one tensor of images.
        ConversionError: the model does not run on such inputs, or cannot be traced; says what torch said,
            and whether a fixed batch or size would help.
    """
    if opset is not None and not OPSET <= opset <= LAST_OPSET:
        raise ConversionError(
            f"opset {opset}: expected {OPSET} to {LAST_OPSET}, which PyTorch's exporter writes in full"
        )
    names = _output_names(model, example, static_batch or 1)
    sizes = open_axes(example) if dynamic_size else {}
    try:
        program = _export(model, example, names, static_batch, opset or OPSET, sizes)
    except (GroupifyError, MemoryError):
        raise
    except Exception as error:  # the exporter wraps whatever went wrong in its own private classes
        if dynamic_size and _is_fine(model, example, names, static_batch, opset or OPSET):
            raise _of_one_size(model, error) from error
        raise _untraceable(model, error, static_batch, _fixed_batch_problem(model, example)) from error
    needed = _lowest_opset(program.model.graph, opset or OPSET)
    if needed is not None:
        if opset is not None or needed > LAST_OPSET:
            raise ConversionError(_too_old(program.model.graph, opset or OPSET, needed))
        return trace_to_onnx(
            model, example, static_batch=static_batch, opset=needed, dynamic_size=dynamic_size
        )
    inputs = tuple(str(value.name) for value in program.model.graph.inputs)
    names = tuple(f"output.{name}" if name in inputs else name for name in names)
    _rename(program.model.graph, names)
    _name_nodes(program.model)
    return TracedModel(program, opset or OPSET, inputs, names)


# ---- tracing


class _OwnError(Exception):
    """What is wrong with a program that torch traced, in groupify's words."""


class _Flat(nn.Module):
    """A model that takes tensors and returns a tuple of them, whatever its own are nested in."""

    def __init__(self, model: nn.Module, call: Call, places: Sequence[int], names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self._call, self._places, self._names = call, places, names

    # One argument: of several (*inputs) torch 2.9 forgets what it calls them where their sizes depend on
    # each other, as batches do.
    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(self._places, inputs, strict=True))
        count = itertools.count()
        call = self._call.map(lambda _: given[next(count)])
        outputs = named_outputs(call.apply(self.model))
        if tuple(outputs) != self._names:
            raise _OwnError(
                f"it has {len(outputs)} outputs for {call.batch_size} images, {len(self._names)} for another "
                "batch"
            )
        return tuple(outputs.values())


def _call(model: nn.Module, example: Example, batch_size: int) -> Call:
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    if parameter is not None and parameter.dtype != torch.float32:
        raise ConversionError(f"cannot export {parameter.dtype} weights: call model.float() before exporting")
    if isinstance(example, Call):
        return example.on(model).of_size(batch_size)
    return Call((torch.zeros(batch_size, *example, device=device),))


def _output_names(model: nn.Module, example: Example, batch_size: int) -> tuple[str, ...]:
    call = _call(model, example, batch_size)
    try:
        with torch.no_grad():
            value = call.run(model)
    except ConversionError as error:
        cause = error.__cause__
        if cause is None:  # not of the model's own
            raise
        raise ConversionError(
            f"the model does not run on an input of shape {call.shapes()}: {_first_line(cause)}; "
            + _needed(model, call)
        ) from cause
    outputs = named_outputs(value)
    for name, output in outputs.items():
        if output.is_complex():
            raise ConversionError(
                f"cannot export a model whose {name!r} is complex, which ONNX Runtime does not run: wrap the "
                "model in one that returns torch.view_as_real of it"
            )
    return tuple(outputs)


def _needed(model: nn.Module, call: Call) -> str:
    missing = call.missing(model)
    if missing:
        return f"it needs {' and '.join(map(repr, missing))} too: give example_inputs"
    return "give the shape it was made for"


def _export(
    model: nn.Module,
    example: Example,
    names: tuple[str, ...],
    static_batch: int | None,
    opset: int,
    sizes: Mapping[int, str] = {},
) -> Any:
    # A batch of one would be taken for a constant, so that a dynamic batch is traced with two.
    call = _call(model, example, static_batch or 2)
    places = input_places(model, call)
    tensors = [call.tensors_in_order[place] for place in places.values()]
    whole = example.tensors_in_order if isinstance(example, Call) else call.tensors_in_order
    size = example.batch_size if isinstance(example, Call) else call.batch_size
    batched = [whole[place].dim() > 0 and len(whole[place]) == size for place in places.values()]
    batch = {} if static_batch is not None else {0: torch.export.Dim("batch")}
    sides = {axis: torch.export.Dim(name) for axis, name in sizes.items()}
    dynamic = (tuple({**batch, **sides} if has else {} for has in batched),) if batch or sides else None
    with quiet_exporter(), PlainAttention(), operators_read_once():
        program = torch.onnx.export(
            _Flat(model, call, list(places.values()), names),
            (tuple(tensors),),
            dynamo=True,
            opset_version=opset,
            input_names=list(places),
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    shapes = [value.shape for value in program.model.graph.inputs]
    if len(shapes) != len(places):
        raise _OwnError(f"the exporter kept {len(shapes)} of its {len(places)} inputs")
    for shape, has in zip(shapes, batched, strict=True):
        if static_batch is None and has and shape is not None and isinstance(shape[0], int):
            # The exporter gives up the dynamic batch without a word.
            raise _OwnError(f"its own code fixes the batch to that of the example, {call.batch_size}")
        for axis, name in sizes.items():
            if shape is not None and isinstance(shape[axis], int):
                raise _OwnError(f"its own code fixes the {name} to that of the example, {shape[axis]}")
    return program


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's prints, log lines and deprecation warnings about itself from the user."""
    disabled = logging.root.manager.disable
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.filterwarnings(
                "ignore", category=category, module=r"(torch|onnxscript|onnx_ir|copyreg)\b"
            )
        # Several inputs share one batch, whose name is given once.
        warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
        try:
            # Not by the names of the loggers: what fails is logged by a dozen modules of torch.
            logging.disable(logging.CRITICAL)
            yield
        finally:
            logging.disable(disabled)


# ---- names


def _rename(graph: ir.Graph, names: tuple[str, ...]) -> None:
    """Give outputs their names and weights those that they have in the model, each name to one value only."""
    taken = ValueNames(graph)
    weights = list(graph.initializers.values())
    for value in weights:
        assert value.name is not None
        if value.name.startswith("model.") and not value.is_graph_output():
            taken.claim(value, value.name.removeprefix("model."))
    graph.initializers.clear()  # a new name has moved a weight to the end
    for value in weights:
        graph.register_initializer(value)
    for index, name in enumerate(names):
        taken.claim_output(index, name)


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
    """Return ``layer1.0.relu`` of ``"['', 'model', 'model.layer1', 'model.layer1.0.relu', 'relu_1']"``."""
    parts = [part.strip().strip("'\"") for part in scopes.strip("[]").split(",")]
    return parts[-2].removeprefix("model").removeprefix(".") if len(parts) > 1 else ""


# ---- what did not work


def _fixed_batch_problem(model: nn.Module, example: Example) -> Exception | None:
    """Return what goes wrong with a batch of one; None if it can be exported."""
    try:
        _export(model, example, _output_names(model, example, 1), 1, OPSET)
    except MemoryError:
        raise
    except Exception as error:
        return error
    return None


def _is_fine(
    model: nn.Module, example: Example, names: tuple[str, ...], static_batch: int | None, opset: int
) -> bool:
    """Whether a model can be exported for inputs of one size."""
    try:
        _export(model, example, names, static_batch, opset)
    except MemoryError:
        raise
    except Exception:
        return False
    return True


def _of_one_size(model: nn.Module, error: Exception) -> ConversionError:
    return ConversionError(
        f"cannot export {type(model).__name__} for any height and width: {_said(error)}; it can be exported "
        "for one size: leave out dynamic_size (--dynamic-size)"
    )


def _untraceable(
    model: nn.Module, error: Exception, static_batch: int | None, fixed: Exception | None
) -> ConversionError:
    name = type(model).__name__
    if static_batch is None and fixed is None:
        return ConversionError(
            f"cannot export {name} for batches of any size: {_said(error)}; it can be exported for a fixed "
            "one: give static_batch=1 (--static-batch 1)"
        )
    if static_batch is not None and static_batch > 1 and fixed is None:
        return ConversionError(
            f"cannot export {name} for batches of {static_batch}: {_said(error)}; it can be exported for a "
            "batch of one: give static_batch=1 (--static-batch 1)"
        )
    return ConversionError(
        f"cannot export {name}: {_said(error if fixed is None else fixed)}; {_advice(error)}"
    )


def _causes(error: BaseException) -> list[BaseException]:
    """Return an exception and what it was raised from, down to the first that went wrong."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _said(error: Exception) -> str:
    """Return what torch itself said, in one line."""
    first = _causes(error)[-1]
    operator = _OPERATOR.search(str(first))
    if operator is not None:
        return f"PyTorch's exporter has no ONNX form of the operator {operator[1]}"
    if isinstance(first, _OwnError):
        return str(first)
    return f"torch said {_first_line(first)}"


def _first_line(error: BaseException) -> str:
    """Return the kind of an exception and the first line of what it says."""
    name = type(error).__name__
    text = next((f"{name}: {line.strip()}" for line in str(error).splitlines() if line.strip()), name)
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"


def _advice(error: Exception) -> str:
    texts = [f"{type(cause).__name__} {cause}" for cause in _causes(error)]
    if any(_OPERATOR.search(text) for text in texts):
        return "put another operation in its place, or export the part of the model in front of it"
    if any("data-dependent" in text or "DataDependent" in text for text in texts):
        return "groupify needs a model without control flow that depends on the values of its input"
    return "make the model one that torch.export takes, or export a part of it"


def _lowest_opset(graph: ir.Graph, opset: int) -> int | None:
    """Return the lowest opset above ``opset`` that has all operators; None where ``opset`` has."""
    first = [_first_opset(name) for name in _missing(graph, opset)]
    return max(first) if first else None


def _missing(graph: ir.Graph, opset: int) -> list[str]:
    """Return the standard operators that are newer than ``opset``."""
    names = {node.op_type for node in graph.all_nodes() if node.domain in ("", "ai.onnx")}
    return sorted(name for name in names if _first_opset(name) > opset)


@functools.cache
def _first_opset(operator: str) -> int:
    versions = [
        schema.since_version
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.name == operator and schema.domain == ""
    ]
    return min(versions, default=1)


def _too_old(graph: ir.Graph, opset: int, needed: int) -> str:
    operators = ", ".join(_missing(graph, opset))
    if needed > LAST_OPSET:
        return (
            f"the model needs {operators}, which ONNX has from opset {needed} on, and PyTorch's exporter "
            f"writes {LAST_OPSET} at most; put another operation in its place"
        )
    return f"opset {opset} has no {operators}: give opset={needed} (--opset {needed}) or leave it out"
