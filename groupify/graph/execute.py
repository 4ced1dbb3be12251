"""Run a graph node by node over many batches at once.

Layer-wise calibration needs every image at one layer before the next layer runs. Running node by
node does that in a single pass: no prefix of the network is ever run again, and what waits between
nodes is kept in half precision, where nobody would notice, and dropped at its last use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from groupify.graph.call import Call
from groupify.graph.model_graph import ModelGraph
from groupify.graph.operators import Effect, effect
from groupify.kept import Kept, Shelf


@dataclass(frozen=True)
class _Waiting:
    """A tensor that waits, perhaps a float32 one in half precision."""

    kept: Kept
    halved: bool

    def stored(self) -> Tensor:
        """Return it as it waits."""
        return self.kept.tensor()

    def exact(self) -> Tensor:
        """Return it in the type that it had."""
        return self.stored().float() if self.halved else self.stored()


class BatchedRun:
    """The values of a graph's nodes, for every batch.

    Args:
        graph: the graph.
        batches: its inputs.
        compact: gives a float32 tensor in half precision, or as it is where that cannot hold it; None = keep
            everything as it is, in memory.
        shelf: where values wait that are given in half precision; None = in memory.
    """

    def __init__(
        self,
        graph: ModelGraph,
        batches: Sequence[Call],
        compact: Callable[[Tensor], Tensor] | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self._shelf = Shelf() if shelf is None else shelf
        self.graph = graph
        self.batch_count = len(batches)
        self._batches = batches
        self._number = {node: number for number, node in enumerate(graph.placeholders)}
        self._compact = compact
        self._exact = needs_exact_values(graph.graph) if compact is not None else set()
        self._values: dict[fx.Node, list[Any]] = {}
        self._waiting = Counter({node: len(node.users) for node in graph.graph.nodes})
        self._deferred: set[fx.Node] = set()
        self._pinned: set[fx.Node] = set()

    def done(self, node: fx.Node) -> bool:
        """Whether the node has been run."""
        return node in self._values

    def pin(self, node: fx.Node) -> None:
        """Keep the value of a node until it is released."""
        self._pinned.add(node)

    def release(self, node: fx.Node) -> None:
        """Drop the value of a pinned node when nothing else waits for it."""
        self._pinned.discard(node)
        if self._waiting[node] == 0 and node in self._values:
            self._values[node] = [None] * self.batch_count

    def value(self, node: fx.Node, batch: int) -> Any:
        """Return the value of a node for one batch, in full precision."""
        return pytree.tree_map_only(_Waiting, _Waiting.exact, self._kept(node, batch))

    def stored(self, node: fx.Node, batch: int) -> Any:
        """Return the value of a node for one batch as it is kept, perhaps in half precision."""
        return pytree.tree_map_only(_Waiting, _Waiting.stored, self._kept(node, batch))

    def _kept(self, node: fx.Node, batch: int) -> Any:
        if node in self._deferred:
            return self.compute(node, batch)
        return self._values[node][batch]

    def preset(self, node: fx.Node, values: Sequence[Any]) -> None:
        """Give the values of a node, one for each batch, instead of running it."""
        self._values[node] = list(values)

    def requirements(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes not run yet that ``node`` needs, itself included, in graph order."""
        needed: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in needed and not self.done(current):
                needed.add(current)
                stack.extend(current.all_input_nodes)
        return [candidate for candidate in self.graph.graph.nodes if candidate in needed]

    def run(self, node: fx.Node, *, defer: bool = False) -> None:
        """Run one node, whose inputs have been run, on every batch.

        Args:
            node: the node.
            defer: compute its value anew whenever it is asked for, instead of keeping it; right where a
                single cheap reader follows.
        """
        if defer or node.op == "get_attr":
            self._deferred.add(node)
            self._values[node] = []
            return
        results: list[Any] = []
        reads = Counter(self._kept_sources(node))
        last_use = [source for source, count in reads.items() if self._waiting[source] == count]
        for batch in range(self.batch_count):
            results.append(self._keep(node, self.compute(node, batch)))
            for source in last_use:
                if source not in self._pinned:
                    self._values[source][batch] = None
        self._waiting.subtract(reads)
        self._values[node] = results

    def _kept_sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes whose kept values are read to compute ``node``, once for each reader in between."""
        for source in node.all_input_nodes:
            if source in self._deferred:
                yield from self._kept_sources(source)
            else:
                yield source

    def compute(self, node: fx.Node, batch: int) -> Any:
        """Return the output of a node for one batch without keeping it."""
        if node.op == "placeholder":
            return self._batches[batch].leaves[self._number[node]]
        return self.graph.compute(node, lambda source: self.value(source, batch))

    def _keep(self, node: fx.Node, value: Any) -> Any:
        if self._compact is None:
            return value
        return pytree.tree_map_only(Tensor, self._leave if node in self._exact else self._halve, value)

    def _leave(self, value: Tensor) -> _Waiting:
        return _Waiting(self._shelf.keep(value), halved=False)

    def _halve(self, value: Tensor) -> _Waiting:
        assert self._compact is not None
        kept = self._compact(value)
        return _Waiting(self._shelf.keep(kept), halved=kept.dtype != value.dtype)


_PASSES_ON = {
    Effect.ELEMENTWISE,
    Effect.SAME,
    Effect.MOVES,
    Effect.REDUCES,
    Effect.PAD,
    Effect.WITHIN_CHANNELS,
}


def needs_exact_values(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values reach an operator that is not known to bear rounding, such as an index.

    A layer or norm bears it; what lies between one and, say, ``grid_sample`` may be coordinates.
    """
    exact: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for reader in node.users:
            sensitive = reader.op == "call_function" and effect(reader) is Effect.UNKNOWN
            if sensitive or (reader in exact and effect(reader) in _PASSES_ON):
                exact.add(node)
    return exact
