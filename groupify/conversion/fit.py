"""Fit the grouped convs of a student to a dense teacher, in the order in which they run.

Each conv is fitted by least squares from what the already converted student feeds it to what the
teacher computed at the same place, so that every layer also makes good for the error upstream; the
asymmetric reconstruction of Zhang, Zou, He and Sun (2015). Where the output is one term of a
residual sum, the target also holds what the other term of the student is off by.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from groupify.conversion.held_out import HeldOutImages
from groupify.conversion.layer_samples import Part, Target, dense_parts
from groupify.conversion.site_fit import FitOptions, SiteFit, fit_site, refit_layer
from groupify.devices import double
from groupify.graph.call import Call
from groupify.graph.execute import BatchedRun
from groupify.graph.model_graph import ModelGraph, Norm
from groupify.graph.neighbours import is_relu, only_reader
from groupify.graph.operators import Effect, effect
from groupify.graph.plain_layers import CONVS, Conv
from groupify.graph.prepared import batch_sizes
from groupify.kept import Shelf
from groupify.stats.positions import compact, input_patches, pick
from groupify.stats.samples import SiteSamples
from groupify.structures import SiteRecipe

# Output positions, over all images, whose mean and variance a batch norm gets at least.
_NORM_POSITIONS = 65_536


class Clock:
    """Adds up durations by name: where the time of a conversion goes.

    Attributes:
        seconds: duration of each step; parts are named ``"step: part"`` and are in its duration too.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a step."""
        now = time.perf_counter()
        self._add(name, now - self._last)
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a part of a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - start)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def fit_student(
    student: ModelGraph,
    dense: nn.Module,
    batches: Sequence[Call],
    sites: Mapping[str, SiteRecipe],
    samples: Mapping[str, SiteSamples],
    sums: Mapping[str, fx.Node],
    options: FitOptions,
    *,
    clock: Clock,
    metrics: Mapping[str, Tensor] | None = None,
    shelf: Shelf | None = None,
    progress: bool = False,
) -> dict[str, SiteFit]:
    """Fit all sites of ``student`` in place.

    Args:
        student: graph of the model with grouped convs (whose weights are overwritten).
        dense: the dense model with the same channel order.
        batches: calibration images, the same as the teacher saw.
        sites: the converted sites by name.
        samples: what the teacher computed, in the student's channel order; used up.
        sums: site → node of the residual sum that it feeds.
        options: what to do.
        clock: takes the time of the parts.
        metrics: what errors of the outputs of sites cost the model, by name, shapes (O, O).
        shelf: where activations wait; None = in memory.
        progress: show a bar on stderr.
    """
    fitter = _Fitter(student, dense, batches, sites, samples, sums, options, clock, metrics or {}, shelf)
    with torch.no_grad():
        nodes = list(student.graph.nodes)
        for node in tqdm(nodes, desc="fit", disable=None if progress else True, leave=False):
            fitter.process(node)
    return fitter.fits


def is_cheap_to_repeat(graph: ModelGraph, node: fx.Node, *, refreshes: bool) -> bool:
    """Whether only a batch norm or activation reads the node, once, so that keeping it would not pay.

    Args:
        graph: of the model.
        node: the node.
        refreshes: whether refreshing the statistics of a batch norm reads it once more.
    """
    reader = only_reader(node)
    if reader is None or node.op == "placeholder":
        return False
    if graph.norm(reader) is not None:
        return not refreshes
    return effect(reader) is Effect.ELEMENTWISE and len(reader.all_input_nodes) == 1


class _Fitter:
    def __init__(
        self,
        student: ModelGraph,
        dense: nn.Module,
        batches: Sequence[Call],
        sites: Mapping[str, SiteRecipe],
        samples: Mapping[str, SiteSamples],
        sums: Mapping[str, fx.Node],
        options: FitOptions,
        clock: Clock,
        metrics: Mapping[str, Tensor],
        shelf: Shelf | None,
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self._student = student
        self._dense = dense
        self._sites = sites
        self._samples = samples
        self._sums = sums
        self._options = options
        for part in samples.values():
            if options.in_order and part.calls <= 1:  # the patches will be the student's own
                part.patches.clear()
                part.patch_outputs.clear()
        self._run = BatchedRun(student, batches, compact, shelf)
        sizes = batch_sizes(batches)
        self._images = sum(sizes)
        self._held_out = HeldOutImages(sizes)
        self._started: set[fx.Node] = set()
        self._changed: set[fx.Node] = set()
        self._aimed: set[fx.Node] = set()
        self.fits: dict[str, SiteFit] = {}

    def process(self, node: fx.Node) -> None:
        """Fit the node if it is a site, and run it."""
        if self._run.done(node) or node in self._started:
            return
        self._started.add(node)
        name = str(node.target)
        is_site = node.op == "call_module" and name in self._sites
        if is_site or any(source in self._changed for source in node.all_input_nodes):
            self._changed.add(node)
            refits = self._options.refit_dense and self._options.in_order and name in self._samples
            if node.op == "call_module" and name not in self.fits and (is_site or refits):
                self._fit(node, name)
            norm = self._student.norm(node) if self._options.refresh_batch_norm else None
            if norm is not None:
                with self._clock.part("fit: batch norms"):
                    self._refresh(norm, node.all_input_nodes[0])
        refreshes = self._options.refresh_batch_norm and node in self._changed
        with self._clock.part("fit: student forward"):
            self._run.run(node, defer=is_cheap_to_repeat(self._student, node, refreshes=refreshes))

    # one site ----------------------------------------------------------------------------------

    def _fit(self, node: fx.Node, name: str) -> None:
        samples = self._samples[name]
        dense_layer = self._dense.get_submodule(name)
        assert isinstance(dense_layer, (*CONVS, nn.Linear))
        norm = self._batch_norm_behind(node)
        if samples.positions[0].channels_last and samples.positions[0].place:
            norm = None  # its channels are not those of a linear layer that keeps its features last
        other = self._other_term(node, name)
        relu = self._options.relu_iterations > 0 and self._feeds_relu(node, norm, other)
        with self._clock.part("fit: patches and targets"):
            parts = self._parts(node, dense_layer, samples, norm, other, relu)
        if parts[0].target.thresholds is not None:
            self._aimed.add(node)
        module, site = self._student.layer(node), self._sites.get(name)
        with self._clock.part("fit: moments and solve"):
            if site is None:
                refit_layer(module, parts, norm, self._options)
            else:
                assert isinstance(dense_layer, CONVS)
                self.fits[name] = fit_site(
                    module, dense_layer, site, parts, norm, self._options, self._metrics.get(name)
                )
        # Nobody needs them again, and those of a large model take gigabytes.
        for part in (samples.outputs, samples.sums, samples.patches, samples.patch_outputs):
            part.clear()

    def _parts(
        self,
        node: fx.Node,
        layer: Conv | nn.Linear,
        samples: SiteSamples,
        norm: Norm | None,
        other: fx.Node | None,
        relu: bool,
    ) -> list[Part]:
        """What a layer reads and should output, those of held-out images apart."""
        if not self._options.in_order or samples.calls > 1:
            # A conv that runs several times: its later inputs do not exist yet, so the teacher's must do.
            return dense_parts(samples, self._held_out)
        parts = []
        for call, positions in enumerate(samples.positions):
            inputs, target = (
                self._run.stored(node.all_input_nodes[0], call),
                self._target(samples, call, norm, other, relu),
            )
            held_out = self._held_out.rows(positions, call)
            for rows, held in ((~held_out, False), (held_out, True)):
                if bool(rows.any()):
                    patches = input_patches(inputs, layer, positions.subset(rows)).float()
                    parts.append(Part(patches, target.subset(rows), held).solvable())
        return parts

    def _target(
        self,
        samples: SiteSamples,
        call: int,
        norm: Norm | None,
        other: fx.Node | None,
        relu: bool,
    ) -> Target:
        """What the conv should output at the sampled positions of one batch."""
        outputs = samples.outputs[call].float()
        if other is None and not relu:
            return Target(outputs)
        # Behind the conv: y → scale·y + shift, plus the other term of a residual sum.
        scale = torch.ones(outputs.shape[1], device=outputs.device)
        offset = torch.zeros_like(scale)
        if norm is not None:
            scale, offset = norm.affine()
        usable = scale.abs() > 1e-3 * scale.abs().amax()
        scale = torch.where(usable, scale, 1.0)
        if other is not None:
            offset = offset + pick(self._run.value(other, call), samples.positions[call])
            outputs = torch.where(usable, (samples.sums[call].float() - offset) / scale, outputs)
        if not relu:
            return Target(outputs)
        return Target(outputs, (-offset / scale).expand(outputs.shape), torch.sign(scale))

    def _feeds_relu(self, node: fx.Node, norm: Norm | None, other: fx.Node | None) -> bool:
        """Whether a ReLU alone reads the output, behind its batch norm and residual sum."""
        last = node
        if norm is not None:
            last = next(iter(last.users))
        if other is not None:
            last = next(iter(last.users))
        reader = only_reader(last)
        return reader is not None and is_relu(reader)

    def _other_term(self, node: fx.Node, name: str) -> fx.Node | None:
        """The other term of the residual sum behind a site, run first if it can be."""
        if name not in self._sums or not self._options.compensate_residual or not self._has_sums(name):
            return None
        if self._samples[name].calls > 1:
            return None  # the other term may be another call of it, which would be fitted meanwhile
        total = self._sums[name]
        own = next(source for source in total.all_input_nodes if self._reaches(node, source))
        other: fx.Node = next(source for source in total.all_input_nodes if source is not own)
        needed = self._run.requirements(other)
        if any(requirement in self._started for requirement in needed):
            return None  # this site is being waited for by the other term
        for requirement in needed:
            self.process(requirement)
        return other

    def _has_sums(self, name: str) -> bool:
        samples = self._samples[name]
        return bool(samples.sums) and len(samples.sums) == len(samples.positions)

    @staticmethod
    def _reaches(node: fx.Node, target: fx.Node) -> bool:
        return target is node or target in node.users

    def _batch_norm_behind(self, node: fx.Node) -> Norm | None:
        reader = only_reader(node)
        return None if reader is None else self._student.norm(reader)

    def _refresh(self, norm: Norm, source: fx.Node) -> None:
        """Set the statistics of a batch norm to those of the student's own activations.

        Where the fit aimed at a ReLU's input, other statistics would move it off the target: there
        weight and bias make up for them, so that inference stays as it is and training, which uses
        the batch's own statistics, starts from the same function.
        """
        count, total = 0, double(torch.zeros_like(norm.running_mean))
        squares = torch.zeros_like(total)
        for batch in range(self._run.batch_count):
            values = self._thinned(self._run.stored(source, batch)).float()
            others = [dim for dim in range(values.dim()) if dim != 1]
            values = values - norm.running_mean.reshape(-1, *[1] * (values.dim() - 2))
            count += values.numel() // values.shape[1]
            total += values.sum(others).to(total.device)
            squares += values.square().sum(others).to(total.device)
        if count < 2:
            return
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0) * count / (count - 1)
        keeps_function = source in self._aimed
        if keeps_function and (norm.weight is None or norm.bias is None):
            return
        before = norm.affine()
        norm.running_mean.add_(mean.to(norm.running_mean))
        norm.running_var.copy_(variance)
        if keeps_function:
            scale, shift = before
            assert norm.weight is not None
            assert norm.bias is not None
            norm.weight.copy_(scale * torch.sqrt(norm.running_var + norm.eps))
            norm.bias.copy_(shift + scale * norm.running_mean)

    def _thinned(self, values: Tensor) -> Tensor:
        """Every second, third … position of a large map: a mean and a variance need no more of them."""
        dims = values.dim() - 2
        positions = self._images * values.shape[2:].numel()
        step = int((positions / _NORM_POSITIONS) ** (1 / dims)) if dims > 0 else 1
        for dim in range(2, values.dim()) if step > 1 else ():
            values = values[(slice(None),) * dim + (slice(step // 2, None, step),)]
        return values
