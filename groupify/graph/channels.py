"""Find the permutation classes of a model: which channels may change places, and where that shows.

Every element of every tensor in the graph is labelled by the *atom* (the channel of some producer)
whose value it carries. Operations that only move data are run on the labels themselves, so that
``view``, ``cat``, ``chunk`` or a channel shuffle need no rules of their own; elementwise
operations tie the labels of their operands together; convs, linears and norms record where the
labels meet a parameter. Atoms that meet the same parameters the same way are interchangeable.
An operation that is not known freezes the atoms that it reads, which is always safe.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import stochastic_depth

CONV_INPUT, CONV_OUTPUT, LINEAR_INPUT, LINEAR_OUTPUT, PER_CHANNEL = (
    "conv input",
    "conv output",
    "linear input",
    "linear output",
    "per channel",
)


@dataclass(frozen=True)
class ChannelUse:
    """A place where channels meet parameters.

    Attributes:
        kind: ``"conv input"``, ``"conv output"``, ``"linear input"``, ``"linear output"``, or
            ``"per channel"`` for norms, scales and other parameters with one element per channel.
        name: qualified name of the module, or of the parameter where there is no module.
        atoms: atom at each position of that dimension, shape (length,).
        blocks: number of equal blocks whose border no channel may cross (the groups of a grouped conv).
    """

    kind: str
    name: str
    atoms: Tensor
    blocks: int = 1


@dataclass(frozen=True)
class ChannelClass:
    """Channels that may be put in any order together.

    Attributes:
        atoms: the interchangeable atoms, in their present order, shape (size,).
        places: for each use (index into the list of uses), the positions of each atom in it,
            shape (size, repeats).
    """

    atoms: Tensor
    places: dict[int, Tensor]

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.atoms)


@dataclass(frozen=True)
class Channels:
    """All uses, and the classes of two or more channels."""

    uses: tuple[ChannelUse, ...]
    classes: tuple[ChannelClass, ...]


def channel_classes(traced: fx.GraphModule, example: Tensor) -> Channels:
    """Find the permutation classes of a traced model.

    Args:
        traced: the model's graph, in inference mode.
        example: an input, shape (N, C, H, W); one forward pass is run on it.
    """
    labeller = _Labeller(traced)
    with torch.no_grad():
        labeller.run(example)
    return labeller.result()


ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid,
    nn.Threshold, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity,
)  # fmt: skip
SPATIAL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.LPPool2d, nn.Upsample, nn.UpsamplingBilinear2d,
    nn.UpsamplingNearest2d, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
_MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

ELEMENTWISE_FUNCTIONS = {
    F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish,
    F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, torch.sigmoid, F.tanh, torch.tanh, F.softplus,
    F.dropout, F.dropout2d, torch.clamp, torch.abs, torch.square, torch.sqrt, torch.exp, torch.neg,
    operator.neg, operator.pow, torch.pow, operator.add, operator.iadd, torch.add, operator.sub,
    operator.isub, torch.sub, operator.mul, operator.imul, torch.mul, operator.truediv,
    operator.itruediv, torch.div, torch.maximum, torch.minimum, stochastic_depth,
}  # fmt: skip
_ELEMENTWISE_METHODS = {
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "clamp", "clamp_", "abs", "neg", "pow", "sqrt",
    "exp", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "contiguous", "clone", "detach",
    "float", "to", "type_as", "half", "bfloat16", "double",
}  # fmt: skip
_MOVING_FUNCTIONS = {
    torch.flatten, torch.reshape, torch.cat, torch.concat, torch.stack, torch.chunk, torch.split,
    torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.unbind, torch.narrow,
    torch.channel_shuffle, F.channel_shuffle, F.pixel_shuffle, operator.getitem,
}  # fmt: skip
_MOVING_METHODS = {
    "view", "reshape", "flatten", "transpose", "permute", "chunk", "split", "squeeze", "unsqueeze",
    "expand", "unbind", "narrow", "repeat", "contiguous", "unflatten", "t", "index_select",
}  # fmt: skip
SPATIAL_FUNCTIONS = {
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, F.pad,
    torch.max_pool2d, F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d,
}  # fmt: skip
_REDUCTIONS = {torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin"}


class _Labeller(fx.Interpreter):
    """Runs the graph once and carries the labels along with the values."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.labels: dict[fx.Node, Any] = {}
        self._parents: list[int] = []
        self._frozen: set[int] = set()
        self._tags: dict[int, set[tuple[str, int]]] = defaultdict(set)
        self._uses: dict[tuple[str, str], ChannelUse] = {}
        self._tag_count = 0
        self._last_use = {
            user_input: node for node in module.graph.nodes for user_input in node.all_input_nodes
        }

    # atoms -------------------------------------------------------------------------------------

    def _new_atoms(self, count: int) -> Tensor:
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def _root(self, atom: int) -> int:
        root = atom
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[atom] != root:
            self._parents[atom], atom = root, self._parents[atom]
        return root

    def _roots(self, labels: Tensor) -> Tensor:
        distinct, inverse = torch.unique(labels, return_inverse=True)
        return torch.tensor([self._root(atom) for atom in distinct.tolist()], dtype=torch.long)[inverse]

    def _freeze(self, labels: Any) -> None:
        for tensor in _tensors(labels):
            self._frozen.update(torch.unique(tensor).tolist())

    def _tie(self, first: Tensor, second: Tensor) -> None:
        """Make equal-position atoms move together."""
        first, second = self._roots(first.reshape(-1)), self._roots(second.reshape(-1))
        for a, b in torch.unique(torch.stack([first, second], 1), dim=0).tolist():
            root_a, root_b = self._root(a), self._root(b)
            if root_a != root_b:
                self._parents[root_b] = root_a

    def _combine(self, operands: Sequence[Tensor]) -> Tensor:
        """Labels of an elementwise operation of several labelled tensors."""
        result = operands[0]
        for other in operands[1:]:
            shape = torch.broadcast_tensors(result, other)[0].shape
            left, right = _thin(result.expand(shape), other.expand(shape))
            pairs = torch.unique(torch.stack([self._roots(left), self._roots(right)], 1), dim=0)
            self._tie_pairs(pairs)
            # Labels are read again through the atoms that were tied, so either operand's will do.
            result = result if result.numel() >= other.numel() else other
            result = result.expand(shape)
        return result

    def _tie_pairs(self, pairs: Tensor) -> None:
        lefts, rights = pairs[:, 0], pairs[:, 1]
        left_degree = torch.bincount(lefts)[lefts]
        right_degree = torch.bincount(rights)[rights]
        one_to_one = (left_degree == 1) & (right_degree == 1)
        self._tie(lefts[one_to_one], rights[one_to_one])
        for left, right in pairs[~one_to_one].tolist():
            # A value broadcast over many channels: they may still change places among themselves,
            # but not with channels that meet another value.
            self._tags[left].add(("meets", right))
            self._tags[right].add(("meets", left))
            self._frozen.update(self._broadcast_side(left, right, pairs))

    def _broadcast_side(self, left: int, right: int, pairs: Tensor) -> list[int]:
        many_rights = int((pairs[:, 0] == left).sum()) > 1
        many_lefts = int((pairs[:, 1] == right).sum()) > 1
        return [atom for atom, many in ((left, many_rights), (right, many_lefts)) if many]

    # uses --------------------------------------------------------------------------------------

    def _record(self, kind: str, name: str, atoms: Tensor, blocks: int = 1) -> Tensor:
        known = self._uses.get((kind, name))
        if known is None:
            self._uses[kind, name] = ChannelUse(kind, name, atoms, blocks)
        elif len(known.atoms) == len(atoms):
            self._tie(known.atoms, atoms)  # a shared module: all its callers keep one order
        else:
            self._freeze([known.atoms, atoms])
        return atoms

    def _outputs(self, kind: str, name: str, count: int, blocks: int = 1) -> Tensor:
        known = self._uses.get((kind, name))
        return known.atoms if known is not None else self._record(kind, name, self._new_atoms(count), blocks)

    # the graph ---------------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and label its output."""
        value = super().run_node(n)
        self.labels[n] = self._label(n, value)
        for source in n.all_input_nodes:
            if self._last_use.get(source) is n:
                self.labels.pop(source, None)
        return value

    def _label(self, node: fx.Node, value: Any) -> Any:
        if node.op == "placeholder":
            labels = self._unknown(node, value)
        elif node.op == "get_attr":
            labels = self._label_attribute(node, value)
        elif node.op == "output":
            self._freeze([self.labels.get(source) for source in node.all_input_nodes])
            labels = None
        elif node.op == "call_module":
            labels = self._label_module(node, value)
        else:
            labels = self._label_call(node, value)
        return labels

    def _unknown(self, node: fx.Node, value: Any) -> Any:
        """Freeze what the node reads; its outputs stay where they are."""
        self._freeze([self.labels.get(source) for source in node.all_input_nodes])

        def fresh(tensor: Any) -> Any:
            if isinstance(tensor, Tensor):
                atom = self._new_atoms(1)
                self._freeze(atom)
                return atom.expand(tensor.shape) if tensor.dim() else atom[0]
            return None

        return _map(fresh, value)

    def _label_attribute(self, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() > 1_000_000 or not value.dim():
            return self._unknown(node, value)
        atoms = self._outputs(PER_CHANNEL, str(node.target), value.numel())
        return atoms.reshape(value.shape)

    def _label_module(self, node: fx.Node, value: Any) -> Any:
        name = str(node.target)
        module = self.module.get_submodule(name)
        labels = self.labels.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if len(node.all_input_nodes) != 1 or not isinstance(labels, Tensor) or not isinstance(value, Tensor):
            return self._unknown(node, value)
        if isinstance(module, ELEMENTWISE_MODULES):
            return labels
        if isinstance(module, _MOVING_MODULES):
            return module(labels)
        if isinstance(module, SPATIAL_MODULES):
            return self._keep_channels(node, labels, value)
        channels = _vector(labels, 1)
        if isinstance(module, _BATCH_NORMS) and channels is not None:
            self._record(PER_CHANNEL, name, channels)
            return labels
        if isinstance(module, nn.PReLU) and channels is not None and module.num_parameters > 1:
            self._record(PER_CHANNEL, name, channels)
            return labels
        if isinstance(module, nn.GroupNorm) and channels is not None:
            self._record(PER_CHANNEL, name, channels, module.num_groups)
            return labels
        features = _vector(labels, labels.dim() - 1)
        if isinstance(module, nn.LayerNorm) and features is not None and len(module.normalized_shape) == 1:
            self._record(PER_CHANNEL, name, features)
            return labels
        if type(module) is nn.Linear and features is not None:
            self._record(LINEAR_INPUT, name, features)
            return self._outputs(LINEAR_OUTPUT, name, module.out_features).expand(value.shape)
        if type(module) in _CONVS and channels is not None:
            return self._label_conv(name, module, channels, value)
        return self._unknown(node, value)

    def _label_conv(self, name: str, module: Any, channels: Tensor, value: Tensor) -> Tensor:
        if module.groups > 1 and module.groups == module.in_channels:
            # Depthwise: an output channel goes wherever its input channel goes.
            self._record(CONV_INPUT, name, channels, 1)
            atoms = channels.repeat_interleave(module.out_channels // module.in_channels)
            self._record(CONV_OUTPUT, name, atoms)
        else:
            self._record(CONV_INPUT, name, channels, module.groups)
            atoms = self._outputs(CONV_OUTPUT, name, module.out_channels, module.groups)
        return _along(atoms, 1, value)

    def _keep_channels(self, node: fx.Node, labels: Tensor, value: Any) -> Any:
        """An operation within each channel: pooling, resizing, padding."""
        channels = _vector(labels, 1)
        if channels is None or not isinstance(value, Tensor) or value.shape[1] != len(channels):
            return self._unknown(node, value)
        return _along(channels, 1, value)

    def _label_call(self, node: fx.Node, value: Any) -> Any:
        target = node.target
        method = node.op == "call_method"
        operands = [self.labels.get(source) for source in node.all_input_nodes]
        labelled = [labels for labels in operands if isinstance(labels, Tensor)]
        has_tensor = any(isinstance(item, Tensor) for item in _flatten(value))
        if not has_tensor:
            return None
        if not any(True for labels in operands for _ in _tensors(labels)):
            return self._unknown(node, value)
        if target in (_MOVING_METHODS if method else _MOVING_FUNCTIONS):
            return self._move(node, value)
        if target in (_ELEMENTWISE_METHODS if method else ELEMENTWISE_FUNCTIONS) and len(labelled) == len(
            operands
        ):
            combined = self._combine(labelled)
            return combined if combined.shape == value.shape else self._unknown(node, value)
        if not method and target in SPATIAL_FUNCTIONS and len(labelled) == 1:
            return self._keep_channels(node, labelled[0], value)
        if target in _REDUCTIONS and len(labelled) == 1 and isinstance(value, Tensor):
            return self._reduce(node, labelled[0], value)
        if target is F.layer_norm and len(labelled) >= 1:
            return self._layer_norm(node, value)
        return self._unknown(node, value)

    def _move(self, node: fx.Node, value: Any) -> Any:
        """Run an operation that only moves data on the labels themselves."""
        sources = node.all_input_nodes
        if any(self.labels.get(s) is None and _has_tensor(self.env.get(s)) for s in sources):
            return self._unknown(node, value)

        def substitute(source: fx.Node) -> Any:
            labels = self.labels.get(source)
            return self.env[source] if labels is None else labels

        args = fx.node.map_arg(node.args, substitute)
        kwargs = fx.node.map_arg(node.kwargs, substitute)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        return function(*args, **kwargs)

    def _reduce(self, node: fx.Node, labels: Tensor, value: Tensor) -> Any:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = (dims,) if isinstance(dims, int) else dims
        if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
            return self._unknown(node, value)
        low, high = labels.amin(tuple(dims), keepdim=True), labels.amax(tuple(dims), keepdim=True)
        if not torch.equal(low, high):
            return self._unknown(node, value)
        return low.reshape(value.shape)

    def _layer_norm(self, node: fx.Node, value: Any) -> Any:
        labels = self.labels.get(node.all_input_nodes[0])
        shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        features = _vector(labels, labels.dim() - 1) if isinstance(labels, Tensor) else None
        if features is None or not isinstance(shape, (list, tuple)) or len(shape) != 1:
            return self._unknown(node, value)
        for parameter in node.all_input_nodes[1:]:
            atoms = self.labels.get(parameter)
            if not isinstance(atoms, Tensor) or atoms.shape != features.shape:
                return self._unknown(node, value)
            self._tie(features, atoms)
        self._record(PER_CHANNEL, f"{node.name} (no module)", features)
        return labels

    # the classes -------------------------------------------------------------------------------

    def result(self) -> Channels:
        """Group the atoms that are interchangeable."""
        self._freeze_shared_parameters()
        frozen = {self._root(atom) for atom in self._frozen}
        uses = tuple(
            ChannelUse(use.kind, use.name, self._roots(use.atoms), use.blocks) for use in self._uses.values()
        )
        places: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        signatures: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for index, use in enumerate(uses):
            width = max(1, len(use.atoms) // use.blocks)
            for position, atom in enumerate(use.atoms.tolist()):
                places[atom][index].append(position)
                signatures[atom].append((index, position // width))
        tags: dict[int, set[tuple[str, int]]] = defaultdict(set)
        for atom, marks in self._tags.items():
            tags[self._root(atom)] |= {(mark, self._root(other)) for mark, other in marks}
        groups: dict[Any, list[int]] = defaultdict(list)
        for atom, signature in signatures.items():
            if atom not in frozen:
                groups[tuple(signature), tuple(sorted(tags[atom]))].append(atom)
        classes = []
        for members in groups.values():
            if len(members) < 2:
                continue
            members.sort(key=lambda atom: next(iter(places[atom].values())))
            where = {index: torch.tensor([places[a][index] for a in members]) for index in places[members[0]]}
            classes.append(ChannelClass(torch.tensor(members), where))
        return Channels(uses, tuple(classes))

    def _freeze_shared_parameters(self) -> None:
        """Tied weights (one parameter in two modules) would be permuted twice: leave them alone."""
        owners: dict[int, str] = {}
        modules = dict(self.module.named_modules())
        for use in self._uses.values():
            module = modules.get(use.name)
            if module is None:
                continue
            for parameter in module.parameters(recurse=False):
                owner = owners.setdefault(id(parameter), use.name)
                if owner != use.name:
                    for other in self._uses.values():
                        if other.name in (owner, use.name):
                            self._freeze(other.atoms)


def _flatten(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flatten(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _flatten(item)
    else:
        yield value


def _tensors(labels: Any) -> Iterable[Tensor]:
    return (item for item in _flatten(labels) if isinstance(item, Tensor))


def _has_tensor(value: Any) -> bool:
    return any(True for _ in _tensors(value))


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_map(function, item) for item in value]
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)


def _vector(labels: Tensor, dim: int) -> Tensor | None:
    """Labels along ``dim`` if they are the same everywhere else, else None."""
    if labels.dim() <= dim or labels.numel() == 0:
        return None
    others = [axis for axis in range(labels.dim()) if axis != dim]
    first = labels
    for axis in others:
        first = first.narrow(axis, 0, 1)
    # Expanded (stride 0) labels are constant by construction; comparing costs time only elsewhere.
    if any(labels.stride(axis) != 0 and labels.shape[axis] > 1 for axis in others) and not bool(
        (labels == first).all()
    ):
        return None
    return first.reshape(-1)


def _along(atoms: Tensor, dim: int, value: Tensor) -> Tensor:
    """Expand a vector of atoms along ``dim`` to the shape of ``value`` without copying."""
    shape = [1] * value.dim()
    shape[dim] = len(atoms)
    return atoms.reshape(shape).expand(value.shape)


def _thin(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the dimensions along which both are constant, and flatten."""
    for axis in range(left.dim()):
        if left.stride(axis) == 0 and right.stride(axis) == 0 and left.shape[axis] > 1:
            left, right = left.narrow(axis, 0, 1), right.narrow(axis, 0, 1)
    size = math.prod(left.shape)
    return left.reshape(size), right.reshape(size)
