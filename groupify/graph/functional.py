"""An exported graph without side effects.

Torch's own functionalisation (``run_decompositions``) traces the whole graph twice more, which takes two to
three times as long as the export itself. Most models write in place only where nobody else looks, as
``ReLU(inplace=True)`` behind a conv does: there the operator that returns a new tensor says the same. What is
not provably of that kind is left to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from groupify.graph.operators import Effect, effect, operator_name, packet_name

_FRESH = {
    Effect.SIZES,
    Effect.CONV,
    Effect.TRANSPOSED_CONV,
    Effect.LINEAR,
    Effect.ELEMENTWISE,
    Effect.WITHIN_CHANNELS,
}
_FRESH_OTHERS = {
    "clone",
    "lift_fresh_copy",
    "batch_norm",
    "group_norm",
    "layer_norm",
    "cat",
    "concat",
    "stack",
    "mean",
    "sum",
    "matmul",
    "bmm",
}
_NO_GRAD, _AUTOCAST = (
    torch.ops.higher_order.wrap_with_set_grad_enabled,
    torch.ops.higher_order.wrap_with_autocast,
)


def functional(program: ExportedProgram) -> tuple[ExportedProgram, bool]:
    """Return the program without side effects, and whether it leaves an autocast out."""
    reduced = _inline_regions(program.graph_module)
    if not any(kind is OutputKind.BUFFER_MUTATION for kind in _outputs(program)) and _write_anew(program):
        return program, reduced
    return program.run_decompositions({}), reduced


def _outputs(program: ExportedProgram) -> list[OutputKind]:
    return [spec.kind for spec in program.graph_signature.output_specs]


def _inline_regions(module: fx.GraphModule) -> bool:
    """Put what runs under ``no_grad`` and ``autocast`` in its place; say whether autocast was among it."""
    reduced = False
    found = True
    while found:
        found = False
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target in (_NO_GRAD, _AUTOCAST):
                reduced |= node.target is _AUTOCAST and bool(node.args[2])
                _inline(module, node)
                found = True
    if reduced:  # types are as without it now
        for node in [n for n in module.graph.nodes if operator_name(n) == "_assert_tensor_metadata"]:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return reduced


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    position = next(
        i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and _is_graph(module, arg)
    )
    holder: Any = node.args[position]
    inner = getattr(module, str(holder.target))
    outside = dict(
        zip((n for n in inner.graph.nodes if n.op == "placeholder"), node.args[position + 1 :], strict=True)
    )
    for attribute in [n for n in inner.graph.nodes if n.op == "get_attr"]:  # regions inside of this one
        name = f"{holder.target}_{attribute.target}"
        setattr(module, name, getattr(inner, str(attribute.target)))
        attribute.target = name
    with module.graph.inserting_before(node):
        results: Any = module.graph.graph_copy(inner.graph, outside)
    results = results if isinstance(results, (tuple, list)) else (results,)
    for item in list(node.users):
        item.replace_all_uses_with(results[item.args[1]])
        module.graph.erase_node(item)
    module.graph.erase_node(node)


def _is_graph(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule)


def _write_anew(program: ExportedProgram) -> bool:
    """Replace operators that write in place by those that return a new tensor; False where that is not safe.

    Nothing is changed then.
    """
    graph = program.graph_module.graph
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs}
    anew: dict[fx.Node, Any] = {}
    fresh: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        if not schema.is_mutable:
            if effect(node) in _FRESH or operator_name(node) in _FRESH_OTHERS:
                fresh.add(node)  # its output is memory of its own, and it hands out none of its inputs'
            continue
        source = node.args[0] if node.args else None
        twin = _twin(node)
        if packet_name(node.target) == "detach_":  # as ``torch.tensor`` in ``forward`` does: writes nothing
            anew[node] = twin
            continue
        if (
            twin is None
            or not isinstance(source, fx.Node)
            or source.name in inputs
            or source not in fresh
            or not all(reader in fresh or reader is node for reader in source.users if _before(reader, node))
        ):
            return False
        anew[node] = twin
        fresh.add(node)
    for node, twin in anew.items():
        written: Any = node.args[0]
        node.target = twin
        for reader in [reader for reader in written.users if reader is not node and _before(node, reader)]:
            reader.replace_input_with(written, node)
    return True


def _before(first: fx.Node, second: fx.Node) -> bool:
    return bool(first < second)


def _twin(node: fx.Node) -> Any:
    """The operator that returns what an in-place one writes; None where its type could be another."""
    name = packet_name(node.target)
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    twin = getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]
    values = [source.meta.get("val") for source in node.all_input_nodes]
    if len({value.dtype for value in values if isinstance(value, Tensor)}) > 1:
        return None
    return twin
