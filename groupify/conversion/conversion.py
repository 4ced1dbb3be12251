"""Convert a dense model by a plan: cluster the channels, restructure, fit, reconstruct."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groupify.conversion.by_part import convert_by_part, convert_parts_from_weights
from groupify.conversion.fit import Clock
from groupify.conversion.held_out import overfitting_note
from groupify.conversion.in_order import Calibration, convert_from_weights, convert_in_order
from groupify.conversion.pictures import BlockPicture
from groupify.conversion.site_fit import SiteFit
from groupify.conversion.surgery import restructure
from groupify.conversion.working_copy import take_values, working_copy
from groupify.data.batches import Data
from groupify.devices import device_of
from groupify.errors import ConversionError, GroupifyWarning
from groupify.graph.call import Call, as_call, one_example
from groupify.graph.capture import Captured, capture
from groupify.graph.channels import Channels
from groupify.graph.kept_graph import KeptGraph
from groupify.graph.model_graph import ModelGraph, computes_the_same
from groupify.graph.prepared import PreparedCalls, batch_sizes
from groupify.kept import Shelf
from groupify.models.wrappers import unwrapped
from groupify.structures import Plan, SiteRecipe

__all__ = ["Calibration", "Conversion", "convert"]

_VALUE_DEPENDENT = "its path depends on the values of its input, or on chance"


@dataclass(frozen=True)
class Conversion:
    """A converted model and how it came about.

    Attributes:
        model: the grouped model, each module in the training mode that it had in the dense one.
        sites: the replaced convs.
        fits: how well each was fitted; empty without calibration.
        method: one line on how the weights were found.
        notes: what the reader should know before trusting the model.
        kept_before, kept: share of the clustering score inside the groups, before and after.
        pictures: the convs that gained most from the clustering.
        seconds: duration of each step.
    """

    model: nn.Module
    sites: tuple[SiteRecipe, ...]
    fits: tuple[SiteFit, ...]
    method: str
    notes: tuple[str, ...]
    kept_before: float | None
    kept: float | None
    seconds: Mapping[str, float]
    pictures: tuple[BlockPicture, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return what a recipe keeps of it, as JSON values."""
        return {
            "method": self.method,
            "fitted_error": {fit.name: fit.error for fit in self.fits},
            "kept_before": self.kept_before,
            "kept": self.kept,
        }


def convert(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration | Tensor | Data | None = None,
    *,
    example_inputs: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Conversion:
    """Replace the planned convs by grouped ones and fit their weights.

    Args:
        model: the dense model; it is left untouched.
        plan: what to replace; see ``groupify.plan``.
        calibration: images as a tensor (N, C, H, W), a data set or an iterable of batches, labels unused; or
            a ``Calibration`` to set how they are used. None = from the weights alone, which does not
            protect the accuracy.
        example_inputs: what the model is called with, as for the plan; needed by a model of several inputs
            where there is no ``Calibration`` with ``inputs``.
        seed: seed of everything random.
        progress: show bars on stderr.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3))
        >>> plan = groupify.plan(net, (16, 8, 8), groups=2)
        >>> conversion = groupify.convert(net, plan, torch.randn(64, 16, 8, 8))
        >>> conversion.model[2]
        Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), groups=2)
        >>> [fit.name for fit in conversion.fits]
        ['2']

    Raises:
        ConversionError: the plan is for another model, or weights or activations are NaN or infinite.
        DataError: no calibration images, or NaN in them.
    """
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    sites = plan.recipes
    model = unwrapped(model)
    if calibration is not None:
        calibration.check(plan.input_shape)
    call = _example(model, plan, calibration, example_inputs)
    dense = working_copy(model, call, [site.name for site in sites])
    kept = plan.captured
    if not isinstance(kept, KeptGraph) or not kept.holds_for(model, _float32(call)):
        kept = None
    with torch.random.fork_rng(devices=[]):
        work = _Conversion(dense, sites, calibration, _float32(call), kept, seed, progress)
        limit = None if calibration is None else calibration.limit(device_of(dense))
        with Shelf(limit) as shelf:
            student = work.run(shelf)
    _warn_of_few_samples(work.fits)
    note = overfitting_note({fit.name: fit.held_out for fit in work.fits})
    if note is not None:
        work.notes.append(note)
    return Conversion(
        model=_with_weights(model, sites, student),
        sites=sites,
        fits=work.fits,
        method=work.method,
        notes=tuple(work.notes),
        kept_before=work.kept_before,
        kept=work.kept,
        pictures=work.pictures,
        seconds=work.clock.seconds,
    )


def _example(model: nn.Module, plan: Plan, calibration: Calibration | None, example_inputs: Any) -> Call:
    """Return how the model is called, with two examples; it must be as it was for the plan."""
    if example_inputs is None and calibration is not None and calibration.inputs is not None:
        example_inputs = calibration.calls[0]
    shape = plan.input_shape if example_inputs is None else None
    call = as_call(one_example(shape, example_inputs), model)
    for other in (call, *(calibration.calls[:1] if calibration is not None else ())):
        names = tuple(other.named_tensors(model))
        if plan.inputs and names != plan.inputs and len(names) + len(plan.inputs) != 2:
            raise ConversionError(
                f"the plan was made for a model called with {', '.join(plan.inputs)}, and this conversion "
                f"would call it with {', '.join(names) or 'nothing'}: give the same example_inputs, or a "
                "Calibration with inputs"
            )
    return call


def _float32(call: Call) -> Call:
    return call.floats(Tensor.float)


def _with_weights(model: nn.Module, sites: Sequence[SiteRecipe], student: nn.Module) -> nn.Module:
    """Return a copy of the caller's own model, modes and hooks included, with the student's weights."""
    converted = restructure(model, sites)
    take_values(converted, student)
    return converted


@torch.no_grad()
def _check_student(student: nn.Module, graph: ModelGraph | None, call: Call) -> None:
    """Refuse a converted model whose own code does something else with its convs than the graph says.

    Code may ask a layer for its class, sizes or weight, and those of a replacement are others.

    Raises:
        ConversionError: the model does not run, or gives other outputs than its graph.
    """
    try:
        if graph is None:
            call.head(2).run(student)
        same = graph is None or computes_the_same(student, graph.on(student), call)
    except Exception as raised:
        error = raised.__cause__ or raised
        reason = " ".join(str(error).split()) or "no message"
        raise ConversionError(
            f"the converted model does not run ({type(error).__name__}: {reason}): its code expects a dense "
            "conv where one was replaced; leave that one dense with --exclude"
        ) from error
    if not same:
        raise ConversionError(
            "the converted model does something else than its graph: its code asks a replaced conv for its "
            "class, sizes or weight; leave that one dense with --exclude"
        )


def _warn_of_few_samples(fits: Sequence[SiteFit]) -> None:
    short = [fit for fit in fits if fit.samples < fit.inputs]
    if short:
        first = short[0]
        warnings.warn(
            f"{len(short)} layers have fewer samples than inputs per group ({first.name}: {first.samples} "
            f"for {first.inputs}), so their fit is poor; give more calibration images",
            GroupifyWarning,
            stacklevel=3,
        )


class _Conversion:
    """The steps of one conversion and what they leave behind."""

    def __init__(
        self,
        dense: nn.Module,
        sites: Sequence[SiteRecipe],
        calibration: Calibration | None,
        example: Call,
        kept: KeptGraph | None,
        seed: int,
        progress: bool,
    ) -> None:
        self._dense = dense
        self._sites = {site.name: site for site in sites}
        self._calibration = calibration
        self._example = example
        self._kept = kept
        self._seed = seed
        self._progress = progress
        self.clock = Clock()
        self.fits: tuple[SiteFit, ...] = ()
        self.method = ""
        self.notes: list[str] = []
        self.kept_before: float | None = None
        self.kept: float | None = None
        self.pictures: tuple[BlockPicture, ...] = ()

    def run(self, shelf: Shelf) -> nn.Module:
        """Return the student; activations wait on the shelf."""
        restructure(self._dense, list(self._sites.values()))  # refuses a wrong plan before any work
        if self._calibration is None:
            return self._from_weights()
        calls = self._calibration.calls
        batches = self._batches(calls)
        graph, problem = self._whole(batches)
        self.clock.lap("graph")
        if graph is not None:
            return self._in_order(graph, self._batches(self._equal(graph, calls)), self._calibration, shelf)
        return self._by_part(problem, batches, self._calibration, shelf)

    def _batches(self, calls: Sequence[Call]) -> Sequence[Call]:
        return PreparedCalls(calls, lambda call: _float32(call.on(self._dense)))

    def _whole(self, batches: Sequence[Call]) -> tuple[ModelGraph | None, str]:
        """The graph of the whole model, if it computes the same; else None and why."""
        if self._kept is not None:
            graph, _ = self._checked(Captured(self._kept.graph.on(self._dense), None), batches[0])
            if graph is not None:
                return graph, ""
        return self._checked(capture(self._dense, batches[0].head(2)), batches[0])

    def _checked(self, captured: Captured, batch: Call) -> tuple[ModelGraph | None, str]:
        if captured.graph is not None and not captured.graph.accepts(batch):
            captured = capture(self._dense, batch)  # for the batch size of the calibration only
        graph = captured.graph
        if graph is None:
            return None, captured.problem or ""
        missing = [name for name in self._sites if name not in graph.calls]
        if missing:
            return None, f"{missing[0]!r}: {graph.pinned.get(missing[0], 'it does not run')}"
        if not computes_the_same(self._dense, graph, batch):
            return None, _VALUE_DEPENDENT
        return graph, ""

    def _channels(self, graph: ModelGraph) -> Channels | None:
        """The permutation classes of a graph, if it is the one that was kept."""
        kept = self._kept
        return kept.channels if kept is not None and kept.graph.graph is graph.graph else None

    def _equal(self, graph: ModelGraph, calls: Sequence[Call]) -> list[Call]:
        """The calls that the graph holds for."""
        fitting = [call for call in calls if graph.accepts(call)]
        left_out = sum(batch_sizes(calls)) - sum(batch_sizes(fitting))
        if left_out:
            self.notes.append(
                f"the model can only be exported for a fixed batch size: {left_out} images that do not fill "
                "a batch were left out"
            )
        return fitting

    def _in_order(
        self, graph: ModelGraph, batches: Sequence[Call], calibration: Calibration, shelf: Shelf
    ) -> nn.Module:
        found = convert_in_order(
            self._dense, graph, batches, self._sites, calibration,
            channels=self._channels(graph), seed=self._seed, clock=self.clock, shelf=shelf,
            progress=self._progress,
        )  # fmt: skip
        self.fits, self.kept_before, self.kept = found.fits, found.kept_before, found.kept
        self.pictures = found.pictures
        self.notes.extend(found.notes)
        self.method = f"least squares in order, {calibration.count} unlabelled images"
        steps = calibration.reconstruction.steps
        if steps:
            self.method += f", then {steps} steps of reconstruction for each block"
        _check_student(found.student, graph, batches[0])
        return found.student

    def _by_part(
        self, problem: str, batches: Sequence[Call], calibration: Calibration, shelf: Shelf
    ) -> nn.Module:
        found = convert_by_part(
            self._dense, batches, self._sites, calibration,
            problem=problem, seed=self._seed, clock=self.clock, shelf=shelf, progress=self._progress,
        )  # fmt: skip
        self.fits = found.fits
        self.notes.extend(found.notes)
        self.method = f"least squares by module, {calibration.count} unlabelled images"
        _check_student(found.student, None, batches[0])
        return found.student

    def _from_weights(self) -> nn.Module:
        self.notes.append(
            "no calibration images: accuracy is not protected; give --data or calibration images"
        )
        self.method = "from the weights alone: clustering by weight norm, truncation, corrected batch norms"
        example = self._example
        graph, problem = self._whole([example])
        if graph is None:
            found = convert_parts_from_weights(
                self._dense, example, self._sites, problem=problem, seed=self._seed
            )
            if found.kept is None:
                self.method = "from the weights alone: truncation"
        else:
            channels = self._channels(graph)
            found = convert_from_weights(
                self._dense, graph, example, self._sites, channels=channels, seed=self._seed
            )
        self.notes.extend(found.notes)
        self.kept_before, self.kept = found.kept_before, found.kept
        self.clock.lap("weights")
        _check_student(found.student, graph, example)
        return found.student
