"""Run a graph once and label every element of every tensor with the atom whose value it carries.

An atom is one channel of some producer. Operations that only move data are run on the labels
themselves, so that ``view``, ``cat``, ``chunk`` or a channel shuffle need no rules of their own;
elementwise operations tie the labels of their operands together; convs, linears and norms record
where the labels meet a parameter. An operation that is not known freezes the atoms that it reads,
which is always safe.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from groupify.graph import operations as ops
from groupify.graph.atoms import FIXED, Atoms, along, compress, fixed_labels, varies, vector
from groupify.graph.uses import (
    CONV_INPUT,
    CONV_OUTPUT,
    LINEAR_INPUT,
    LINEAR_OUTPUT,
    PER_CHANNEL,
    ChannelUse,
)

# A larger bare parameter is hardly one element per channel.
_MAX_ATTRIBUTE_ELEMENTS = 1_000_000


class Labeller(fx.Interpreter):
    """Runs the graph once and carries the labels along with the values.

    Attributes:
        atoms: the atoms and what holds between them.
        uses: where they meet parameters, by kind and name.
        opaque: modules and parameters that some operation reads in a way that is not known.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.atoms = Atoms()
        self.uses: dict[tuple[str, str], ChannelUse] = {}
        self.opaque: set[str] = set()
        self._labels: dict[fx.Node, Any] = {}
        self._last_use = {source: node for node in module.graph.nodes for source in node.all_input_nodes}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and label its output."""
        value = super().run_node(n)
        labels = self._label(n, value)
        self._labels[n] = labels
        for tensor in _tensors(labels):
            self.atoms.mark(tensor)
        for source in n.all_input_nodes:
            if self._last_use.get(source) is n:
                self._labels.pop(source, None)
        return value

    def _label(self, node: fx.Node, value: Any) -> Any:
        if node.op == "get_attr":
            return self._label_attribute(node, value)
        if node.op == "call_module":
            return self._label_module(node, value)
        if node.op in ("call_function", "call_method"):
            return self._label_call(node, value)
        return self._unknown(node, value)  # the input and the output of the model

    def _unknown(self, node: fx.Node, value: Any) -> Any:
        """Freeze what the node reads; its outputs stay where they are."""
        for source in node.all_input_nodes:
            for labels in _tensors(self._labels.get(source)):
                self.atoms.freeze(labels)
        if node.op in ("call_module", "get_attr"):
            self.opaque.add(str(node.target))
        if node.op == "output":
            return None
        return _map(lambda item: fixed_labels(item.shape) if isinstance(item, Tensor) else None, value)

    # where channels meet parameters ------------------------------------------------------------

    def _record(self, kind: str, name: str, atoms: Tensor, blocks: int = 1) -> None:
        known = self.uses.get((kind, name))
        if known is None:
            self.uses[kind, name] = ChannelUse(kind, name, atoms, blocks)
        elif len(known.atoms) == len(atoms):
            self.atoms.tie(known.atoms, atoms)  # a shared module: all its callers keep one order
        else:
            self.atoms.freeze(known.atoms)
            self.atoms.freeze(atoms)

    def _outputs(self, kind: str, name: str, count: int, blocks: int = 1) -> Tensor:
        if (kind, name) not in self.uses:
            self._record(kind, name, self.atoms.new(count), blocks)
        return self.uses[kind, name].atoms

    def _label_attribute(self, node: fx.Node, value: Any) -> Any:
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or value.dim() == 0
            or value.numel() > _MAX_ATTRIBUTE_ELEMENTS
        ):
            return self._unknown(node, value)
        return self._outputs(PER_CHANNEL, str(node.target), value.numel()).reshape(value.shape)

    # modules -----------------------------------------------------------------------------------

    def _label_module(self, node: fx.Node, value: Any) -> Any:
        name = str(node.target)
        module = self.module.get_submodule(name)
        labels = self._labels.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if len(node.all_input_nodes) != 1 or not isinstance(labels, Tensor) or not isinstance(value, Tensor):
            return self._unknown(node, value)
        if isinstance(module, ops.ELEMENTWISE_MODULES):
            return labels
        if isinstance(module, ops.MOVING_MODULES):
            return compress(module(labels))
        if isinstance(module, ops.SPATIAL_MODULES):
            return self._keep_channels(node, type(module).__name__, labels, value)
        result = self._label_norm(name, module, labels)
        if result is None and _has_plain_weight(module):
            result = self._label_product(name, module, labels, value)
        return self._unknown(node, value) if result is None else result

    def _label_norm(self, name: str, module: nn.Module, labels: Tensor) -> Tensor | None:
        channels, features = vector(labels, 1), vector(labels, labels.dim() - 1)
        is_prelu = isinstance(module, nn.PReLU)
        if is_prelu and module.num_parameters == 1:
            return labels
        if channels is not None and (isinstance(module, ops.BATCH_NORMS) or is_prelu):
            self._record(PER_CHANNEL, name, channels)
        elif channels is not None and isinstance(module, nn.GroupNorm):
            self._record(PER_CHANNEL, name, channels, module.num_groups)
        elif features is not None and isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            self._record(PER_CHANNEL, name, features)
        else:
            return None
        return labels

    def _label_product(self, name: str, module: nn.Module, labels: Tensor, value: Tensor) -> Tensor | None:
        channels, features = vector(labels, 1), vector(labels, labels.dim() - 1)
        if type(module) is nn.Linear and features is not None:
            self._record(LINEAR_INPUT, name, features)
            return self._outputs(LINEAR_OUTPUT, name, module.out_features).expand(value.shape)
        if ops.conv_kind(module) is not None and channels is not None:
            return self._label_conv(name, module, channels, value)
        return None

    def _label_conv(self, name: str, module: Any, channels: Tensor, value: Tensor) -> Tensor:
        if module.groups > 1 and module.groups == module.in_channels:
            # Depthwise: an output channel goes wherever its input channel goes.
            self._record(CONV_INPUT, name, channels)
            atoms = channels.repeat_interleave(module.out_channels // module.in_channels)
            self._record(CONV_OUTPUT, name, atoms)
        else:
            self._record(CONV_INPUT, name, channels, module.groups)
            atoms = self._outputs(CONV_OUTPUT, name, module.out_channels, module.groups)
        return along(atoms, 1, value.shape)

    def _keep_channels(self, node: fx.Node, operation: str, labels: Tensor, value: Any) -> Any:
        """An operation within each channel: pooling, resizing, padding."""
        channels = vector(labels, 1)
        spatial = re.search(r"([123])d", operation)
        if (
            channels is None
            or not isinstance(value, Tensor)
            or value.shape[1] != len(channels)
            or labels.dim() != (int(spatial[1]) + 2 if spatial else value.dim())
        ):
            return self._unknown(node, value)
        return along(channels, 1, value.shape)

    # functions and methods ---------------------------------------------------------------------

    def _label_call(self, node: fx.Node, value: Any) -> Any:
        target: Any = node.target
        is_method = node.op == "call_method"
        sources = node.all_input_nodes
        known = [self._labels.get(source) for source in sources]
        if not any(True for _ in _tensors(value)):
            if target not in ops.METADATA:
                self._unknown(node, value)  # a number that was read from the values
            return None
        # Whatever was a tensor must have labels; numbers and sizes need none.
        complete = all(
            labels is not None or not any(True for _ in _tensors(self.env.get(source)))
            for source, labels in zip(sources, known, strict=True)
        )
        labelled = [labels for labels in known if isinstance(labels, Tensor)]
        if not complete or not any(True for labels in known for _ in _tensors(labels)):
            return self._unknown(node, value)
        if target in (ops.MOVING_METHODS if is_method else ops.MOVING_FUNCTIONS):
            return self._move(node, value)
        if target is F.pad:
            return self._pad(node, labelled, value)
        if is_method and target in ops.PASSING_METHODS and isinstance(known[0], Tensor):
            return known[0]
        if target in (ops.ELEMENTWISE_METHODS if is_method else ops.ELEMENTWISE_FUNCTIONS):
            return self._combine(node, labelled, value)
        if not is_method and target in ops.SPATIAL_FUNCTIONS and len(labelled) == 1:
            return self._keep_channels(node, str(getattr(target, "__name__", target)), labelled[0], value)
        if target in ops.REDUCTIONS and len(labelled) == 1 and isinstance(value, Tensor):
            return self._reduce(node, labelled[0], value)
        if target is F.layer_norm:
            return self._layer_norm(node, value)
        return self._unknown(node, value)

    def _combine(self, node: fx.Node, operands: list[Tensor], value: Any) -> Any:
        labels = operands[0]
        for other in operands[1:]:
            labels = self.atoms.combine(labels, other)
        return labels if labels.shape == value.shape else self._unknown(node, value)

    def _move(self, node: fx.Node, value: Any) -> Any:
        """Run an operation that only moves data on the labels themselves."""
        target: Any = node.target
        if target is operator.getitem and any(isinstance(i, Tensor) for i in self._indices(node)):
            return self._unknown(node, value)  # moved by a tensor of indices

        def substitute(source: fx.Node) -> Any:
            labels = self._labels.get(source)
            return self.env[source] if labels is None else labels

        args: Any = fx.node.map_arg(node.args, substitute)
        kwargs: Any = fx.node.map_arg(node.kwargs, substitute)
        if target in ops.CONCATENATIONS:
            return _concatenate(*args, **kwargs)
        if target == "view" and not isinstance(args[1], torch.dtype):
            target = "reshape"  # labels may be laid out differently in memory
        moved = getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else None
        return _map(_compressed, target(*args, **kwargs) if moved is None else moved)

    def _indices(self, node: fx.Node) -> Iterable[Any]:
        index = fx.node.map_arg(node.args[1:], lambda source: self.env[source])
        return _flatten(index)

    def _pad(self, node: fx.Node, labelled: list[Tensor], value: Any) -> Any:
        amounts = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
        if not isinstance(amounts, (list, tuple)) or len(labelled) != 1:
            return self._unknown(node, value)
        if len(amounts) <= 2 * (value.dim() - 2):
            return self._keep_channels(node, "pad", labelled[0], value)
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        if mode != "constant" or any(amounts[: 2 * (value.dim() - 2)]):
            return self._unknown(node, value)
        return compress(F.pad(labelled[0], list(amounts), value=FIXED))

    def _reduce(self, node: fx.Node, labels: Tensor, value: Tensor) -> Any:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = (dims,) if isinstance(dims, int) else dims
        if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
            return self._unknown(node, value)
        for dim in dims:
            assert isinstance(dim, int)
            if varies(labels, dim % labels.dim()):
                return self._unknown(node, value)
            labels = labels.narrow(dim, 0, 1)
        return labels.reshape(value.shape)

    def _layer_norm(self, node: fx.Node, value: Any) -> Any:
        labels = self._labels.get(node.all_input_nodes[0])
        shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        features = vector(labels, labels.dim() - 1) if isinstance(labels, Tensor) else None
        if features is None or not isinstance(shape, (list, tuple)) or len(shape) != 1:
            return self._unknown(node, value)
        for parameter in node.all_input_nodes[1:]:
            atoms = self._labels.get(parameter)
            if not isinstance(atoms, Tensor) or atoms.shape != features.shape:
                return self._unknown(node, value)
            self.atoms.tie(features, atoms)
        return labels


def _has_plain_weight(module: nn.Module) -> bool:
    """Whether ``weight`` is a parameter, not computed from others before each forward pass."""
    return isinstance(module._parameters.get("weight"), nn.Parameter) and not module._forward_pre_hooks


def _concatenate(tensors: Any, dim: int = 0) -> Tensor:
    tensors = tuple(tensors)
    dim %= tensors[0].dim()
    if any(x.dim() != tensors[0].dim() for x in tensors):
        return torch.cat(tensors, dim)
    # Along the other dimensions one place stands for all where no operand changes there.
    thinned = [x.narrow(dim, 0, 1) for x in tensors]
    sizes = list(tensors[0].shape)
    sizes[dim] = sum(x.shape[dim] for x in tensors)
    for axis in range(len(sizes)):
        if axis != dim and all(x.stride(axis) == 0 or x.shape[axis] == 1 for x in thinned):
            tensors = tuple(x.narrow(axis, 0, 1) for x in tensors)
    return torch.cat(tensors, dim).expand(sizes)


def _compressed(item: Any) -> Any:
    return compress(item) if isinstance(item, Tensor) else item


def _flatten(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flatten(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _flatten(item)
    else:
        yield value


def _tensors(value: Any) -> Iterable[Tensor]:
    return (item for item in _flatten(value) if isinstance(item, Tensor))


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_map(function, item) for item in value]
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)
