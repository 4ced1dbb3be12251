"""One pass of the dense model over the calibration images: what the fit and the clustering need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from groupify.conversion.sampling import Positions, compact, input_patches, pick, sample_positions
from groupify.errors import ConversionError


@dataclass
class SiteSamples:
    """Samples of one conv in the dense model; one list entry for each batch and call.

    Attributes:
        positions: the sampled output positions.
        patches: input patches at some of the positions, shape (n', I, kh·kw).
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


@dataclass(frozen=True)
class SampleBudget:
    """How many output positions are sampled.

    Attributes:
        per_input: positions for each input of a group (I·kh·kw / groups).
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
    images = sum(len(batch) for batch in batches)
    observer = _Observer(module, groups, residual_sums, budget, images, seed)
    with torch.no_grad():
        for batch in tqdm(batches, desc="dense model", disable=None if progress else True, leave=False):
            observer.run(batch)
    return observer.samples


class _Observer(fx.Interpreter):
    def __init__(
        self,
        module: fx.GraphModule,
        groups: Mapping[str, int],
        residual_sums: Mapping[fx.Node, fx.Node],
        budget: SampleBudget,
        images: int,
        seed: int,
    ) -> None:
        super().__init__(module)
        self._groups = groups
        self._sums: dict[fx.Node, list[fx.Node]] = {}
        for conv, total in residual_sums.items():
            self._sums.setdefault(total, []).append(conv)
        self._budget = budget
        self._images = images
        self._generator = torch.Generator().manual_seed(seed)
        self.samples = {name: SiteSamples() for name in groups}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run one batch."""
        self._calls: dict[str, int] = {}
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; sample it if it is a site or a residual sum."""
        value = super().run_node(n)
        name = str(n.target)
        if n.op == "call_module" and name in self._groups:
            inputs, _ = self.fetch_args_kwargs_from_env(n)
            self._sample(name, inputs[0], value)
        for conv in self._sums.get(n, ()):
            samples = self.samples[str(conv.target)]
            samples.sums.append(compact(pick(value, samples.positions[-1])))
        return value

    def _sample(self, name: str, inputs: Tensor, outputs: Tensor) -> None:
        conv = self.module.get_submodule(name)  # type: ignore[union-attr]
        assert isinstance(conv, nn.Conv2d)
        _check_finite(name, outputs)
        samples = self.samples[name]
        self._calls[name] = self._calls.get(name, 0) + 1
        samples.calls = max(samples.calls, self._calls[name])
        share = len(inputs) / self._images
        group_inputs = conv.weight[0].numel() // self._groups[name]
        count = -(-int(self._budget.count(group_inputs) * share) // 1) or 1
        positions = sample_positions(outputs.shape, count, self._generator)
        samples.positions.append(positions)
        samples.outputs.append(compact(pick(outputs, positions)))
        kept = min(len(positions), max(1, int(self._budget.patch_count(group_inputs) * share)))
        some = torch.linspace(0, len(positions) - 1, kept).long()
        few = Positions(positions.image[some], positions.row[some], positions.column[some])
        samples.patches.append(compact(input_patches(inputs, conv, few)))
        samples.patch_outputs.append(compact(pick(outputs, few)))


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ConversionError(
            f"layer {name!r} gives NaN or infinite outputs on the calibration images; "
            "check its weights and the preprocessing of the images"
        )


def residual_sums(module: fx.GraphModule, sites: Iterable[str]) -> dict[fx.Node, fx.Node]:
    """Find the sites whose output, perhaps behind a batch norm, is one term of a residual sum."""
    import operator

    additions = {operator.add, operator.iadd, torch.add, "add", "add_"}
    names = set(sites)
    found: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "call_module" or str(node.target) not in names:
            continue
        last = node
        reader = next(iter(last.users), None)
        if len(last.users) == 1 and reader is not None and _is_batch_norm(module, reader):
            last = reader
            reader = next(iter(last.users), None)
        if (
            reader is not None
            and len(last.users) == 1
            and reader.op in ("call_function", "call_method")
            and reader.target in additions
            and len(reader.args) == 2
            and not reader.kwargs
            and all(isinstance(arg, fx.Node) for arg in reader.args)
            and reader.args[0] is not reader.args[1]
        ):
            found[node] = reader
    return found


def _is_batch_norm(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.BatchNorm2d)
