"""The order in which each tensor of an ONNX graph stores its channels, and how to choose it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from groupify.onnx.graph_edits import (
    Order,
    channels,
    concatenate,
    expand,
    inverse,
    is_identity,
    spatial_size,
)
from groupify.onnx.node_roles import (
    Concatenation,
    Convolution,
    Linear,
    Opaque,
    Permute,
    Role,
    Same,
    Shapeless,
    role_of,
)

# A gather between a conv and an addition also keeps ONNX Runtime from fusing the two.
_BREAKS_FUSION = 2


@dataclass(frozen=True)
class Layout:
    """A tensor's channels as runs of atoms, each stored in an order of its own.

    An atom is a set of channels that several tensors share, the two sides of an addition for example; a
    concatenation is a run of several. ``factor``: elements per channel, after flattening.
    """

    atoms: tuple[int, ...]
    factor: int = 1


@dataclass(frozen=True)
class Edge:
    """A place where the channels may be permuted: ``output = input[:, order]``.

    ``node`` is a permutation of the graph, or the reader whose input ``index`` would be permuted (a grouped
    conv or an opaque node), or None for an output of the graph.
    """

    node: ir.Node | None
    index: int
    value: ir.Value
    source: Layout
    target: int  # an atom
    order: Order
    weight: float


class ChannelOrders:
    """A choice of storage order for every tensor of a graph, all of them their own at first.

    Constraints are labels: an order is allowed where every position keeps its label. A grouped conv labels
    its channels by group, and an opaque node by channel, so that nothing may move.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.layouts: dict[ir.Value, Layout] = {}
        self.roles: dict[ir.Node, Role] = {}
        self.edges: list[Edge] = []
        self._parents: list[int] = []
        self._sizes: list[int] = []
        self._labels: dict[int, list[Order]] = {}
        self._orders: dict[int, Order] = {}
        for value in graph.inputs:
            self._define(value, blocks=None)
        for node in graph:
            self._visit(node)
        for index, value in enumerate(graph.outputs):
            self._require(None, index, value, blocks=None)

    def order(self, layout: Layout) -> Order:
        """Return the storage order of a tensor: it stores ``value[:, order]``."""
        return expand(concatenate([self._orders[self._find(atom)] for atom in layout.atoms]), layout.factor)

    def of(self, value: ir.Value | None) -> Order | None:
        """Return the storage order of a value, or None where it has no channels."""
        layout = self.layouts.get(value) if value is not None else None
        return None if layout is None else self.order(layout)

    def of_reader(self, node: ir.Node | None, index: int) -> Order:
        """Return the order in which a grouped conv or an opaque node reads its input ``index``."""
        edge = next(edge for edge in self.edges if edge.node is node and edge.index == index)
        return self.order(Layout((edge.target,)))

    def residual(self, edge: Edge) -> Order:
        """Return the permutation that is left to do at an edge between what is stored on its two sides."""
        return inverse(self.order(edge.source))[edge.order[self.order(Layout((edge.target,)))]]

    def cost(self) -> float:
        """Return the weighted number of elements that the remaining permutations move."""
        paid: dict[tuple[int, bytes], float] = {}
        for edge in self.edges:
            left = self.residual(edge)
            if not is_identity(left):
                key = (id(edge.value), left.tobytes())
                paid[key] = max(edge.weight, paid.get(key, 0.0))
        return sum(paid.values())

    def improve(self) -> None:
        """Choose orders so that less is left to permute; never more than before."""
        best = self.cost()
        better = True
        while better and best > 0:
            better = False
            for edge in self.edges:
                if is_identity(self.residual(edge)):
                    continue
                for move in self._moves(edge):
                    before = {atom: self._orders[atom] for atom in move}
                    self._orders.update(move)
                    cost = self.cost()
                    if cost < best:
                        best, better = cost, True
                        break
                    self._orders.update(before)

    def _moves(self, edge: Edge) -> Iterator[dict[int, Order]]:
        """Yield changes of order that leave nothing to permute at an edge."""
        target = self._find(edge.target)
        source = self.order(edge.source)
        yield from self._allowed({target: inverse(edge.order)[source]})
        wanted = edge.order[self._orders[target]]
        if edge.source.factor != 1:
            return
        change: dict[int, Order] = {}
        start = 0
        for atom in (self._find(atom) for atom in edge.source.atoms):
            size = self._sizes[atom]
            part = wanted[start : start + size] - start
            if part.min() < 0 or part.max() >= size:
                return
            if not np.array_equal(change.setdefault(atom, part), part):
                return
            start += size
        yield from self._allowed(change)

    def _allowed(self, change: dict[int, Order]) -> Iterator[dict[int, Order]]:
        keeps_labels = (
            np.array_equal(labels[order], labels)
            for atom, order in change.items()
            for labels in self._labels[atom]
        )
        if all(keeps_labels):
            yield change

    def _visit(self, node: ir.Node) -> None:
        role = self.roles[node] = role_of(node)
        known = [value is not None and value in self.layouts for value in node.inputs]
        match role:
            case Permute(order) if known[0]:
                self._add_edge(node, 0, node.inputs[0], self._define(node.outputs[0]), order)
            case Same(inputs, _, factor) if all(known[index] for index in inputs):
                self._join(node, inputs, factor)
            case Convolution(groups) if known[0]:
                if groups > 1:
                    self._require(node, 0, node.inputs[0], blocks=groups)
                self._define(node.outputs[0], blocks=groups)
            case Linear() if known[0]:
                self._define(node.outputs[0])
            case Concatenation() if all(known):
                self._concatenate(node)
            case Shapeless():
                pass
            case _:
                self._make_opaque(node)

    def _join(self, node: ir.Node, inputs: tuple[int, ...], factor: int) -> None:
        layouts = [self.layouts[value] for index in inputs if (value := node.inputs[index]) is not None]
        first = layouts[0]
        sizes = {tuple(self._sizes[atom] for atom in layout.atoms) for layout in layouts}
        if any(layout.factor != first.factor for layout in layouts) or len(sizes) > 1:
            self._make_opaque(node)
            return
        for layout in layouts[1:]:
            for one, other in zip(first.atoms, layout.atoms, strict=True):
                root, merged = self._find(one), self._find(other)
                if root != merged:
                    self._parents[merged] = root
                    self._labels[root] += self._labels.pop(merged)
        self.layouts[node.outputs[0]] = Layout(first.atoms, first.factor * factor)

    def _concatenate(self, node: ir.Node) -> None:
        layouts = [self.layouts[value] for value in node.inputs if value is not None]
        if any(layout.factor != 1 for layout in layouts):
            self._make_opaque(node)
        else:
            self.layouts[node.outputs[0]] = Layout(tuple(atom for layout in layouts for atom in layout.atoms))

    def _make_opaque(self, node: ir.Node) -> None:
        self.roles[node] = Opaque()
        for index, value in enumerate(node.inputs):
            self._require(node, index, value, blocks=None)
        for value in node.outputs:
            self._define(value, blocks=None)

    def _define(self, value: ir.Value, *, blocks: int | None = 1) -> int:
        """Give a value an atom of its own, held to ``blocks`` blocks (None: every channel to its place)."""
        count = channels(value)
        if count is None:
            return -1
        atom = self._new_atom(count, blocks)
        self.layouts[value] = Layout((atom,))
        return atom

    def _require(
        self, node: ir.Node | None, index: int, value: ir.Value | None, *, blocks: int | None
    ) -> None:
        """Let a reader see its input in an order held to blocks, whatever the input is stored in."""
        if value is None or value not in self.layouts:
            return
        layout = self.layouts[value]
        count = sum(self._sizes[atom] for atom in layout.atoms) * layout.factor
        self._add_edge(node, index, value, self._new_atom(count, blocks), np.arange(count))

    def _add_edge(
        self, node: ir.Node | None, index: int, value: ir.Value | None, target: int, order: Order
    ) -> None:
        assert value is not None
        weight = float(len(order) * spatial_size(value))
        if node is not None and isinstance(self.roles[node], Permute):
            readers = node.outputs[0].consumers()
            if any(len(inputs) > 1 for reader in readers if (inputs := _joined_inputs(reader))):
                weight *= _BREAKS_FUSION
        self.edges.append(Edge(node, index, value, self.layouts[value], target, order, weight))

    def _new_atom(self, size: int, blocks: int | None) -> int:
        atom = len(self._sizes)
        self._parents.append(atom)
        self._sizes.append(size)
        count = size if blocks is None else blocks
        self._labels[atom] = [] if count == 1 else [np.arange(size) // (size // count)]
        self._orders[atom] = np.arange(size)
        return atom

    def _find(self, atom: int) -> int:
        while self._parents[atom] != atom:
            atom = self._parents[atom]
        return atom


def _joined_inputs(node: ir.Node) -> tuple[int, ...]:
    role = role_of(node)
    return role.inputs if isinstance(role, Same) else ()
