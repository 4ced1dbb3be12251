"""How much a model's outputs mind an error of each conv: each is replaced alone, and outputs are compared.

That needs neither labels nor class scores. What it costs is one run per conv of what lies behind it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from groupify.graph.call import Call
from groupify.graph.capture import Captured
from groupify.graph.forward import output_tensors
from groupify.graph.model_graph import ModelGraph, computes_the_same
from groupify.graph.neighbours import only_reader
from groupify.graph.plain_layers import Conv, conv_of
from groupify.scores import OutputErrors

IMAGES = 16
_BATCH = 4  # all values of the graph are kept for so many images


def output_scales(graph: ModelGraph | None, names: Sequence[str]) -> dict[str, Tensor]:
    """Return what the batch norm behind each conv, if any, multiplies its outputs by, shape (O,)."""
    scales: dict[str, Tensor] = {}
    for node in graph.graph.nodes if graph is not None else ():
        name = str(node.target)
        if node.op == "call_module" and name in names and graph is not None:
            reader = only_reader(node)
            norm = None if reader is None else graph.norm(reader)
            if norm is not None:
                scales[name] = norm.affine()[0].abs().detach()
    return scales


def graph_of(model: nn.Module, call: Call, captured: Captured) -> ModelGraph | None:
    """Return the graph that was captured, over the layers of ``model``, if it computes the same."""
    if captured.graph is None or not captured.graph.accepts(call):
        return None
    graph = captured.graph.on(model)
    return graph if computes_the_same(model, graph, call) else None


@torch.no_grad()
def output_sensitivities(
    model: nn.Module,
    graph: ModelGraph | None,
    calls: Sequence[Call],
    weights: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Return, for each conv, the error of the outputs over the error of the conv.

    Both are squared errors relative to the variance of what is right; that of the outputs is the mean over
    all tensors that the model hands out.

    Args:
        model: the dense model, in evaluation mode; left untouched.
        graph: its graph, which spares running what lies before a conv; None = it has none.
        calls: what it is called with.
        weights: what each conv is to compute instead of its own weight, by name, shape as that.
        scales: how much each output of a conv weighs, shape (O,); a missing one = all the same.
        progress: show a bar on stderr.
    """
    tallies = {name: _Tally(scales.get(name)) for name in weights}
    outputs = OutputErrors()
    jobs = [part for call in calls for part in call.split(-(-call.batch_size // _BATCH))]
    for call in tqdm(jobs, desc="outputs", disable=None if progress else True, leave=False):
        run = _Whole(model, call) if graph is None or not graph.accepts(call) else _Partial(graph, call)
        outputs.add_dense(run.dense)
        for name, weight in weights.items():
            outputs.add(name, run.dense, run.with_weight(name, weight, tallies[name]))
    return {
        name: outputs.relative(name) / error if (error := tally.relative) > 0 else 0.0
        for name, tally in tallies.items()
    }


@dataclass
class _Tally:
    """Errors of one conv, whose mean its bias would take."""

    scale: Tensor | None
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def replaced(self, conv: Conv, weight: Tensor, inputs: Tensor, dense: Tensor) -> Tensor:
        """Return what a conv with another weight computes, and count its error."""
        other = copy.copy(conv)
        other._parameters = {**conv._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
        missed = other.forward(inputs) - dense
        missed -= _mean(missed)
        self.sums["missed"] += self._energy(missed)
        self.sums["energy"] += self._energy(dense - _mean(dense))
        return dense + missed

    @property
    def relative(self) -> float:
        """Squared error ÷ variance."""
        return self.sums["missed"] / self.sums["energy"] if self.sums["energy"] > 0 else 0.0

    def _energy(self, values: Tensor) -> float:
        energies = values.square().sum([dim for dim in range(values.dim()) if dim != 1])
        return float((energies if self.scale is None else energies * self.scale.square()).sum())


def _mean(values: Tensor) -> Tensor:
    return values.mean([dim for dim in range(values.dim()) if dim != 1], keepdim=True)


class _Partial:
    """A batch in a graph: all its values are kept, and only what lies behind a conv runs again."""

    def __init__(self, graph: ModelGraph, call: Call) -> None:
        self._graph = graph
        self._values = {node: value for node, value, _ in graph.walk(call)}
        self.dense = self._outputs(self._values)
        last = {source: node for node in graph.graph.nodes for source in node.all_input_nodes}
        self._last_read: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for source, node in last.items():
            self._last_read[node].append(source)

    def _outputs(self, values: Mapping[fx.Node, object]) -> list[Tensor]:
        found = next(value for node, value in values.items() if node.op == "output")
        assert isinstance(found, (tuple, list))
        return output_tensors(list(found[self._graph.hidden_outputs :]))

    def with_weight(self, name: str, weight: Tensor, tally: _Tally) -> list[Tensor]:
        """Return the outputs with another weight of one conv."""
        changed: dict[fx.Node, object] = {}
        for node in self._graph.graph.nodes:
            own = node.op == "call_module" and str(node.target) == name
            if own or any(source in changed for source in node.all_input_nodes):
                changed[node] = (
                    self._replaced(node, changed, weight, tally)
                    if own
                    else self._graph.compute(node, lambda source: changed.get(source, self._values[source]))
                )
            for source in self._last_read[node]:
                changed.pop(source, None)
        return self._outputs(changed)

    def _replaced(
        self, node: fx.Node, changed: Mapping[fx.Node, object], weight: Tensor, tally: _Tally
    ) -> Tensor:
        source = node.all_input_nodes[0]
        inputs, dense = changed.get(source, self._values[source]), self._values[node]
        assert isinstance(inputs, Tensor)
        assert isinstance(dense, Tensor)
        return tally.replaced(conv_of(self._graph.model, str(node.target)), weight, inputs, dense)


class _Whole:
    """A batch in a model without a graph: it runs as a whole."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self._model, self._call = model, call
        self.dense = output_tensors(call.run(model))

    def with_weight(self, name: str, weight: Tensor, tally: _Tally) -> list[Tensor]:
        """Return the outputs with another weight of one conv."""
        conv = conv_of(self._model, name)

        def replace(
            _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], dense: Tensor
        ) -> Tensor:
            return tally.replaced(conv, weight, inputs[0] if inputs else named["input"], dense)

        handle = conv.register_forward_hook(replace, with_kwargs=True, prepend=True)
        try:
            return output_tensors(self._call.run(self._model))
        finally:
            handle.remove()
