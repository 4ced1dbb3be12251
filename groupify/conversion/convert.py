"""Convert a dense model by a plan: cluster the channels, restructure, fit, reconstruct."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from groupify.conversion.by_module import fit_by_module
from groupify.conversion.clock import Clock
from groupify.conversion.clustering import SiteScore, cluster
from groupify.conversion.fit import fit_student
from groupify.conversion.reconstruct import ReconstructionOptions, reconstruct
from groupify.conversion.scores import data_score, fitted_error, norm_score, permuted_samples
from groupify.conversion.site_fit import FitOptions, SiteFit
from groupify.conversion.surgery import SiteRecipe, restructure
from groupify.conversion.teacher import SampleBudget, SiteSamples, observe_teacher, refittable, residual_sums
from groupify.conversion.weights_only import correct_batch_norms
from groupify.errors import ConversionError, DataError, GroupifyWarning
from groupify.graph.channels import Channels, channel_classes
from groupify.graph.permute import apply_orders
from groupify.graph.trace import example_input, on_same_graph, trace
from groupify.planning.plan import Plan

CLUSTERINGS = ("data", "norm", "none")


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images and how to use them.

    Attributes:
        images: shape (N, C, H, W), preprocessed as for inference and not augmented: augmented views
            made the fit worse (by up to 0.7 points on Fashion-MNIST).
        batch_size: images per step.
        clustering: what decides which channels form a group: ``"data"``, ``"norm"`` (weights
            alone) or ``"none"``.
        restarts: random starts of the clustering besides the given order.
        fit: options of the least-squares fit.
        budget: how many output positions are sampled for it.
        reconstruction: training of each block on the dense model's activations, after the fit.
    """

    images: Tensor
    batch_size: int = 64
    clustering: str = "data"
    restarts: int = 2
    fit: FitOptions = field(default_factory=FitOptions)
    budget: SampleBudget = field(default_factory=SampleBudget)
    reconstruction: ReconstructionOptions = field(default_factory=ReconstructionOptions)


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
    calibration: Calibration | Tensor | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Conversion:
    """Replace the planned convs by grouped ones and fit their weights.

    Args:
        model: the dense model; it is left untouched.
        plan: what to replace; see ``groupify.plan``.
        calibration: unlabelled images of shape (N, C, H, W), or a ``Calibration`` to set how they are
            used. None = from the weights alone, which does not protect the accuracy.
        seed: seed of everything random.
        progress: show bars on stderr.

    Raises:
        ConversionError: the plan is for another model, or weights or activations are NaN or infinite.
        DataError: no calibration images, or NaN in them.
    """
    if isinstance(calibration, Tensor):
        calibration = Calibration(calibration)
    sites = plan.recipes
    _check_weights(model)
    if calibration is not None:
        _check_calibration(calibration, plan.input_shape)
    # A working copy: in float32, without the caller's hooks, in the memory format of oneDNN's fast path.
    dense = _in_fast_layout(copy.deepcopy(model).float().eval())
    for module in dense.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
    with torch.random.fork_rng(devices=[]):
        work = _Conversion(dense, sites, calibration, plan, seed, progress)
        student = work.run()
    _warn_of_few_samples(work.fits)
    return Conversion(
        model=_with_weights(model, sites, student),
        sites=sites,
        fits=work.fits,
        method=work.method,
        notes=tuple(work.notes),
        kept_before=work.kept_before,
        kept=work.kept,
        seconds=work.clock.seconds,
    )


def _with_weights(model: nn.Module, sites: Sequence[SiteRecipe], student: nn.Module) -> nn.Module:
    """Return a copy of the caller's own model, modes and hooks included, with the student's weights."""
    converted = restructure(model, sites)
    converted.load_state_dict(student.state_dict())
    return converted


def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_complex():
            raise ConversionError(f"{name!r} is complex; complex models cannot be converted")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConversionError(f"{name!r} holds NaN or infinity; load a sound checkpoint")


def _in_fast_layout(model: nn.Module) -> nn.Module:
    if any(parameter.dim() == 5 for parameter in model.parameters()):
        return model  # torch refuses to lay out a model with 3-d convs like images
    return model.to(memory_format=torch.channels_last)


def _check_calibration(calibration: Calibration, input_shape: tuple[int, ...]) -> None:
    images = calibration.images
    if images.dim() != len(input_shape) + 1 or len(images) == 0:
        shape = "(N, C, H, W)" if len(input_shape) == 3 else f"(N, {', '.join(map(str, input_shape))})"
        raise DataError(f"calibration images of shape {tuple(images.shape)}, expected {shape} with N ≥ 1")
    if not images.is_floating_point():
        raise DataError(
            f"calibration images of type {images.dtype}, expected floating point, preprocessed as for "
            "inference"
        )
    if not bool(torch.isfinite(images).all()):
        raise DataError("the calibration images hold NaN or infinity; check their preprocessing")
    if calibration.clustering not in CLUSTERINGS:
        known = ", ".join(CLUSTERINGS)
        raise ConversionError(f"unknown clustering {calibration.clustering!r}, expected one of {known}")


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
        plan: Plan,
        seed: int,
        progress: bool,
    ) -> None:
        self._dense = dense
        self._sites = {site.name: site for site in sites}
        self._calibration = calibration
        self._plan = plan
        self._seed = seed
        self._progress = progress
        self.clock = Clock()
        self.fits: tuple[SiteFit, ...] = ()
        self.method = ""
        self.notes: list[str] = []
        self.kept_before: float | None = None
        self.kept: float | None = None

    def run(self) -> nn.Module:
        """Return the student."""
        restructure(self._dense, list(self._sites.values()))  # refuses a wrong plan before any work
        traced = trace(self._dense)
        self.clock.lap("trace")
        if self._calibration is None:
            return self._from_weights(traced.module)
        if traced.module is None:
            self.notes.append(
                f"the model cannot be traced ({traced.problem}): channels were not clustered, and each conv "
                "was fitted on the dense model's inputs, not in order"
            )
            self.method = f"least squares by module, {len(self._calibration.images)} unlabelled images"
            student = restructure(self._dense, list(self._sites.values()))
            batches = self._batches(self._calibration)
            self.fits = fit_by_module(
                student, self._dense, batches, self._sites, self._calibration.budget, self._calibration.fit,
                seed=self._seed, progress=self._progress,
            )  # fmt: skip
            self.clock.lap("fit")
            return student
        return self._in_order(traced.module, self._calibration)

    # with images -------------------------------------------------------------------------------

    def _batches(self, calibration: Calibration) -> list[Tensor]:
        parameter = next(self._dense.parameters())
        batches = calibration.images.to(parameter.device).float().split(calibration.batch_size)
        if calibration.images.dim() != 4:
            return list(batches)
        return [batch.contiguous(memory_format=torch.channels_last) for batch in batches]

    def _in_order(self, traced: fx.GraphModule, calibration: Calibration) -> nn.Module:
        batches = self._batches(calibration)
        self._check_trace(traced, batches[0])
        sums = residual_sums(traced, self._sites)
        groups = {name: site.groups for name, site in self._sites.items()}
        if calibration.fit.refit_dense:
            groups |= dict.fromkeys(refittable(traced, self._sites, calibration.fit.refit_max_inputs), 1)
            sums = residual_sums(traced, groups)
        samples = observe_teacher(
            traced, batches, groups, sums, calibration.budget, seed=self._seed, progress=self._progress
        )
        self.clock.lap("dense model")
        dense = self._dense
        if calibration.clustering != "none":
            dense = self._cluster(traced, batches[0][:1], samples, calibration)
        student = restructure(dense, list(self._sites.values()))
        graph = on_same_graph(traced, student)
        names = {str(conv.target): total.name for conv, total in sums.items()}
        fits = fit_student(
            graph,
            dense,
            batches,
            self._sites,
            samples,
            names,
            calibration.fit,
            clock=self.clock,
            progress=self._progress,
        )
        self.fits = tuple(fits.values())
        self.clock.lap("fit")
        del samples, batches
        self.method = f"least squares in order, {len(calibration.images)} unlabelled images"
        options = calibration.reconstruction
        if options.steps:
            reconstruct(
                graph, on_same_graph(traced, dense), calibration.images.float(), self._sites, options,
                seed=self._seed, progress=self._progress,
            )  # fmt: skip
            self.method += f", then {options.steps} steps of reconstruction for each block"
            self.clock.lap("reconstruction")
        return student

    def _check_trace(self, traced: fx.GraphModule, batch: Tensor) -> None:
        if not _same_outputs(self._dense, traced, batch[:1]):
            raise ConversionError(
                "the traced graph computes something else than the model, whose path must depend on the "
                "values of its input; convert its traceable submodules one by one"
            )

    def _cluster(
        self,
        traced: fx.GraphModule,
        example: Tensor,
        samples: dict[str, SiteSamples],
        calibration: Calibration,
    ) -> nn.Module:
        """Reorder the channels, of the samples too, if that lowers the fitted error."""
        channels = channel_classes(traced, example)
        self.clock.lap("graph")
        scores = []
        for name, site in self._sites.items():
            conv = self._dense.get_submodule(name)
            if calibration.clustering == "norm":
                scores.append(SiteScore(site, norm_score(conv)))
            else:
                scores.append(SiteScore(site, data_score(conv, samples[name])))
        found = cluster(channels, scores, restarts=calibration.restarts, seed=self._seed)
        before = sum(fitted_error(site, samples[name]) for name, site in self._sites.items())
        _permute_samples(samples, channels, found.orders)
        after = sum(fitted_error(site, samples[name]) for name, site in self._sites.items())
        permuted = apply_orders(self._dense, channels, found.orders)
        self.kept_before, self.kept = found.kept_before, found.kept
        if after < before and _same_outputs(self._dense, permuted, example):
            self.clock.lap("clustering")
            return permuted
        if after < before:
            self.notes.append("reordered channels would change the outputs; the channels keep their order")
        else:
            self.notes.append(
                "clustering would not have lowered the fitted error; the channels keep their order"
            )
        self.kept = found.kept_before
        _permute_samples(samples, channels, {i: torch.argsort(order) for i, order in found.orders.items()})
        self.clock.lap("clustering")
        return self._dense

    # without images ----------------------------------------------------------------------------

    def _from_weights(self, traced: fx.GraphModule | None) -> nn.Module:
        self.notes.append(
            "no calibration images: accuracy is not protected; give --data or calibration images"
        )
        self.method = "from the weights alone: clustering by weight norm, truncation, corrected batch norms"
        sites = list(self._sites.values())
        if traced is None:
            self.method = "from the weights alone: truncation"
            return restructure(self._dense, sites)
        example = example_input(self._plan.input_shape, like=self._dense)
        channels = channel_classes(traced, example)
        scores = [SiteScore(site, norm_score(self._dense.get_submodule(site.name))) for site in sites]
        found = cluster(channels, scores, restarts=0, seed=self._seed)
        self.kept_before, self.kept = found.kept_before, found.kept
        dense = apply_orders(self._dense, channels, found.orders)
        student = restructure(dense, sites)
        correct_batch_norms(on_same_graph(traced, student), dense, self._sites)
        self.clock.lap("weights")
        return student


def _permute_samples(
    samples: dict[str, SiteSamples], channels: Channels, orders: Mapping[int, Tensor]
) -> None:
    for name in samples:  # one after the other: all at once would need the memory twice
        samples[name] = permuted_samples(samples[name], name, channels, orders)


@torch.no_grad()
def _same_outputs(model: nn.Module, other: nn.Module, example: Tensor) -> bool:
    for a, b in zip(_leaves(model(example)), _leaves(other(example)), strict=True):
        scale = float(torch.nan_to_num(a, nan=0.0, posinf=0.0, neginf=0.0).abs().amax())
        # An overflow, which is reported later, is no difference.
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, scale), equal_nan=True):
            return False
    return True


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
