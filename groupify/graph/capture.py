"""Capture the graph of a model by ``torch.export``, or say in one line why that is impossible."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree
from torchvision.ops import FrozenBatchNorm2d

from groupify.graph.call import Call
from groupify.graph.copying import copy_around_tensors
from groupify.graph.forward import evaluating, output_tensors
from groupify.graph.functional import functional
from groupify.graph.hooks import clear_onlookers
from groupify.graph.model_graph import ModelGraph, fixed_size
from groupify.graph.operators import CONVS, Effect, argument, effect, operator_name
from groupify.graph.plain_layers import conv_kind, is_plain_layer

_ASSERTS = ("_assert", "sym_constrain_range")


@dataclass(frozen=True)
class Captured:
    """What capturing found.

    Attributes:
        graph: the graph of the model in inference; ``None`` when it cannot be exported.
        problem: why it cannot be exported, one line; ``None`` when it can.
    """

    graph: ModelGraph | None
    problem: str | None


def capture(model: nn.Module, calls: Call | Sequence[Call]) -> Captured:
    """Capture the graph of a model as it runs in inference.

    The model is left untouched. Where it does not allow any batch size, the graph holds for that of the first
    call only.

    Args:
        model: the model; its graph reads its very layers and tensors.
        calls: one or several ways in which it is called, with two or more examples each, since a batch of
            one is a case of its own for ``torch.export``. Sizes that differ between them are kept open.
    """
    calls = [calls] if isinstance(calls, Call) else list(calls)
    if len(calls[0].tensors) == 0:
        return Captured(None, "it is called without any tensor")
    try:
        with _quiet(), evaluating(model), torch.no_grad():
            return Captured(_capture(model, calls), None)
    except Exception as error:  # any Python code may run here, so any exception may come out
        return Captured(None, f"{type(error).__name__}: {first_sentence(error)}")


def first_sentence(error: BaseException) -> str:
    """Return what an exception says first, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].partition(". ")[0].rstrip(":") if lines else "no message"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch warns of, and logs, what is of no interest to the user."""
    logger, trace = logging.getLogger("torch"), logging.getLogger("torch.__trace")
    level, propagate = logger.level, trace.propagate
    trace.propagate = False  # a record for each operation, for whoever listens at the root
    # Where it fails, torch prints all that it has so far.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
            trace.propagate = propagate


def _capture(model: nn.Module, calls: Sequence[Call]) -> ModelGraph:
    # A copy, since a model may keep what it computes, here of torch's own fake tensors, in its attributes.
    copy = copy_around_tensors(model)
    example = calls[0]
    clear_onlookers(copy, example)  # or they would be given fake tensors
    counts = _count_calls(copy)
    options: Any = {"dynamic_shapes": _dynamic(calls), "strict": False}
    program = torch.export.export(_Whole(copy), example.arguments, **options)
    program, reduced = functional(program)
    return _Builder(model, copy, program, counts).build(example, reduced)


class _Whole(nn.Module):
    """The model with its output as a list of tensors, whatever classes it uses to hold them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    # Two arguments: with **kwargs torch 2.9 expects dynamic shapes for each of them twice.
    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return output_tensors(self.model(*args, **kwargs))


_ROOT = "model."


def _count_calls(model: nn.Module) -> Counter[str]:
    """Count from now on how often each module is called; by its first name, since torch may export a copy."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            counts[name] += 1

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(count(name))
    return counts


def _dynamic(calls: Sequence[Call]) -> Any:
    """Which sizes are open: the batch, and all in which the calls differ."""
    batch = calls[0].batch_size
    leaves = [call.leaves for call in calls]

    def sizes(number: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        others = [other[number] for other in leaves if len(other) == len(leaves[0])]
        return {
            dim: Dim.AUTO
            for dim, size in enumerate(leaf.shape)
            if (dim == 0 and size == batch > 1)
            or any(isinstance(o, Tensor) and o.dim() == leaf.dim() and o.shape[dim] != size for o in others)
        }

    flat, spec = pytree.tree_flatten(calls[0].arguments)
    args, kwargs = pytree.tree_unflatten([sizes(i, leaf) for i, leaf in enumerate(flat)], spec)
    return {"args": args, "kwargs": kwargs}


class _Builder:
    """Makes a ``ModelGraph`` of an exported program."""

    def __init__(
        self, model: nn.Module, copy: nn.Module, program: ExportedProgram, counts: Counter[str]
    ) -> None:
        self._model = model
        self._copy = copy
        self._program = program
        self._counts = counts
        self._first_names = {id(module): name for name, module in copy.named_modules()}
        self._graph = fx.Graph()
        self._constants: dict[str, Tensor] = {}
        self._owners = Counter(
            id(p) for m in dict.fromkeys(copy.modules()) for p in m._parameters.values() if p is not None
        )
        self._pinned: dict[str, str] = {}

    def build(self, example: Call, reduced: bool) -> ModelGraph:
        """Return the graph."""
        self._copy_nodes()
        self._join_batch_norms()
        self._join_frozen_norms()
        self._join_layers()
        self._graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self._graph.lint()
        outputs = [spec.kind for spec in self._program.graph_signature.output_specs]
        return ModelGraph(
            self._model,
            self._graph,
            self._constants,
            self._pinned,
            self._fixed_batch(example),
            sum(kind is not OutputKind.USER_OUTPUT for kind in outputs),
            reduced,
        )

    def _copy_nodes(self) -> None:
        specs = {spec.arg.name: spec for spec in self._program.graph_signature.input_specs}
        new: dict[fx.Node, fx.Node] = {}
        for node in self._program.graph.nodes:
            if node.op == "call_function" and operator_name(node).startswith(_ASSERTS):
                continue
            spec = specs.get(node.name) if node.op == "placeholder" else None
            if spec is None or spec.kind is InputKind.USER_INPUT:
                if node.op == "get_attr":
                    raise NotImplementedError(f"the graph holds a region of its own, {node.target}")
                new[node] = self._graph.node_copy(node, new.__getitem__)
            elif node.users:
                new[node] = self._tensor_node(node, spec)

    def _tensor_node(self, node: fx.Node, spec: Any) -> fx.Node:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise NotImplementedError(f"it reads something that is no tensor: {spec.kind.name.lower()}")
        name = self._first_name(str(spec.target).removeprefix(_ROOT))
        if spec.kind is InputKind.CONSTANT_TENSOR and not self._is_attribute(name):
            constant = self._program.constants[str(spec.target)].detach()
            if type(constant) is not Tensor:  # torch 2.9 keeps a stand-in of what is read from a .data
                raise NotImplementedError(f"the graph holds a constant without its values, {spec.target}")
            self._constants[name] = constant
        copied = self._graph.create_node("get_attr", name, name=node.name)
        copied.meta = dict(node.meta)
        return copied

    def _first_name(self, name: str) -> str:
        """Name a tensor by the first of the names of its module, which may have several."""
        owner, _, attribute = name.rpartition(".")
        first = self._first_names.get(id(_submodule(self._copy, owner)), owner)
        return f"{first}.{attribute}" if first else attribute

    def _is_attribute(self, name: str) -> bool:
        """Whether a module holds a constant in an attribute of that name, so that it can be changed."""
        owner, _, attribute = name.rpartition(".")
        module = self._model if not owner else _submodule(self._model, owner)
        return module is not None and isinstance(vars(module).get(attribute), Tensor)

    def _fixed_batch(self, example: Call) -> int | None:
        size = example.batch_size
        nodes = [node for node in self._graph.nodes if node.op == "placeholder"]
        shapes = [node.meta["val"].shape for node in nodes if isinstance(node.meta.get("val"), Tensor)]
        leading = [shape[0] for shape in shapes if len(shape)]
        return size if not leading or fixed_size(leading[0]) is not None else None

    # one spelling for each layer ------------------------------------------------------------------

    def _join_batch_norms(self) -> None:
        """Undo torch's decomposition of batch norms in inference, whose other outputs nobody reads."""
        for node in list(self._graph.nodes):
            if operator_name(node) != "_native_batch_norm_legit_no_training":
                continue
            x, weight, bias, mean, variance, momentum, eps = node.args
            for item in [user for user in node.users if user.args[1] == 0]:
                arguments = (x, weight, bias, mean, variance, False, momentum, eps, False)
                self._replace(item, "call_function", torch.ops.aten.batch_norm.default, arguments)

    def _join_frozen_norms(self) -> None:
        """Torchvision's frozen batch norm, which detectors have, computes with its buffers by hand."""
        for node in list(self._graph.nodes):
            name = _innermost(node)
            module = _submodule(self._copy, name)
            if (
                type(module) is not FrozenBatchNorm2d
                or operator_name(node) != "add"
                or _has_hooks(self._model, name)
            ):
                continue
            product = node.args[0]
            if not isinstance(product, fx.Node) or operator_name(product) != "mul":
                continue
            with self._graph.inserting_before(node):
                tensors = [self._graph.create_node("get_attr", f"{name}.{part}") for part in _NORM_PARTS]
            arguments = (product.args[0], *tensors, False, 0.0, module.eps, False)
            self._replace(node, "call_function", torch.ops.aten.batch_norm.default, arguments)

    def _replace(self, node: fx.Node, op: str, target: Any, args: tuple[Any, ...]) -> None:
        with self._graph.inserting_before(node):
            joined = self._graph.create_node(op, target, args)
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
        self._graph.erase_node(node)

    def _join_layers(self) -> None:
        """Turn what plain convs and linear layers compute into calls of them."""
        for source in [node for node in self._graph.nodes if node.op == "get_attr"]:
            name, _, attribute = str(source.target).rpartition(".")
            module = _submodule(self._copy, name)
            if attribute != "weight" or module is None or not is_plain_layer(module):
                continue
            problem = self._why_not(name, module, source)
            if problem is not None:
                for alias in self._names_of(module.weight):
                    self._pinned[alias] = problem
                continue
            for node in list(source.users):
                self._replace(node, "call_module", name, (_input_of(self._copy, node, name),))

    def _names_of(self, weight: Tensor) -> list[str]:
        modules = self._copy.named_modules(remove_duplicate=False)
        return [name for name, module in modules if module._parameters.get("weight") is weight]

    def _why_not(self, name: str, module: Any, weight: fx.Node) -> str | None:
        """Why a layer cannot be one node, and so neither be replaced nor fitted."""
        for parameter in (module.weight, module.bias):
            if parameter is not None and self._owners[id(parameter)] > 1:
                return "it shares its parameters with another layer"
        wanted = {Effect.CONV, Effect.LINEAR}
        readers = list(weight.users)
        if any(effect(node) not in wanted or node.args[1] is not weight for node in readers):
            return "its weight is read by other operations than its own"
        # A call from elsewhere, as F.conv2d(x, conv.weight), would be one too many.
        if len(readers) != self._counts[self._first_names[id(module)]]:
            return "its weight is read by other operations than its own"
        if any(_input_of(self._copy, node, name) is None for node in readers):
            return "its computation could not be told apart from what is around it"
        return None


_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def _innermost(node: fx.Node) -> str | None:
    """Name of the module whose forward made a node; None where that is not known."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(next(reversed(stack.values()))[0])
    return path.removeprefix(_ROOT) if path.startswith(_ROOT) else None


def _submodule(model: nn.Module, name: str | None) -> Any:
    if not name:
        return None
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _has_hooks(model: nn.Module, name: str | None) -> bool:
    module = _submodule(model, name)
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _input_of(model: nn.Module, node: fx.Node, name: str) -> fx.Node | None:
    """The input, in front of padding, of the conv or linear layer that a node computes; else None."""
    module, place = _submodule(model, name), _submodule(model, _innermost(node))
    if place is not None and place is not module:
        return None
    bias = argument(node, 2, "bias")
    if (None if bias is None else str(bias.target)) != (None if module.bias is None else f"{name}.bias"):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if conv_kind(module) is None:
        return source
    if operator_name(node) not in CONVS:
        return None
    if module.padding_mode == "zeros":
        return source
    inner = operator_name(source)
    padded = inner == "pad" or inner.startswith(("reflection_pad", "replication_pad"))
    return source.args[0] if padded and len(source.users) == 1 else None  # type: ignore[return-value]
