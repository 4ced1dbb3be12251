"""Run a traced graph node by node over many batches at once.

Layer-wise calibration needs every image at one layer before the next layer runs. Running node by
node does that in a single pass: no prefix of the network is ever run again, and what waits between
nodes is kept in half precision and dropped at its last use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn


class BatchedRun:
    """The values of a graph's nodes, for every batch.

    Args:
        module: traced model.
        batches: inputs, each of shape (N, C, H, W).
        compact: how values are kept while they wait.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        batches: Sequence[Tensor],
        compact: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.module = module
        self.batch_count = len(batches)
        self._batches = batches
        self._compact = compact
        self._values: dict[fx.Node, list[Any]] = {}
        self._waiting = Counter({node: len(node.users) for node in module.graph.nodes})
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
        return _map(_restore, self.stored(node, batch))

    def stored(self, node: fx.Node, batch: int) -> Any:
        """Return the value of a node for one batch as it is kept, perhaps in half precision."""
        return self.compute(node, batch) if node in self._deferred else self._values[node][batch]

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
        return [candidate for candidate in self.module.graph.nodes if candidate in needed]

    def run(self, node: fx.Node, *, defer: bool = False) -> None:
        """Run one node, whose inputs have been run, on every batch.

        Args:
            node: the node.
            defer: compute its value anew whenever it is asked for, instead of keeping it; right where a
                single cheap reader follows.
        """
        if defer:
            self._deferred.add(node)
            self._values[node] = []
            return
        results: list[Any] = []
        reads = Counter(self._kept_sources(node))
        last_use = [source for source, count in reads.items() if self._waiting[source] == count]
        for batch in range(self.batch_count):
            results.append(self._keep(self.compute(node, batch)))
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
            return self._batches[batch]
        if node.op == "get_attr":
            return _attribute(self.module, str(node.target))
        args = fx.node.map_arg(node.args, lambda source: self.value(source, batch))
        kwargs = fx.node.map_arg(node.kwargs, lambda source: self.value(source, batch))
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        return function(*args, **kwargs)

    def _keep(self, value: Any) -> Any:
        return value if self._compact is None else _map(self._compact, value)


def _restore(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return value


def _attribute(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
