"""The graph of a model: ATen operators without side effects, over the layers and tensors of a module.

Nodes are of five sorts: inputs (``placeholder``), tensors by name (``get_attr``), plain convs and linear
layers by name (``call_module``), operators (``call_function``) and the ``output``, which holds what the model
hands out and, in front of it, what it writes into its inputs and buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from groupify.errors import ConversionError
from groupify.graph.call import Call
from groupify.graph.forward import equal_outputs
from groupify.graph.operators import BATCH_NORM, argument, operator_name, packet_name

Fetch = Callable[[fx.Node], Any]


@dataclass(frozen=True)
class Norm:
    """The tensors of a batch norm in inference, each of shape (C,); writing into them changes the model."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift that it applies, shape (C,) each."""
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        return scale, shift if self.bias is None else self.bias + shift


@dataclass(frozen=True)
class ModelGraph:
    """A graph, and the module whose layers and tensors it reads.

    Attributes:
        model: the module; another one with the same names can take its place, see ``on``.
        graph: the nodes; never changed.
        constants: tensors that no module holds under a name, such as those made in ``forward``.
        pinned: convs and linear layers that are no nodes of their own → why.
        batch: the only batch size that it holds for; None = any.
        hidden_outputs: how many of the outputs are written into inputs and buffers instead of handed out.
        reduced_precision: whether the model computes parts of it in less than float32 (autocast), which the
            graph does in float32.
    """

    model: nn.Module
    graph: fx.Graph
    constants: Mapping[str, Tensor]
    pinned: Mapping[str, str]
    batch: int | None
    hidden_outputs: int
    reduced_precision: bool = False

    def on(self, model: nn.Module) -> ModelGraph:
        """Return the graph over the layers and tensors of another module that has the same names."""
        return replace(self, model=model)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inputs, in the order of ``Call.leaves``."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def accepts(self, call: Call) -> bool:
        """Whether the inputs have the sizes that the graph holds for."""
        leaves, nodes = call.leaves, self.placeholders
        if len(leaves) != len(nodes):
            return False
        for leaf, node in zip(leaves, nodes, strict=True):
            example = node.meta.get("val")
            if not isinstance(example, Tensor):
                if "val" in node.meta and type(leaf) in _CONSTANTS and leaf != example:
                    return False
                continue  # the graph holds it as a constant
            if not isinstance(leaf, Tensor) or not _fits(leaf, example):
                return False
        return True

    def layer(self, node: fx.Node) -> nn.Module:
        """Return the layer that a node calls."""
        return self.model.get_submodule(str(node.target))

    def tensor(self, name: str) -> Tensor:
        """Return a parameter, buffer or constant by its name."""
        found = self.constants.get(name)
        if found is not None:
            return found
        return named_tensor(self.model, name)

    def is_state(self, name: str) -> bool:
        """Whether a module holds a tensor under its name, so that it may change and be saved."""
        return name not in self.constants

    def norm(self, node: fx.Node) -> Norm | None:
        """Return the batch norm that a node is; None where it is none or shares its tensors with others."""
        if operator_name(node) != BATCH_NORM or argument(node, 5, "training"):
            return None
        sources = [argument(node, i, name) for i, name in ((3, "running_mean"), (4, "running_var"))]
        sources += [argument(node, i, name) for i, name in ((1, "weight"), (2, "bias"))]
        for source in sources:
            if source is not None and not self._is_own(source):
                return None
        if sources[0] is None or sources[1] is None:
            return None
        mean, variance, weight, bias = (None if s is None else self.tensor(str(s.target)) for s in sources)
        assert mean is not None
        assert variance is not None
        return Norm(mean, variance, weight, bias, float(argument(node, 7, "eps", 1e-5)))

    def _is_own(self, source: fx.Node) -> bool:
        return source.op == "get_attr" and len(source.users) == 1 and self.is_state(str(source.target))

    @property
    def calls(self) -> Counter[str]:
        """How often each layer is called."""
        return Counter(str(node.target) for node in self.graph.nodes if node.op == "call_module")

    def compute(self, node: fx.Node, fetch: Fetch) -> Any:
        """Return the value of a node, but for an input.

        Args:
            node: the node.
            fetch: gives the values of the nodes that it reads.
        """
        if node.op == "get_attr":
            return self.tensor(str(node.target))
        args = fx.node.map_arg(node.args, fetch)
        if node.op == "output":
            return args[0]
        kwargs = fx.node.map_arg(node.kwargs, fetch)
        if node.op == "call_module":
            # Its hooks are nodes of the graph.
            return self.layer(node).forward(*args, **kwargs)
        return _call(node.target, args, kwargs)

    def walk(self, call: Call) -> Iterator[tuple[fx.Node, Any, Fetch]]:
        """Run on one batch; give each node with its value and a way to get at those that it reads.

        Values are dropped behind their last reader.
        """
        inputs = iter(call.leaves)
        values: dict[fx.Node, Any] = {}
        last_reader = {source: node for node in self.graph.nodes for source in node.all_input_nodes}
        for node in self.graph.nodes:
            value = next(inputs) if node.op == "placeholder" else self.compute(node, values.__getitem__)
            if node in last_reader:
                values[node] = value
            yield node, value, values.__getitem__
            for source in node.all_input_nodes:
                if last_reader[source] is node:
                    values.pop(source, None)

    def run(self, call: Call) -> list[Tensor]:
        """Return the tensors that the model hands out for one batch, in order.

        Raises:
            ConversionError: the graph does not hold for inputs of these sizes.
        """
        if not self.accepts(call):
            raise ConversionError(
                f"the graph of the model does not hold for inputs of shape {call.shapes()}; give inputs of "
                "the size that the model was planned for"
            )
        outputs: Any = ()
        with torch.no_grad():
            for _, value, _ in self.walk(call):
                outputs = value
        return list(outputs[self.hidden_outputs :])


_CONSTANTS = (bool, int, float, str, type(None))

# Autocast computes in bfloat16, of 8 bits, what the graph computes in float32.
_REDUCED_TOLERANCE = 0.05


def computes_the_same(model: nn.Module, graph: ModelGraph, call: Call) -> bool:
    """Whether the graph of a model gives the model's own outputs, up to rounding.

    They are run on mirrored inputs: what a model has kept from a run on these very inputs would be right for
    them alone, and torch.export takes it for a constant.
    """
    example = (call if graph.batch is not None else call.head(2)).map(_mirrored)
    with torch.no_grad():
        expected, found = example.run(model), graph.run(example)
    tolerance = {"tolerance": _REDUCED_TOLERANCE} if graph.reduced_precision else {}
    return equal_outputs(expected, found, **tolerance)


def _mirrored(tensor: Tensor) -> Tensor:
    return tensor.flip(-1) if tensor.dim() > 1 else tensor


def named_tensor(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its qualified name."""
    owner, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), attribute)
    return tensor


def _fits(leaf: Tensor, example: Tensor) -> bool:
    return leaf.dim() == example.dim() and all(
        fixed_size(wanted) in (size, None) for size, wanted in zip(leaf.shape, example.shape, strict=True)
    )


def fixed_size(size: int | torch.SymInt) -> int | None:
    """Return a size of an exported tensor; None where it is open.

    A size that was to be open is not where the model's code asks for its value, as ``len(x)`` does.
    """
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size


# Where the layout in memory shows: a view that does not exist for channels-last values.
_VIEWS = {"view", "_unsafe_view", "view_copy"}
_LAYOUT = {"as_strided", "as_strided_copy", "view_as_complex"}


def _call(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = packet_name(target)
    if name in _VIEWS and not isinstance(args[1], torch.dtype):
        return torch.reshape(args[0], args[1])
    if name == "view_as":
        return torch.reshape(args[0], args[1].shape)
    if name in _LAYOUT:
        args = pytree.tree_map_only(Tensor, Tensor.contiguous, args)
    return target(*args, **kwargs)
