"""One pass of the dense model over the calibration images: what the fit and the clustering need."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from groupify.errors import ConversionError
from groupify.graph.call import Call
from groupify.graph.model_graph import Fetch, ModelGraph
from groupify.graph.plain_layers import CONVS, Conv
from groupify.graph.prepared import batch_sizes
from groupify.kept import KeptTensors, Shelf
from groupify.stats.positions import Positions, compact, input_patches, pick, sample_positions

Tensors: TypeAlias = list[Tensor] | KeptTensors


@dataclass
class SiteSamples:
    """Samples of one conv in the dense model; one list entry for each batch and call.

    Attributes:
        positions: the sampled output positions.
        patch_positions: some of those.
        patches: input patches at these, shape (n', I, taps).
        patch_outputs: outputs at these, shape (n', O).
        outputs: outputs at all sampled positions, shape (n, O).
        sums: the residual sum that the output ends up in, at the same positions, shape (n, O).
        calls: how often the conv runs in one forward pass.
    """

    positions: list[Positions] = field(default_factory=list)
    patch_positions: list[Positions] = field(default_factory=list)
    patches: Tensors = field(default_factory=list)
    patch_outputs: Tensors = field(default_factory=list)
    outputs: Tensors = field(default_factory=list)
    sums: Tensors = field(default_factory=list)
    calls: int = 0

    @staticmethod
    def on(shelf: Shelf) -> SiteSamples:
        """Return none yet, those to come on a shelf."""
        patches, patch_outputs, outputs, sums = (KeptTensors(shelf) for _ in range(4))
        return SiteSamples(patches=patches, patch_outputs=patch_outputs, outputs=outputs, sums=sums)

    def permuted(self, inputs: Tensor | None, outputs: Tensor | None) -> SiteSamples:
        """Return the samples of the layer with inputs and outputs in another order; None = as they are."""
        return replace(
            self,
            patches=_ordered(self.patches, inputs),
            patch_outputs=_ordered(self.patch_outputs, outputs),
            outputs=_ordered(self.outputs, outputs),
            sums=_ordered(self.sums, outputs),
        )

    def scaled(self, factors: Tensor) -> SiteSamples:
        """Return the samples of the layer with inputs multiplied by factors, shape (I,) or (1,)."""
        if bool((factors == 1).all()):
            return self
        return replace(self, patches=_each(self.patches, lambda part: part * factors.to(part).reshape(-1, 1)))


def _ordered(parts: Tensors, order: Tensor | None) -> Tensors:
    return parts if order is None else _each(parts, lambda part: part[:, order.to(part.device)])


def _each(parts: Tensors, function: Callable[[Tensor], Tensor]) -> Tensors:
    return [function(part) for part in parts] if isinstance(parts, list) else parts.map(function)


@dataclass(frozen=True)
class SampleBudget:
    """How many output positions are sampled.

    Attributes:
        per_input: positions for each input of a group (I·taps / groups).
        minimum: positions at least, as far as there are that many.
        patches_per_input, patches_minimum: the same for the positions whose input patches are kept.
    """

    per_input: float = 8.0
    minimum: int = 16384
    patches_per_input: float = 2.0
    patches_minimum: int = 2048

    def count(self, group_inputs: int) -> int:
        """Number of positions for a fit with so many inputs per group."""
        return max(self.minimum, int(self.per_input * group_inputs))

    def patch_count(self, group_inputs: int) -> int:
        """Number of positions whose patches are kept."""
        return max(self.patches_minimum, int(self.patches_per_input * group_inputs))


@dataclass(frozen=True)
class Sampling:
    """What to sample of a layer.

    Attributes:
        groups: of its inputs, each fitted by itself: the fewer, the more positions it takes.
        patches: whether input patches are kept, for a clustering or where the fit is on the teacher's inputs.
    """

    groups: int
    patches: bool = True


def observe_teacher(
    graph: ModelGraph,
    batches: Sequence[Call],
    layers: Mapping[str, Sampling],
    residual_sums: Mapping[fx.Node, fx.Node],
    budget: SampleBudget,
    *,
    seed: int,
    shelf: Shelf | None = None,
    progress: bool = False,
) -> dict[str, SiteSamples]:
    """Run the dense model once over all batches and sample its convs.

    Args:
        graph: the dense model's graph.
        batches: calibration images.
        layers: what to sample of each, by name.
        residual_sums: conv node → node of the residual sum that its output ends up in.
        budget: how many positions.
        seed: seed of the positions.
        shelf: where the samples wait; None = in memory.

    Raises:
        ConversionError: an activation is NaN or infinite; names the layer.
    """
    sampler = SiteSampler(layers, budget, batches, seed, shelf)
    convs_of: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for conv, total in residual_sums.items():
        convs_of[total].append(conv)
    with torch.no_grad():
        for batch in tqdm(batches, desc="dense model", disable=None if progress else True, leave=False):
            sampler.start_batch(batch.batch_size)
            for node, value, fetch in graph.walk(batch):
                _observe(graph, node, value, fetch, sampler)
                _observe_sum(node, value, fetch, convs_of.get(node, ()), sampler)
    return sampler.samples


class SiteSampler:
    """Takes samples of convs while the dense model runs.

    Args:
        layers: what to sample of each, by name.
        budget: how many positions.
        batches: the batches to come; their sizes share the budget.
        seed: seed of the positions.
        shelf: where the samples wait; None = in memory.
    """

    def __init__(
        self,
        layers: Mapping[str, Sampling],
        budget: SampleBudget,
        batches: Sequence[Call],
        seed: int,
        shelf: Shelf | None = None,
    ) -> None:
        self.layers = layers
        self.samples = {name: SiteSamples.on(shelf or Shelf()) for name in layers}
        self._budget = budget
        self._images = sum(batch_sizes(batches))
        self._share = 1.0
        self._generator = torch.Generator()
        self._next_seed = seed * 1_000_003  # the positions of a batch depend on its number
        self._calls: dict[str, int] = {}

    def start_batch(self, images: int) -> None:
        """Begin to count the calls of each conv anew, for a batch of so many images."""
        self._share = images / self._images
        self._calls = {}
        self._generator.manual_seed(self._next_seed)
        self._next_seed += 1

    def sample(self, name: str, layer: Conv | nn.Linear, inputs: Tensor, outputs: Tensor) -> None:
        """Sample one call of a conv or linear layer; inputs (N, I, *spatial), outputs (N, O, *spatial).

        Raises:
            ConversionError: the outputs are NaN or infinite.
        """
        # The sum tells in one pass; only a large sum of finite values needs a second look.
        if not bool(torch.isfinite(outputs.sum())) and not bool(torch.isfinite(outputs).all()):
            raise ConversionError(
                f"layer {name!r} gives NaN or infinite outputs on the calibration images; "
                "check its weights and the preprocessing of the images"
            )
        samples = self.samples[name]
        self._calls[name] = self._calls.get(name, 0) + 1
        samples.calls = max(samples.calls, self._calls[name])
        share = self._share
        group_inputs = patch_width(layer) // self.layers[name].groups
        positions = sample_positions(
            outputs.shape,
            max(1, math.ceil(self._budget.count(group_inputs) * share)),
            self._generator,
            channels_last=isinstance(layer, nn.Linear),
            device=outputs.device,
        )
        samples.positions.append(positions)
        samples.outputs.append(compact(pick(outputs, positions)))
        if not self.layers[name].patches:
            return
        kept = min(len(positions), max(1, math.ceil(self._budget.patch_count(group_inputs) * share)))
        some = torch.linspace(0, len(positions) - 1, kept).long().to(outputs.device)
        few = positions.subset(some)
        samples.patch_positions.append(few)
        samples.patches.append(compact(input_patches(inputs, layer, few)))
        samples.patch_outputs.append(compact(pick(outputs, few)))


def patch_width(layer: Conv | nn.Linear) -> int:
    """Return how many numbers a patch holds: the inputs that all groups of a layer read at one position."""
    return layer.weight[0].numel() * (1 if isinstance(layer, nn.Linear) else layer.groups)


def _observe(graph: ModelGraph, node: fx.Node, value: Any, fetch: Fetch, sampler: SiteSampler) -> None:
    """Sample a node if it is a site."""
    name = str(node.target)
    if node.op != "call_module" or name not in sampler.layers:
        return
    layer, source = graph.layer(node), node.args[0]
    assert isinstance(layer, (*CONVS, nn.Linear))
    assert isinstance(source, fx.Node)
    sampler.sample(name, layer, fetch(source), value)


def _observe_sum(
    node: fx.Node, value: Any, fetch: Fetch, convs: Sequence[fx.Node], sampler: SiteSampler
) -> None:
    """Sample a residual sum where the convs that end up in it were sampled."""
    # A term that is broadcast has no value of its own at each position.
    terms = [fetch(source) for source in node.all_input_nodes] if convs else []
    if all(isinstance(term, Tensor) and term.shape == value.shape for term in terms):
        for conv in convs:
            samples = sampler.samples[str(conv.target)]
            samples.sums.append(compact(pick(value, samples.positions[-1])))
