"""Small edits of an ONNX graph in memory, shared by the passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Order = npt.NDArray[np.int64]
Shape = tuple[int | str | None, ...]  # None: unknown


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Return the array of a constant value, or None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def known_constant(value: ir.Value | None) -> npt.NDArray[Any]:
    """Return the array of a value that is known to be constant."""
    array = constant(value)
    assert array is not None, value
    return array


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the node that reads a value once, if nothing else does, the graph's outputs included."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def static_shape(value: ir.Value | None) -> Shape | None:
    """Return a shape with dynamic dimensions by name, or None where even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def product(sizes: Sequence[int | str | None]) -> int | None:
    """Return the product of dimensions, or None where one is dynamic."""
    result = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        result *= size
    return result


def keeps_batch(before: Shape, after: Shape) -> bool:
    """Whether a reshape is known to leave dimension 0 alone."""
    named = before[0] is not None and before[0] == after[0]
    return named or (product(before[1:]) is not None and product(before[1:]) == product(after[1:]))


def channels(value: ir.Value | None) -> int | None:
    """Return the number of channels, dimension 1, or None where there is none or it is dynamic."""
    shape = static_shape(value)
    if shape is None or len(shape) < 2 or not isinstance(shape[1], int):
        return None
    return shape[1]


def spatial_size(value: ir.Value) -> int:
    """Return the elements of a value per channel and image; dynamic dimensions count once."""
    size = 1
    for dim in (static_shape(value) or ())[2:]:
        size *= dim if isinstance(dim, int) else 1
    return size


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return the value of an attribute, or a default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def replace_constant(graph: ir.Graph, node: ir.Node, index: int, array: npt.NDArray[Any]) -> None:
    """Give a node a constant of its own in place of one that other nodes may share."""
    old = node.inputs[index]
    assert old is not None
    assert old.name is not None
    if len(old.uses()) == 1 and old.is_initializer():
        del graph.initializers[old.name]  # so that the new one keeps the name
    node.replace_input_with(index, new_constant(graph, old.name, array))


def new_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Register an initialiser under ``name``, or ``name.1`` and so on where that is taken."""
    free = name
    number = 0
    while free in graph.initializers:
        number += 1
        free = f"{name}.{number}"
    tensor = ir.tensor(np.ascontiguousarray(array), name=free)
    value = ir.Value(
        name=free, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def free_node_name(graph: ir.Graph, name: str) -> str:
    """Return ``name``, or ``name_1`` and so on where that is taken."""
    taken = {node.name for node in graph}
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return name if name not in taken else next(free for free in numbered if free not in taken)


def insert_gather(
    graph: ir.Graph, value: ir.Value, order: Order, name: str, before: ir.Node | None
) -> ir.Value:
    """Insert ``value[:, order]`` in front of a node (at the end for None); return the new value."""
    name = free_node_name(graph, name)
    indices = new_constant(graph, f"{name}.order", order.astype(np.int64))
    output = ir.Value(name=f"{value.name}.{name}", type=value.type, shape=value.shape)
    node = ir.Node("", "Gather", [value, indices], [ir.AttrInt64("axis", 1)], outputs=[output], name=name)
    if before is None:
        graph.append(node)
    else:
        graph.insert_before(before, node)
    return output


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old``, the graph's outputs included, read ``new``."""
    for index, output in enumerate(graph.outputs):
        if output is old:
            # An output is known by its name, which an input or another output cannot take.
            free = new.producer() is not None and not new.is_graph_output()
            replace_output(graph, index, new if free else _identity(graph, new))
    old.replace_all_uses_with(new)


def replace_output(graph: ir.Graph, index: int, new: ir.Value) -> None:
    """Make ``new`` an output of the graph in place of, and under the name of, another value."""
    old = graph.outputs[index]
    old.name, new.name = f"{old.name}.inner", old.name
    graph.outputs[index] = new


class ValueNames:
    """Which value of a graph has which name, while they are given other ones."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._values = {value.name: value for node in graph for value in node.outputs}
        self._values |= {value.name: value for value in (*graph.inputs, *graph.initializers.values())}

    def claim(self, value: ir.Value, name: str) -> None:
        """Name a value; another one of that name gets ``name.inner``, or ``name.inner_1`` and so on."""
        other = self._values.get(name)
        if other is not None and other is not value:
            numbered = (f"{name}.inner_{number}" for number in itertools.count(1))
            free = next(
                free for free in itertools.chain([f"{name}.inner"], numbered) if free not in self._values
            )
            other.name, self._values[free] = free, other
        self._values.pop(value.name, None)
        value.name, self._values[name] = name, value

    def claim_output(self, index: int, name: str) -> None:
        """Name an output of the graph; a value that is something else too is copied first."""
        outputs = self._graph.outputs
        value = outputs[index]
        earlier = any(value is output for output in outputs[:index])
        if value.is_graph_input() or value.is_initializer() or earlier:
            value = outputs[index] = _identity(self._graph, value)
        self.claim(value, name)


def _identity(graph: ir.Graph, value: ir.Value) -> ir.Value:
    output = ir.Value(name=f"{value.name}.copy", type=value.type, shape=value.shape)
    name = free_node_name(graph, "Identity.output")
    graph.append(ir.Node("", "Identity", [value], outputs=[output], name=name))
    return output


def remove_dead(graph: ir.Graph) -> None:
    """Remove nodes and initialisers that nothing reads."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if all(not value.uses() and value not in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]


def inverse(order: Order) -> Order:
    """Return the order that undoes ``order``."""
    result = np.empty_like(order)
    result[order] = np.arange(len(order))
    return result


def is_identity(order: Order) -> bool:
    """Whether an order leaves everything in place."""
    return bool(np.array_equal(order, np.arange(len(order))))


def expand(order: Order, factor: int) -> Order:
    """Return the order of the elements when every channel holds ``factor`` of them."""
    return (order[:, None] * factor + np.arange(factor)).reshape(-1)


def concatenate(orders: Sequence[Order]) -> Order:
    """Return the order of a concatenation from the orders of its parts."""
    offsets = np.cumsum([0, *(len(order) for order in orders)])
    return np.concatenate([order + offset for order, offset in zip(orders, offsets, strict=False)])
