"""One pass of the dense model over the calibration images: what the fit and the clustering need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from groupify.errors import ConversionError
from groupify.graph.operations import CONVS, Conv
from groupify.stats.positions import Positions, compact, input_patches, pick, sample_positions


@dataclass
class SiteSamples:
    """Samples of one conv in the dense model; one list entry for each batch and call.

    Attributes:
        positions: the sampled output positions.
        patches: input patches at some of the positions, shape (n', I, taps).
        patch_outputs: outputs at those, shape (n', O).
        outputs: outputs at all sampled positions, shape (n, O).
        sums: the residual sum that the output ends up in, at the same positions, shape (n, O).
        calls: how often the conv runs in one forward pass.
    """

    positions: list[Positions] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    patch_outputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    calls: int = 0

    def permuted(self, inputs: Tensor | None, outputs: Tensor | None) -> SiteSamples:
        """Return the samples of the layer with inputs and outputs in another order; None = as they are."""
        return replace(
            self,
            patches=_ordered(self.patches, inputs),
            patch_outputs=_ordered(self.patch_outputs, outputs),
            outputs=_ordered(self.outputs, outputs),
            sums=_ordered(self.sums, outputs),
        )


def _ordered(parts: list[Tensor], order: Tensor | None) -> list[Tensor]:
    return parts if order is None else [part[:, order] for part in parts]


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


def observe_teacher(
    module: fx.GraphModule,
    batches: Sequence[Tensor],
    groups: Mapping[str, int],
    residual_sums: Mapping[fx.Node, fx.Node],
    budget: SampleBudget,
    *,
    seed: int,
    progress: bool = False,
) -> dict[str, SiteSamples]:
    """Run the dense model once over all batches and sample its convs.

    Args:
        module: traced dense model.
        batches: calibration images.
        groups: number of groups to be of each conv to sample, by name.
        residual_sums: conv node → node of the residual sum that its output ends up in.
        budget: how many positions.
        seed: seed of the positions.

    Raises:
        ConversionError: an activation is NaN or infinite; names the layer.
    """
    sampler = SiteSampler(groups, budget, batches, seed)
    observer = _Observer(module, sampler, residual_sums)
    with torch.no_grad():
        for batch in tqdm(batches, desc="dense model", disable=None if progress else True, leave=False):
            observer.run(batch)
    return sampler.samples


class SiteSampler:
    """Takes samples of convs while the dense model runs.

    Args:
        groups: number of groups to be of each conv, by name.
        budget: how many positions.
        batches: the batches to come; their sizes share the budget.
        seed: seed of the positions.
    """

    def __init__(
        self, groups: Mapping[str, int], budget: SampleBudget, batches: Sequence[Tensor], seed: int
    ) -> None:
        self.groups = groups
        self.samples = {name: SiteSamples() for name in groups}
        self._budget = budget
        self._images = sum(len(batch) for batch in batches)
        self._generator = torch.Generator()
        self._next_seed = seed * 1_000_003  # the positions of a batch depend on its number
        self._calls: dict[str, int] = {}

    def start_batch(self) -> None:
        """Begin to count the calls of each conv anew."""
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
        share = len(inputs) / self._images
        group_inputs = layer.weight[0].numel() // self.groups[name]
        positions = sample_positions(
            outputs.shape,
            max(1, math.ceil(self._budget.count(group_inputs) * share)),
            self._generator,
            channels_last=isinstance(layer, nn.Linear),
        )
        samples.positions.append(positions)
        samples.outputs.append(compact(pick(outputs, positions)))
        if self.groups[name] == 1:
            return  # nothing to cluster
        kept = min(len(positions), max(1, math.ceil(self._budget.patch_count(group_inputs) * share)))
        some = torch.linspace(0, len(positions) - 1, kept).long()
        few = positions.subset(some)
        samples.patches.append(compact(input_patches(inputs, layer, few)))
        samples.patch_outputs.append(compact(pick(outputs, few)))


class _Observer(fx.Interpreter):
    """Runs the graph and samples sites and residual sums on the way."""

    def __init__(self, module: fx.GraphModule, sampler: SiteSampler, sums: Mapping[fx.Node, fx.Node]) -> None:
        super().__init__(module)
        self._sampler = sampler
        self._sums: dict[fx.Node, list[fx.Node]] = {}
        for conv, total in sums.items():
            self._sums.setdefault(total, []).append(conv)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run one batch."""
        self._sampler.start_batch()
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; sample it if it is a site or a residual sum."""
        value = super().run_node(n)
        name = str(n.target)
        if n.op == "call_module" and name in self._sampler.groups:
            inputs, _ = self.fetch_args_kwargs_from_env(n)
            layer = self.module.get_submodule(name)
            assert isinstance(layer, (*CONVS, nn.Linear))
            self._sampler.sample(name, layer, inputs[0], value)
        if n in self._sums:
            terms, _ = self.fetch_args_kwargs_from_env(n)
            # A term that is broadcast has no value of its own at each position.
            if all(isinstance(term, Tensor) and term.shape == value.shape for term in terms):
                for conv_node in self._sums[n]:
                    samples = self._sampler.samples[str(conv_node.target)]
                    samples.sums.append(compact(pick(value, samples.positions[-1])))
        return value
