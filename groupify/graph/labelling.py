"""Run a graph once and label every element of every tensor with the atom whose value it carries.

An atom is one channel of some producer. Operators that only move data are run on the labels
themselves, so that ``view``, ``cat``, ``chunk`` or a channel shuffle need no rules of their own;
elementwise operators tie the labels of their operands together; convs, linears and norms record
where the labels meet a parameter. An operator that is not known freezes the atoms that it reads,
which is always safe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from groupify.graph.atoms import FIXED, Atoms, along, compress, fixed_labels, varies, vector
from groupify.graph.call import Call
from groupify.graph.factors import constant_factors, takes_factors
from groupify.graph.model_graph import Fetch, ModelGraph
from groupify.graph.operators import CONCATENATIONS, Effect, argument, effect, operator_name

# A larger tensor is hardly one element per channel.
_MAX_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class ChannelUse:
    """A place where channels meet a tensor of the model.

    Attributes:
        name: qualified name of the tensor.
        dim: the dimension of the tensor that the channels are; the elements of the whole where None, as for
            norms, biases, scales and maps.
        atoms: atom at each position of that dimension, shape (length,).
        factors: constants that what is read there was multiplied by, shape (length,). They stay in their
            places, so a channel that changes its own must be read with a weight that makes up for it.
        blocks: number of equal blocks whose border no channel may cross (the groups of a grouped conv).
    """

    name: str
    dim: int | None
    atoms: Tensor
    factors: Tensor
    blocks: int = 1


class Labeller:
    """Runs the graph once and carries the labels along with the values.

    Attributes:
        atoms: the atoms and what holds between them.
        uses: where they meet tensors, by name and dimension.
        opaque: tensors that some operator reads in a way that is not known.
        pinned_by: names of operators that froze channels because they are not known.
    """

    def __init__(self, graph: ModelGraph) -> None:
        self.atoms = Atoms()
        self.uses: dict[tuple[str, int | None], ChannelUse] = {}
        self.opaque: set[str] = set()
        self.pinned_by: dict[str, None] = {}
        self._graph = graph
        self._labels: dict[fx.Node, Any] = {}
        self._fetch: Fetch
        self._rules: dict[Effect, Callable[[fx.Node, Any], Any]] = {
            Effect.ELEMENTWISE: self._combine,
            Effect.SAME: self._same,
            Effect.WITHIN_CHANNELS: self._within_channels,
            Effect.MOVES: self._move,
            Effect.REDUCES: self._reduce,
            Effect.CONV: self._conv_operator,
            Effect.TRANSPOSED_CONV: self._transposed_conv,
            Effect.LINEAR: self._linear_operator,
            Effect.CHANNEL_NORM: self._channel_norm,
            Effect.GROUP_NORM: self._group_norm,
            Effect.LAYER_NORM: self._layer_norm,
            Effect.PAD: self._pad,
        }

    def run(self, call: Call) -> None:
        """Run on one batch."""
        last_reader = {source: node for node in self._graph.graph.nodes for source in node.all_input_nodes}
        for node, value, fetch in self._graph.walk(call):
            self._fetch = fetch
            labels = self._label(node, value)
            self._labels[node] = labels
            for tensor in _tensors(labels):
                self.atoms.mark(tensor)
            for source in node.all_input_nodes:
                if last_reader[source] is node:
                    self._labels.pop(source, None)

    def _label(self, node: fx.Node, value: Any) -> Any:
        if node.op == "get_attr":
            return None  # see _operand
        if node.op == "call_module":
            return self._layer(node, value)
        if node.op != "call_function":
            return self._unknown(node, value)  # an input, or the output of the model
        if not any(True for _ in _tensors(value)):
            if effect(node) is not Effect.SIZES:
                self._unknown(node, value)  # a number that was read from the values
            return None
        scaled = self._scaled(node, value)
        if scaled is not None:
            return scaled
        if not takes_factors(node, value):
            self._freeze_scaled(node)
        if effect(node) is Effect.SIZES:
            return _map(lambda item: fixed_labels(item.shape), value)  # new values
        rule = self._rules.get(effect(node))
        found = None if rule is None else rule(node, value)
        return self._unknown(node, value) if found is None else found

    def _scaled(self, node: fx.Node, value: Any) -> Tensor | None:
        """Labels of channels that are multiplied by constants; None where a node does anything else."""
        found = constant_factors(node, value, self._graph, self._fetch)
        labels = None if found is None else self._operand(found[0])
        channels = vector(labels, 1) if isinstance(labels, Tensor) else None
        if found is None or channels is None:
            return None
        return along(self.atoms.scaled(channels, found[1]), 1, value.shape)

    def _freeze_scaled(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            for labels in _tensors(self._labels.get(source)):
                self.atoms.freeze_scaled(labels)

    def _unknown(self, node: fx.Node, value: Any) -> Any:
        """Freeze what the node reads; its outputs stay where they are."""
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                self.opaque.add(str(source.target))
            for labels in _tensors(self._labels.get(source)):
                if self.atoms.freeze(labels) and node.op == "call_function":
                    self.pinned_by[operator_name(node) or str(node.target)] = None
        if node.op == "output":
            return None
        return _map(lambda item: fixed_labels(item.shape) if isinstance(item, Tensor) else None, value)

    # where channels meet tensors ----------------------------------------------------------------

    def _record(self, name: str, dim: int | None, atoms: Tensor, blocks: int = 1) -> None:
        known, factors = self.uses.get((name, dim)), self.atoms.factors(atoms)
        if known is None:
            self.uses[name, dim] = ChannelUse(name, dim, atoms, factors, blocks)
        elif known.blocks == blocks and torch.equal(known.factors, factors):
            self.atoms.tie(known.atoms, atoms)  # a shared layer: all its callers keep one order
        else:
            self.atoms.freeze(known.atoms)
            self.atoms.freeze(atoms)

    def _produced(self, name: str, dim: int | None, count: int, blocks: int = 1) -> Tensor:
        if (name, dim) not in self.uses:
            self._record(name, dim, self.atoms.new(count), blocks)
        return self.uses[name, dim].atoms

    def _operand(self, source: Any) -> Any:
        """Labels of what an operator reads; a tensor of the model has one atom for each element."""
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return self._labels.get(source) if isinstance(source, fx.Node) else None
        name, tensor = str(source.target), self._fetch(source)
        if not self._has_an_atom_for_each_element(name, tensor):
            self.opaque.add(name)
            return fixed_labels(tensor.shape)
        return self._produced(name, None, tensor.numel()).reshape(tensor.shape)

    def _has_an_atom_for_each_element(self, name: str, tensor: Tensor) -> bool:
        if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.numel() > _MAX_ELEMENTS:
            return False
        if not self._graph.is_state(name):
            return False  # made anew by each forward pass
        if any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
            return False  # expanded: one place in memory for several elements
        sizes = [size for size in tensor.shape if size > 1]
        # Weights that something computes with: as much as a layer has, and never one for each channel.
        return len(sizes) == 1 or tensor.shape[0] == 1

    def _elements(self, source: Any, atoms: Tensor, blocks: int = 1) -> bool:
        """Tie the elements of a vector that goes along with channels to these; False if it is none."""
        if source is None:
            return True
        if source.op == "get_attr":
            if self._fetch(source).numel() != len(atoms):
                return False
            self._record(str(source.target), None, atoms, blocks)
            return True
        labels = self._labels.get(source)
        if not isinstance(labels, Tensor) or labels.numel() != len(atoms):
            return False
        self.atoms.tie(labels.reshape(-1), atoms)
        return True

    # layers ---------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, value: Any) -> Any:
        layer: Any = self._graph.layer(node)
        labels, name = self._operand(node.args[0]), str(node.target)
        bias = f"{name}.bias" if layer.bias is not None else None
        if isinstance(layer, nn.Linear):
            found = self._linear(labels, f"{name}.weight", value)
        else:
            found = self._conv(labels, f"{name}.weight", layer.weight.shape, layer.groups)
        if found is None:
            self.opaque |= {f"{name}.weight"} | ({bias} if bias else set())
            return self._unknown(node, value)
        if bias:
            self._record(bias, None, found)
        return self._spread(found, value, isinstance(layer, nn.Linear))

    @staticmethod
    def _spread(atoms: Tensor, value: Tensor, last: bool) -> Tensor:
        return atoms.expand(value.shape) if last else along(atoms, 1, value.shape)

    def _linear(self, labels: Any, weight: str, value: Tensor) -> Tensor | None:
        if not isinstance(labels, Tensor):
            return None
        self._record(weight, 1, self._input_atoms(labels, labels.dim() - 1))
        return self._produced(weight, 0, value.shape[-1])

    def _input_atoms(self, labels: Tensor, dim: int) -> Tensor:
        """The atoms along the inputs of a layer; fixed ones where an input is more than one atom."""
        atoms = vector(labels, dim)
        if atoms is not None:
            return atoms
        self.atoms.freeze(labels)
        return torch.full((labels.shape[dim],), FIXED, dtype=torch.long)

    def _conv(self, labels: Any, weight: str, shape: torch.Size, groups: int) -> Tensor | None:
        if not isinstance(labels, Tensor) or labels.dim() != len(shape):
            return None
        channels = self._input_atoms(labels, 1)
        if groups > 1:
            self.atoms.freeze_scaled(channels)
        if groups > 1 and shape[1] == 1:
            # Depthwise: an output channel goes wherever its input channel goes.
            atoms = channels.repeat_interleave(shape[0] // groups)
            self._record(weight, 0, atoms)
            return atoms
        self._record(weight, 1, channels, groups)
        return self._produced(weight, 0, shape[0], groups)

    def _conv_operator(self, node: fx.Node, value: Any) -> Any:
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        shape, groups = self._fetch(weight).shape, argument(node, 6, "groups", 1)
        atoms = self._conv(self._operand(node.args[0]), str(weight.target), shape, groups)
        return self._with_bias(node, atoms, value, last=False)

    def _linear_operator(self, node: fx.Node, value: Any) -> Any:
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        return self._with_bias(
            node, self._linear(self._operand(node.args[0]), str(weight.target), value), value, last=True
        )

    def _transposed_conv(self, node: fx.Node, value: Any) -> Any:
        weight, labels = node.args[1], self._operand(node.args[0])
        channels = vector(labels, 1) if isinstance(labels, Tensor) else None
        dense = argument(node, 6, "groups", 1) == 1
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or channels is None or not dense:
            return None
        if labels.dim() != self._fetch(weight).dim():
            return None
        self._record(str(weight.target), 0, channels)  # its weight is (inputs, outputs, *kernel)
        atoms = self._produced(str(weight.target), 1, value.shape[1])
        return self._with_bias(node, atoms, value, last=False)

    def _with_bias(self, node: fx.Node, atoms: Tensor | None, value: Tensor, *, last: bool) -> Any:
        if atoms is None or not self._elements(argument(node, 2, "bias"), atoms):
            return None
        return self._spread(atoms, value, last)

    # norms ----------------------------------------------------------------------------------------

    def _channel_norm(self, node: fx.Node, value: Any) -> Any:
        labels = self._operand(node.args[0])
        channels = vector(labels, 1) if isinstance(labels, Tensor) else None
        vectors = [arg for arg in node.args[1:5] if isinstance(arg, fx.Node)]
        if operator_name(node) == "prelu" and self._fetch(vectors[0]).numel() == 1:
            return labels
        if channels is None or not all(self._elements(source, channels) for source in vectors):
            return None
        return labels

    def _group_norm(self, node: fx.Node, value: Any) -> Any:
        labels, groups = self._operand(node.args[0]), node.args[1]
        channels = vector(labels, 1) if isinstance(labels, Tensor) else None
        vectors = [argument(node, 2, "weight"), argument(node, 3, "bias")]
        if channels is None or not isinstance(groups, int):
            return None
        if not all(self._elements(source, channels, groups) for source in vectors):
            return None
        if groups > 1 and vectors == [None, None]:
            self.atoms.freeze(channels)  # there is no tensor that would show the borders
        return labels

    def _layer_norm(self, node: fx.Node, value: Any) -> Any:
        labels, shape = self._operand(node.args[0]), node.args[1]
        features = vector(labels, labels.dim() - 1) if isinstance(labels, Tensor) else None
        vectors = [arg for arg in node.args[2:4] if isinstance(arg, fx.Node)]
        if features is None or not isinstance(shape, (list, tuple)) or len(shape) != 1:
            return None
        return labels if all(self._elements(source, features) for source in vectors) else None

    # everything else ------------------------------------------------------------------------------

    def _operands(self, node: fx.Node) -> list[Tensor] | None:
        """Labels of the tensors that a node reads; None if those of one are not known."""
        found = []
        for source in _sources(node):
            labels = self._operand(source)
            if isinstance(labels, Tensor):
                found.append(labels)
            elif labels is not None or any(True for _ in _tensors(self._fetch(source))):
                return None
        return found or None

    def _combine(self, node: fx.Node, value: Any) -> Any:
        operands = self._operands(node)
        if operands is None or not isinstance(value, Tensor):
            return None
        labels = operands[0]
        for other in operands[1:]:
            labels = self.atoms.combine(labels, other)
        return labels if labels.shape == value.shape else None

    def _same(self, node: fx.Node, value: Any) -> Any:
        labels = self._operand(node.args[0])
        if not isinstance(labels, Tensor) or not isinstance(value, Tensor):
            return None
        return labels if labels.shape == value.shape else None

    def _within_channels(self, node: fx.Node, value: Any) -> Any:
        """An operator within each channel: pooling, resizing, padding."""
        labels = self._operand(node.args[0])
        spatial = re.search(r"([123])d", operator_name(node))
        if isinstance(value, (list, tuple)):  # with the places of the maxima
            found = [self._keep_channels(labels, item, spatial) for item in value]
            return None if any(item is None for item in found) else found
        return self._keep_channels(labels, value, spatial)

    @staticmethod
    def _keep_channels(labels: Any, value: Tensor, spatial: re.Match[str] | None) -> Tensor | None:
        channels = vector(labels, 1) if isinstance(labels, Tensor) else None
        if channels is None or value.dim() < 2 or value.shape[1] != len(channels):
            return None
        if labels.dim() != (int(spatial[1]) + 2 if spatial else value.dim()):
            return None
        return along(channels, 1, value.shape)

    def _move(self, node: fx.Node, value: Any) -> Any:
        """Run an operator that only moves data on the labels themselves."""
        if any(isinstance(arg, torch.dtype) for arg in node.args):
            return None  # view(dtype) reads bytes

        def substitute(source: fx.Node) -> Any:
            labels = self._operand(source)
            return self._fetch(source) if labels is None else labels

        args: Any = fx.node.map_arg(node.args, substitute)
        kwargs: Any = fx.node.map_arg(node.kwargs, substitute)
        target: Any = node.target
        name = operator_name(node)
        if name in CONCATENATIONS:
            return _concatenate(*args, **kwargs)
        if name in ("view", "_unsafe_view", "view_copy"):
            target = torch.reshape  # labels may be laid out differently in memory
        if name == "view_as":
            return _map(_compressed, torch.reshape(args[0], args[1].shape))
        return _map(_compressed, target(*args, **kwargs))

    def _pad(self, node: fx.Node, value: Any) -> Any:
        labels, amounts = self._operand(node.args[0]), node.args[1]
        if not isinstance(labels, Tensor) or not isinstance(amounts, (list, tuple)):
            return None
        if len(amounts) <= 2 * (value.dim() - 2):
            return self._keep_channels(labels, value, None)
        constant = (
            operator_name(node) == "constant_pad_nd" or argument(node, 2, "mode", "constant") == "constant"
        )
        if not constant or any(amounts[: 2 * (value.dim() - 2)]):
            return None
        return compress(F.pad(labels, list(amounts), value=FIXED))  # type: ignore[arg-type]

    def _reduce(self, node: fx.Node, value: Any) -> Any:
        labels, dims = self._operand(node.args[0]), argument(node, _position(node, "dim"), "dim")
        dims = (dims,) if isinstance(dims, int) else dims
        if not isinstance(labels, Tensor) or not isinstance(value, Tensor):
            return None
        if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
            return None
        for dim in dims:
            assert isinstance(dim, int)
            if varies(labels, dim % labels.dim()):
                return None
            labels = labels.narrow(dim, 0, 1)
        return labels.reshape(value.shape)


def _position(node: fx.Node, name: str) -> int:
    """Where an operator takes an argument: a norm has its order first, a variance may have a flag there."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return names.index(name) if name in names else len(names)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, as often as it does so."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda source: found.append(source))
    return found


def _concatenate(tensors: Any, dim: int = 0) -> Tensor:
    tensors = tuple(tensors)
    dim %= tensors[0].dim()
    if any(x.dim() != tensors[0].dim() for x in tensors):
        return torch.cat(tensors, dim)
    # Along the other dimensions one place stands for all where no operand changes there.
    thinned = [x.narrow(dim, 0, 1) for x in tensors if x.shape[dim]]
    sizes = list(tensors[0].shape)
    sizes[dim] = sum(x.shape[dim] for x in tensors)
    for axis in range(len(sizes)):
        if axis != dim and all(x.stride(axis) == 0 or x.shape[axis] == 1 for x in thinned):
            tensors = tuple(x.narrow(axis, 0, 1) for x in tensors)
    return torch.cat(tensors, dim).expand(sizes)


def _compressed(item: Any) -> Any:
    return compress(item) if isinstance(item, Tensor) else item


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_map(function, item) for item in value]
    return function(value)
