"""Convert a model by its graph: cluster its channels, restructure, fit in the order in which convs run."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from groupify.conversion.clustering import SiteScore, cluster
from groupify.conversion.fit import Clock, fit_student
from groupify.conversion.pictures import BlockPicture, block_pictures
from groupify.conversion.reconstruct import ReconstructionOptions, reconstruct
from groupify.conversion.site_fit import FitOptions, SiteFit
from groupify.conversion.surgery import conv_shape, restructure
from groupify.conversion.waiting import waiting_bytes
from groupify.conversion.weights_only import fit_from_statistics
from groupify.conversion.working_copy import take_values
from groupify.data.calibration import calibration_inputs
from groupify.data.calls import Inputs, calibration_calls
from groupify.errors import ConversionError, DataError
from groupify.graph.call import Call
from groupify.graph.channels import Channels, channel_classes
from groupify.graph.copying import copy_of
from groupify.graph.forward import same_outputs
from groupify.graph.model_graph import ModelGraph
from groupify.graph.neighbours import refittable, residual_sums
from groupify.graph.permute import apply_orders, input_factors, layer_orders
from groupify.graph.plain_layers import Conv, conv_of
from groupify.graph.prepared import PreparedCalls, batch_sizes
from groupify.kept import Shelf
from groupify.memory import default_limit, parse_bytes, show_bytes
from groupify.stats.flow import fitted_error, norm_score, sampled_score
from groupify.stats.output_metrics import output_metrics
from groupify.stats.samples import SampleBudget, Sampling, SiteSamples, observe_teacher
from groupify.structures import SiteRecipe

CLUSTERINGS = ("data", "norm", "none")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images and how to use them.

    Attributes:
        images: a tensor (N, C, H, W), a data set, or an iterable of batches such as a ``DataLoader``, which
            is read once and becomes a tensor; preprocessed as for inference and not augmented: augmented
            views made the fit worse (by up to 0.7 points on Fashion-MNIST). Labels are not looked at.
        inputs: for a model that takes more than images, a batch, as the data gives it, → positional and
            keyword arguments. ``images`` may then be data whose samples have any form; what the function
            gives is kept in memory.
        batch_size: images per step.
        clustering: what decides which channels form a group: ``"data"``, ``"norm"`` (weights
            alone) or ``"none"``.
        restarts: random starts of the clustering besides the given order.
        memory: bytes, or a text like ``"2GiB"``, that activations take which wait for later; those that
            would be more wait on disk, in the folder of ``TMPDIR``. None = half of what is free on the
            model's device. What a single batch or layer needs while it is worked on comes on top.
        fit: options of the least-squares fit.
        budget: how many output positions are sampled for it.
        reconstruction: training of each block on the dense model's activations, after the fit.
    """

    images: Any
    inputs: Inputs | None = field(default=None, kw_only=True)
    memory: int | str | None = field(default=None, kw_only=True)
    batch_size: int = 64
    clustering: str = "data"
    restarts: int = 1
    fit: FitOptions = field(default_factory=FitOptions)
    budget: SampleBudget = field(default_factory=SampleBudget)
    reconstruction: ReconstructionOptions = field(default_factory=ReconstructionOptions)

    def __post_init__(self) -> None:
        if self.inputs is None:
            images: Any = calibration_inputs(self.images)
        else:
            images = calibration_calls(self.images, self.inputs, self.batch_size)
        object.__setattr__(self, "images", images)
        if isinstance(self.memory, str):
            object.__setattr__(self, "memory", parse_bytes(self.memory))
        elif self.memory is not None and self.memory < 0:
            raise ConversionError(f"memory is {self.memory}: expected bytes from 0, or a text like '2GiB'")

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images) if self.inputs is None else sum(call.batch_size for call in self.images)

    @property
    def calls(self) -> list[Call]:
        """What the model is called with, batch by batch."""
        if self.inputs is not None:
            return list(self.images)
        return [Call((batch,)) for batch in self.images.split(self.batch_size)]

    def limit(self, device: torch.device) -> int:
        """Return the bytes that may wait in memory for a model on a device."""
        assert not isinstance(self.memory, str)
        return default_limit(device) if self.memory is None else self.memory

    def check(self, input_shape: tuple[int, ...]) -> None:
        """Refuse images that no model of that input shape can be calibrated with.

        Raises:
            DataError: no images, or not of that shape or type, or NaN in them.
            ConversionError: an unknown clustering.
        """
        if self.clustering not in CLUSTERINGS:
            known = ", ".join(CLUSTERINGS)
            raise ConversionError(f"unknown clustering {self.clustering!r}, expected one of {known}")
        if self.inputs is None:
            _check_images(self.images, input_shape)
            return
        for call in self.calls:
            if not call.tensors or call.tensors[0].dim() != len(input_shape) + 1:
                raise DataError(
                    f"inputs gave {call.shapes()} for a batch, where the plan was made with a first input of "
                    f"shape (N, {', '.join(map(str, input_shape))}): call the model as for the plan"
                )


def _check_images(images: Tensor, input_shape: tuple[int, ...]) -> None:
    if images.dim() != len(input_shape) + 1 or len(images) == 0:
        shape = "(N, C, H, W)" if len(input_shape) == 3 else f"(N, {', '.join(map(str, input_shape))})"
        raise DataError(f"calibration images of shape {tuple(images.shape)}, expected {shape} with N ≥ 1")
    if not images.is_floating_point():
        raise DataError(
            f"calibration images of type {images.dtype}, expected floating point, preprocessed as for "
            "inference"
        )
    if not bool(images.isfinite().all()):
        raise DataError("the calibration images hold NaN or infinity; check their preprocessing")


@dataclass(frozen=True)
class Converted:
    """A converted module whose graph is known.

    Attributes:
        student: the converted module.
        fits: how well each conv was fitted.
        notes: what the reader should know.
        kept_before, kept: share of the clustering score inside the groups, before and after.
        pictures: the convs that gained most from the clustering.
    """

    student: nn.Module
    fits: tuple[SiteFit, ...] = ()
    notes: tuple[str, ...] = ()
    kept_before: float | None = None
    kept: float | None = None
    pictures: tuple[BlockPicture, ...] = ()


def convert_in_order(
    dense: nn.Module,
    graph: ModelGraph,
    batches: Sequence[Call],
    sites: Mapping[str, SiteRecipe],
    calibration: Calibration,
    *,
    channels: Channels | None = None,
    seed: int,
    clock: Clock,
    shelf: Shelf | None = None,
    progress: bool,
) -> Converted:
    """Convert a module whose graph is known by its inputs.

    Args:
        dense: the dense module, in evaluation mode; left untouched.
        graph: its graph.
        batches: what it is fed, float32.
        sites: the convs to replace, by name.
        calibration: how the inputs are used.
        channels: the permutation classes; None = they are found out.
        seed: seed of everything random.
        clock: takes the time of the parts.
        shelf: where activations wait; None = in memory.
        progress: show bars on stderr.
    """
    batches, shelf = PreparedCalls(batches, Call.channels_last), shelf or Shelf()
    layers = _sampled(dense, graph, sites, calibration)
    sums = residual_sums(graph, layers)
    _tell_memory(graph, batches, layers, calibration, shelf)
    samples = observe_teacher(
        graph, batches, layers, sums, calibration.budget, seed=seed, shelf=shelf, progress=progress
    )
    clock.lap("dense model")
    found = Converted(dense)
    if calibration.clustering != "none" and _ordered(dense, sites):
        example = batches[0] if graph.batch is not None else batches[0].head(2)
        channels = channels or channel_classes(graph, example)
        clock.lap("graph")
        found = _clustered(dense, channels, example, samples, sites, calibration, seed, clock)
    metrics, problem = _metrics(found.student, batches, sites, calibration.fit, seed)
    clock.lap("output metrics")
    student = restructure(found.student, list(sites.values()))
    worked_on = _in_fast_layout(student)
    totals = {str(conv.target): total for conv, total in sums.items()}
    fits = fit_student(
        graph.on(worked_on), found.student, batches, sites, samples, totals, calibration.fit,
        clock=clock, metrics=metrics, shelf=shelf, progress=progress,
    )  # fmt: skip
    clock.lap("fit")
    del samples
    notes = (*found.notes, *problem)
    options = calibration.reconstruction
    if options.steps and _are_images_of_one_size(batches):
        reconstruct(
            graph.on(worked_on), graph.on(found.student), batches, sites, options,
            seed=seed, shelf=shelf, progress=progress,
        )  # fmt: skip
        clock.lap("reconstruction")
    elif options.steps:
        notes = (*notes, "several inputs, or of several sizes: no block reconstruction")
    take_values(student, worked_on)
    return replace(found, student=student, fits=tuple(fits.values()), notes=notes)


def _metrics(
    dense: nn.Module,
    batches: Sequence[Call],
    sites: Mapping[str, SiteRecipe],
    options: FitOptions,
    seed: int,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What errors of the outputs cost the model, where factors are fitted; or why that is not known."""
    names = [name for name, site in sites.items() if not site.structure.is_one_conv]
    if not options.metric or not names:
        return {}, ()
    try:
        return output_metrics(dense, batches, names, task=options.task, seed=seed), ()
    except RuntimeError as error:  # PyTorch's, from any operator
        reason = " ".join(str(error).split())
        note = (
            f"the model cannot be differentiated ({reason}): outputs of a conv weigh as its batch norm says"
        )
        return {}, (note,)


def _tell_memory(
    graph: ModelGraph,
    batches: Sequence[Call],
    layers: Mapping[str, Sampling],
    calibration: Calibration,
    shelf: Shelf,
) -> None:
    """Say about how much memory activations will take, and where they go that are too many."""
    if not _log.isEnabledFor(logging.INFO):
        return
    needed = waiting_bytes(graph, batches, layers, calibration.budget, calibration.fit)
    line = f"memory: activations of {sum(batch_sizes(batches))} images take about {show_bytes(needed)}"
    if shelf.limit is not None and needed > shelf.limit:
        line += f"; beyond {show_bytes(shelf.limit)} they wait in {tempfile.gettempdir()} (--memory, TMPDIR)"
    _log.info(line, extra={"once": "memory"})


def _sampled(
    dense: nn.Module, graph: ModelGraph, sites: Mapping[str, SiteRecipe], calibration: Calibration
) -> dict[str, Sampling]:
    """What to sample: the sites, and the dense layers that will be fitted again."""
    layers: dict[str, Sampling] = {}
    if calibration.fit.refit_dense:
        refitted = refittable(graph, sites, calibration.fit.refit_max_inputs)
        layers |= dict.fromkeys(refitted, Sampling(1, patches=False))
    for name, site in sites.items():
        conv, calls = conv_of(dense, name), graph.calls[name]
        clustered = calibration.clustering != "none" and site.structure.minds_order(conv_shape(conv))
        patches = clustered or calls > 1 or not calibration.fit.in_order
        layers[name] = Sampling(site.structure.separate_fits(conv.groups), patches)
    return layers


def _in_fast_layout(student: nn.Module) -> nn.Module:
    """A copy with weights laid out like images, for oneDNN; only its graph runs, which no layout confuses."""
    copied = copy_of(student)
    if any(parameter.dim() == 5 for parameter in copied.parameters()):
        return copied  # torch refuses to lay out a model with 3-d convs like images
    return copied.to(memory_format=torch.channels_last)


def _are_images_of_one_size(batches: Sequence[Call]) -> bool:
    tensors = [batch.tensors for batch in batches]
    return all(len(found) == 1 for found in tensors) and len({found[0].shape[1:] for found in tensors}) == 1


def _contiguous(call: Call) -> Call:
    return call.map(Tensor.contiguous)


def convert_from_weights(
    dense: nn.Module,
    graph: ModelGraph,
    example: Call,
    sites: Mapping[str, SiteRecipe],
    *,
    channels: Channels | None = None,
    seed: int,
) -> Converted:
    """Convert a module without data: cluster by weight norm, truncate, correct the batch norms.

    Args:
        dense: the dense module, in evaluation mode; left untouched.
        graph: its graph.
        example: one batch.
        sites: the convs to replace, by name.
        channels: the permutation classes; None = they are found out.
        seed: seed of the clustering.
    """
    channels = channels or channel_classes(graph, example)
    scores = [_score(site, conv_of(dense, name)) for name, site in _ordered(dense, sites).items()]
    found = cluster(channels, scores, restarts=0, seed=seed)
    permuted = apply_orders(dense, channels, found.orders)
    student = restructure(permuted, list(sites.values()))
    fit_from_statistics(graph.on(student), permuted, sites)
    return Converted(student, kept_before=found.kept_before, kept=found.kept)


def _clustered(
    dense: nn.Module,
    channels: Channels,
    example: Call,
    samples: dict[str, SiteSamples],
    sites: Mapping[str, SiteRecipe],
    calibration: Calibration,
    seed: int,
    clock: Clock,
) -> Converted:
    """Reorder the channels, of the samples too, if that lowers the fitted error."""
    scores = []
    ordered = _ordered(dense, sites)
    for name, site in ordered.items():
        shown = None if calibration.clustering == "norm" else samples[name]
        scores.append(_score(site, conv_of(dense, name), shown))
    found = cluster(channels, scores, restarts=calibration.restarts, seed=seed)
    orders = found.orders
    before = sum(fitted_error(site, samples[name], conv_of(dense, name)) for name, site in ordered.items())
    _permute_samples(samples, channels, orders)
    permuted = apply_orders(dense, channels, orders)
    after = sum(fitted_error(site, samples[name], conv_of(permuted, name)) for name, site in ordered.items())
    if after < before and same_outputs(dense, permuted, _contiguous(example)):
        clock.lap("clustering")
        pictures = block_pictures(scores, channels, orders)
        return Converted(permuted, kept_before=found.kept_before, kept=found.kept, pictures=pictures)
    if after < before:
        note = "reordered channels would change the outputs; the channels keep their order"
    else:
        note = "another order of the channels would not have brought the outputs nearer; they keep theirs"
    _permute_samples(samples, channels, {i: torch.argsort(order) for i, order in orders.items()})
    clock.lap("clustering")
    return Converted(dense, notes=(note,), kept_before=found.kept_before, kept=found.kept_before)


def _score(site: SiteRecipe, conv: Conv, samples: SiteSamples | None = None) -> SiteScore:
    """What decides the groups of a site: samples of it, or the weights alone."""
    score = norm_score(conv) if samples is None else sampled_score(conv, samples)
    return SiteScore.of(site, score, conv.weight)


def _ordered(dense: nn.Module, sites: Mapping[str, SiteRecipe]) -> dict[str, SiteRecipe]:
    """The sites to which it matters which channels stand together."""
    return {
        name: site
        for name, site in sites.items()
        if site.structure.minds_order(conv_shape(conv_of(dense, name)))
    }


def _permute_samples(
    samples: dict[str, SiteSamples], channels: Channels, orders: Mapping[int, Tensor]
) -> None:
    for name in samples:  # one after the other: all at once would need the memory twice
        permuted = samples[name].permuted(*layer_orders(name, channels, orders))
        samples[name] = permuted.scaled(input_factors(name, channels, orders))
