"""Run an ONNX graph with values inside it handed out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch

from groupify.onnx.runtime import open_session

_LARGEST_MESSAGE = 2**31 - 1  # bytes that protobuf can hold


@contextmanager
def exposing(model: onnx.ModelProto, names: Iterable[str]) -> Iterator[Any]:
    """Open a session, graph optimisations off, that also hands out values by name, behind the model's own.

    Args:
        model: left as it is.
        names: values inside it; those that it hands out already are left out.
    """
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    own = {output.name for output in model.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in own)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "exposed.onnx"  # a file, since a large model cannot be handed over in memory
        save(exposed, draft)
        yield open_session(draft, optimise=False, threads=torch.get_num_threads())


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model; one above 2 GB with its weights beside it."""
    onnx.save(model, str(path), save_as_external_data=model.ByteSize() > _LARGEST_MESSAGE)


def activations(graph: onnx.GraphProto) -> list[str]:
    """Names of the values that depend on the inputs, as far as nodes outside of branches compute them."""
    known = {source.name for source in graph.input} - {weights.name for weights in graph.initializer}
    names = sorted(known)
    for node in graph.node:
        if any(source in known for source in node.input):
            outputs = [output for output in node.output if output]
            known.update(outputs)
            names += outputs
    return names


def weights_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The initialisers by name."""
    return {weights.name: weights for weights in graph.initializer}


def has_branches(graph: onnx.GraphProto) -> bool:
    """Whether a node has a graph of its own, which may read any value without saying so."""
    kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    return any(attribute.type in kinds for node in graph.node for attribute in node.attribute)


def readers_of(nodes: Sequence[onnx.NodeProto]) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each value, once for each time that they do."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for source in node.input:
            readers.setdefault(source, []).append(node)
    return readers
