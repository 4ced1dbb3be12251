"""Shuffles between grouped convs without moving a channel: one tensor per group of the reader.

Group r of a shuffled reader needs some channels of every group of the producer. Where these are whole blocks
of ONNX Runtime's blocked layout, the producer is cut into convs that compute one reader group's channels
each, with every elementwise operation and addition on the way done part by part, and the reader into dense
convs that read one part each. Nothing is permuted, nothing leaves the blocked layout, and conv, addition and
activation stay fused. The multiply-accumulates are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from groupify.onnx.graph_edits import (
    Order,
    attribute,
    channels,
    constant,
    free_node_name,
    insert_gather,
    inverse,
    known_constant,
    new_constant,
    only_reader,
    product,
    remove_dead,
    replace_value,
    spatial_size,
    static_shape,
)
from groupify.onnx.node_roles import Concatenation, Convolution, Permute, Same, role_of
from groupify.onnx.runtime import PART

# Below this many bytes of the shuffled tensor a gather is cheaper than more, smaller convs.
MIN_BYTES = 600_000


@dataclass(frozen=True)
class _Stream:
    """Tensors that share their channels, from the convs that make them to the nodes that read them."""

    values: frozenset[ir.Value]
    nodes: tuple[ir.Node, ...]  # that produce them, in graph order
    gathers: tuple[ir.Node, ...]
    others: tuple[tuple[ir.Node, int], ...]  # readers that need the whole tensor


def split_streams(graph: ir.Graph, *, block: int, min_bytes: int = MIN_BYTES) -> int:
    """Replace gathers in front of grouped convs by split convs, where blocks allow it; return how many.

    Args:
        graph: a graph after :func:`fold_permutations`; fold once more behind this.
        block: channels per block of the target's kernel.
        min_bytes: leave smaller tensors to their gathers.
    """
    done = 0
    for gather in list(graph):
        if gather.graph is None or not isinstance(role_of(gather), Permute):
            continue
        value = gather.inputs[0]
        if value is None or 4 * (channels(value) or 0) * spatial_size(value) < min_bytes:
            continue
        stream = _stream_of(graph, value)
        if stream is None:
            continue
        parts = _partition(stream)
        if parts is None or not _fits_blocks(stream, parts, block):
            continue
        _split(graph, stream, parts)
        remove_dead(graph)
        done += len(stream.gathers)
    return done


def interleave_parts(graph: ir.Graph) -> None:
    """Shuffle the parts of a split reader while joining them, which saves joining them first.

    A shuffle over the parts takes their channels in turn: seen as planes (N, width, 1, H·W) it is their
    concatenation along the third axis, a copy of whole planes.
    """
    for gather in list(graph):
        concat = gather.inputs[0].producer() if gather.inputs and gather.inputs[0] is not None else None
        role = role_of(gather)
        if not isinstance(role, Permute) or concat is None or not isinstance(role_of(concat), Concatenation):
            continue
        parts = [value for value in concat.inputs if value is not None]
        shape = static_shape(concat.outputs[0]) or ()
        width = len(role.order) // len(parts)
        takes_turns = np.arange(len(role.order)).reshape(len(parts), -1).T.reshape(-1)
        if (
            len(shape) == 4
            and product(shape[1:]) is not None
            and only_reader(concat.outputs[0]) is gather
            and all(channels(value) == width for value in parts)
            and np.array_equal(role.order, takes_turns)
        ):
            _interleave(graph, gather, parts, [0, width, 1, -1], [0, *shape[1:]])
    remove_dead(graph)


def _interleave(
    graph: ir.Graph, gather: ir.Node, parts: Sequence[ir.Value], planes: list[int], shape: list[Any]
) -> None:
    old = gather.outputs[0]
    to_planes = new_constant(graph, "planes", np.array(planes, np.int64))
    to_shape = new_constant(graph, "joined", np.array(shape, np.int64))

    def insert(kind: str, inputs: Sequence[ir.Value], *attributes: ir.Attr) -> ir.Value:
        name = free_node_name(graph, f"{kind}.{gather.name}")
        output = ir.Value(name=f"{old.name}.{name}", type=old.type)
        graph.insert_before(gather, ir.Node("", kind, inputs, attributes, outputs=[output], name=name))
        return output

    views = [insert("Reshape", [part, to_planes]) for part in parts]
    joined = insert("Reshape", [insert("Concat", views, ir.AttrInt64("axis", 2)), to_shape])
    joined.shape = old.shape
    replace_value(graph, old, joined)


def _stream_of(graph: ir.Graph, start: ir.Value) -> _Stream | None:
    values: set[ir.Value] = set()
    gathers: list[ir.Node] = []
    others: list[tuple[ir.Node, int]] = []
    waiting = [start]
    while waiting:
        value = waiting.pop()
        if value in values:
            continue
        values.add(value)
        producer = value.producer()
        if producer is None or value.is_graph_output():
            return None
        role = role_of(producer)
        if isinstance(role, Same) and _is_plain(role, producer):
            waiting += [source for source in producer.inputs if source is not None and channels(source)]
        elif not isinstance(role, Convolution) and not _is_split_reader(producer):
            return None
        for use in value.uses():
            reader = role_of(use.node)
            if isinstance(reader, Same) and _is_plain(reader, use.node):
                waiting.append(use.node.outputs[0])
            elif isinstance(reader, Permute):
                gathers.append(use.node)
            elif isinstance(reader, Convolution) and reader.groups > 1:
                return None
            else:
                others.append((use.node, use.idx))
    nodes = tuple(node for node in graph if node.outputs and node.outputs[0] in values)
    return _Stream(frozenset(values), nodes, tuple(gathers), tuple(others))


def _is_split_reader(node: ir.Node) -> bool:
    """Whether a node joins the dense convs that another split has made of a grouped one."""
    sources = [value.producer() for value in node.inputs if value is not None]
    return isinstance(role_of(node), Concatenation) and all(
        source is not None and role_of(source) == Convolution(1) and only_reader(source.outputs[0]) is node
        for source in sources
    )


def _is_plain(role: Same, node: ir.Node) -> bool:
    """Whether a node can be done part by part without cutting constants or sizes."""
    tensors = [value for value in node.inputs if value is not None and constant(value) is None]
    sized = node.op_type in ("Reshape", "Resize")
    return not sized and not role.constants and role.factor == 1 and len(role.inputs) == len(tensors)


def _partition(stream: _Stream) -> list[Order] | None:
    """Return the channels that each reader group needs, the same for all readers, or None."""
    found: list[Order] | None = None
    for gather in stream.gathers:
        order = known_constant(gather.inputs[1])
        for reader in gather.outputs[0].consumers():
            role = role_of(reader)
            if not isinstance(role, Convolution) or role.groups == 1:
                return None
            parts = [np.sort(part) for part in order.reshape(role.groups, -1)]
            if found is None:
                found = parts
            elif len(found) != len(parts) or not all(map(np.array_equal, found, parts)):
                return None
    return found


def _fits_blocks(stream: _Stream, parts: Sequence[Order], block: int) -> bool:
    if any(len(part) % block for part in parts):
        return False
    for node in stream.nodes:
        role = role_of(node)
        if isinstance(role, Convolution) and role.groups > 1:
            width = (channels(node.outputs[0]) or 0) // role.groups
            for part in parts:
                counts = np.bincount(part // width, minlength=role.groups)
                if len(set(counts.tolist())) > 1 or counts[0] % block:
                    return False
        elif isinstance(role, Concatenation) and any(
            len(rows) % block for part in parts for rows in _rows_by_input(node, part)
        ):
            return False
    return True


def _split(graph: ir.Graph, stream: _Stream, parts: Sequence[Order]) -> None:
    pieces: dict[ir.Value, list[ir.Value]] = {}
    for node in stream.nodes:
        outputs = []
        for index, part in enumerate(parts):
            if isinstance(role_of(node), Convolution):
                groups = attribute(node, "group", 1)
                outputs.append(_conv(graph, node, node.inputs[0], rows=part, groups=groups))
            elif isinstance(role_of(node), Concatenation):
                outputs.append(_split_concat(graph, node, part))
            else:
                known = [value is not None and value in pieces for value in node.inputs]
                inputs = [
                    pieces[value][index] if cut and value is not None else value
                    for value, cut in zip(node.inputs, known, strict=True)
                ]
                outputs.append(_copy(graph, node, inputs))
        pieces[node.outputs[0]] = outputs
    for gather in stream.gathers:
        source = gather.inputs[0]
        assert source is not None
        for reader in list(gather.outputs[0].consumers()):
            _split_reader(graph, reader, gather, pieces[source], parts)
    stored = np.concatenate(parts)
    joined: dict[ir.Value, ir.Value] = {}
    for node, index in stream.others:
        value = node.inputs[index]
        assert value is not None
        if value not in joined:
            producer = pieces[value][-1].producer()
            assert producer is not None
            whole = _concat(graph, pieces[value], value, producer)
            after = whole.producer()
            joined[value] = insert_gather(
                graph, whole, inverse(stored), "Shuffle.joined", _next(graph, after)
            )
        node.replace_input_with(index, joined[value])


def _rows_by_input(concat: ir.Node, part: Order) -> list[Order]:
    """Return which rows of each input of a concatenation belong to a sorted part of its output."""
    ends = np.cumsum([channels(value) or 0 for value in concat.inputs])
    starts = [0, *ends[:-1]]
    return [part[(part >= start) & (part < end)] - start for start, end in zip(starts, ends, strict=True)]


def _split_concat(graph: ir.Graph, concat: ir.Node, part: Order) -> ir.Value:
    outputs = []
    for value, rows in zip(concat.inputs, _rows_by_input(concat, part), strict=True):
        conv = value.producer() if value is not None else None
        if conv is not None and len(rows):
            outputs.append(_conv(graph, conv, conv.inputs[0], rows=rows, groups=1))
    return _concat(graph, outputs, concat.outputs[0], concat)


def _split_reader(
    graph: ir.Graph, reader: ir.Node, gather: ir.Node, pieces: Sequence[ir.Value], parts: Sequence[Order]
) -> None:
    """Turn a grouped conv into one dense conv per part, and its output into their concatenation."""
    order = known_constant(gather.inputs[1])
    weights = known_constant(reader.inputs[1])
    height = weights.shape[0] // len(parts)
    outputs = []
    for index, (piece, part) in enumerate(zip(pieces, parts, strict=True)):
        wanted = order.reshape(len(parts), -1)[index]
        columns = np.argsort(wanted)  # part is wanted, sorted
        assert np.array_equal(wanted[columns], part)
        rows = np.arange(index * height, (index + 1) * height)
        outputs.append(_conv(graph, reader, piece, rows=rows, groups=1, columns=columns))
    last, output = reader, reader.outputs[0]
    while (follower := only_reader(output)) is not None:
        role = role_of(follower)
        if not isinstance(role, Same) or not _is_plain(role, follower) or len(role.inputs) != 1:
            break
        # The activation moves in front of the concatenation, where it fuses with the convs.
        outputs = [_copy(graph, follower, [value, *follower.inputs[1:]]) for value in outputs]
        last, output = follower, follower.outputs[0]
    replace_value(graph, output, _concat(graph, outputs, output, last))


def _conv(
    graph: ir.Graph,
    node: ir.Node,
    source: ir.Value | None,
    *,
    rows: Order,
    groups: int,
    columns: Order | None = None,
) -> ir.Value:
    """Insert a conv that computes some of the rows of ``node``; return its output."""
    weights = known_constant(node.inputs[1])
    cut = weights[rows] if columns is None else weights[rows][:, columns]
    inputs = [source, new_constant(graph, _name(node.inputs[1]), cut)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        inputs.append(new_constant(graph, _name(node.inputs[2]), known_constant(node.inputs[2])[rows]))
    copy = _copy(graph, node, inputs, size=len(rows))
    producer = copy.producer()
    assert producer is not None
    producer.attributes["group"] = ir.AttrInt64("group", groups)
    return copy


def _name(value: ir.Value | None) -> str:
    return (value.name if value is not None else None) or "weight"


def _copy(
    graph: ir.Graph, node: ir.Node, inputs: Sequence[ir.Value | None], *, size: int | None = None
) -> ir.Value:
    """Insert a copy of a node with other inputs in front of it; return its output."""
    old = node.outputs[0]
    first = inputs[0]
    count = size if size is not None else channels(first)
    shape = None if old.shape is None else ir.Shape([old.shape[0], count, *list(old.shape)[2:]])
    name = free_node_name(graph, f"{node.name or node.op_type}{PART}")
    output = ir.Value(name=f"{old.name}.{name}", type=old.type, shape=shape)
    copy = ir.Node(
        "", node.op_type, list(inputs), list(node.attributes.values()), outputs=[output], name=name
    )
    graph.insert_before(node, copy)
    return output


def _concat(graph: ir.Graph, values: Sequence[ir.Value], like: ir.Value, after: ir.Node) -> ir.Value:
    name = free_node_name(graph, "Concat." + (after.name or "").rpartition("/")[0])
    count = sum(channels(value) or 0 for value in values)
    shape = None if like.shape is None else ir.Shape([like.shape[0], count, *list(like.shape)[2:]])
    output = ir.Value(name=f"{like.name}.{name}", type=like.type, shape=shape)
    node = ir.Node("", "Concat", list(values), [ir.AttrInt64("axis", 1)], outputs=[output], name=name)
    graph.insert_after(after, node)
    return output


def _next(graph: ir.Graph, node: ir.Node | None) -> ir.Node | None:
    nodes = list(graph)
    position = nodes.index(node) + 1 if node is not None else len(nodes)
    return nodes[position] if position < len(nodes) else None
