"""Convert a dense model by a plan: cluster the channels, restructure, fit, reconstruct."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from groupify.conversion.by_part import convert_by_part, convert_parts_from_weights
from groupify.conversion.fit import Clock
from groupify.conversion.in_order import Calibration, convert_from_weights, convert_in_order
from groupify.conversion.pictures import BlockPicture
from groupify.conversion.site_fit import SiteFit
from groupify.conversion.surgery import restructure
from groupify.errors import ConversionError, GroupifyWarning
from groupify.graph.forward import equal_outputs, same_outputs
from groupify.graph.trace import example_input, trace
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
    if isinstance(calibration, Tensor):
        calibration = Calibration(calibration)
    sites = plan.recipes
    _check_weights(model)
    if calibration is not None:
        calibration.check(plan.input_shape)
    # A working copy: in float32, without the caller's hooks, in the memory format of oneDNN's fast path.
    dense = _in_fast_layout(copy.deepcopy(model).float().eval())
    _clear_hooks(dense, plan.input_shape)
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
        pictures=work.pictures,
        seconds=work.clock.seconds,
    )


def _with_weights(model: nn.Module, sites: Sequence[SiteRecipe], student: nn.Module) -> nn.Module:
    """Return a copy of the caller's own model, modes and hooks included, with the student's weights."""
    converted = restructure(model, sites)
    converted.load_state_dict(student.state_dict())
    return converted


def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ConversionError(
                f"{name!r} belongs to a lazy layer that does not know its sizes yet: run the model once on "
                "an input, then convert it"
            )
        if tensor.is_meta:
            raise ConversionError(f"{name!r} is on the meta device and has no values: load the weights first")
        if tensor.is_complex():
            raise ConversionError(f"{name!r} is complex; complex models cannot be converted")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConversionError(f"{name!r} holds NaN or infinity; load a sound checkpoint")


def _clear_hooks(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Remove the caller's hooks, unless the outputs depend on them."""
    hooks: MutableMapping[int, Any]
    found: list[tuple[MutableMapping[int, Any], dict[int, Any]]] = []
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            if any(_is_foreign(hook) for hook in hooks.values()):
                found.append((hooks, dict(hooks)))
    if not found:
        return
    example = example_input(input_shape, like=model)
    with torch.no_grad():
        expected = model(example.clone())
        for hooks, before in found:
            for key in [key for key, hook in before.items() if _is_foreign(hook)]:
                del hooks[key]
        try:
            needed = not equal_outputs(expected, model(example.clone()))
        except Exception:  # Hugging Face's models collect hidden states in hooks of their own
            needed = True
    if needed:
        for hooks, before in found:
            hooks.clear()
            hooks.update(before)


def _is_foreign(hook: object) -> bool:
    # Those of torch itself compute the weight (weight_norm, spectral_norm, pruning).
    return not type(hook).__module__.startswith("torch.nn.utils")


def _in_fast_layout(model: nn.Module) -> nn.Module:
    if any(parameter.dim() == 5 for parameter in model.parameters()):
        return model  # torch refuses to lay out a model with 3-d convs like images
    return model.to(memory_format=torch.channels_last)


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
        self.pictures: tuple[BlockPicture, ...] = ()

    def run(self) -> nn.Module:
        """Return the student."""
        restructure(self._dense, list(self._sites.values()))  # refuses a wrong plan before any work
        traced = trace(self._dense)
        self.clock.lap("trace")
        if self._calibration is None:
            return self._from_weights(traced.module, traced.problem)
        batches = self._batches(self._calibration)
        problem = traced.problem
        if traced.module is not None:
            if same_outputs(self._dense, traced.module, batches[0][:1]):
                return self._in_order(traced.module, batches, self._calibration)
            problem = _VALUE_DEPENDENT
        return self._by_part(problem or "", batches, self._calibration)

    def _batches(self, calibration: Calibration) -> list[Tensor]:
        parameter = next(self._dense.parameters())
        batches = calibration.images.to(parameter.device).float().split(calibration.batch_size)
        if calibration.images.dim() != 4:
            return list(batches)
        return [batch.contiguous(memory_format=torch.channels_last) for batch in batches]

    def _in_order(self, traced: fx.GraphModule, batches: list[Tensor], calibration: Calibration) -> nn.Module:
        found = convert_in_order(
            self._dense, traced, batches, self._sites, calibration,
            seed=self._seed, clock=self.clock, progress=self._progress,
        )  # fmt: skip
        self.fits, self.kept_before, self.kept = found.fits, found.kept_before, found.kept
        self.pictures = found.pictures
        self.notes.extend(found.notes)
        self.method = f"least squares in order, {len(calibration.images)} unlabelled images"
        steps = calibration.reconstruction.steps
        if steps:
            self.method += f", then {steps} steps of reconstruction for each block"
        return found.student

    def _by_part(self, problem: str, batches: list[Tensor], calibration: Calibration) -> nn.Module:
        found = convert_by_part(
            self._dense, batches, self._sites, calibration,
            problem=problem, seed=self._seed, clock=self.clock, progress=self._progress,
        )  # fmt: skip
        self.fits = found.fits
        self.notes.extend(found.notes)
        self.method = f"least squares by module, {len(calibration.images)} unlabelled images"
        return found.student

    def _from_weights(self, traced: fx.GraphModule | None, problem: str | None) -> nn.Module:
        self.notes.append(
            "no calibration images: accuracy is not protected; give --data or calibration images"
        )
        self.method = "from the weights alone: clustering by weight norm, truncation, corrected batch norms"
        example = example_input(self._plan.input_shape, like=self._dense)
        if traced is not None and not same_outputs(self._dense, traced, example):
            traced, problem = None, _VALUE_DEPENDENT
        if traced is None:
            found = convert_parts_from_weights(
                self._dense, example, self._sites, problem=problem or "", seed=self._seed
            )
            if found.kept is None:
                self.method = "from the weights alone: truncation"
        else:
            found = convert_from_weights(self._dense, traced, example, self._sites, seed=self._seed)
        self.notes.extend(found.notes)
        self.kept_before, self.kept = found.kept_before, found.kept
        self.clock.lap("weights")
        return found.student
