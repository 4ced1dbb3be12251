"""Convert a model that cannot be captured as a whole: its parts in order, the convs outside by module."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from groupify.conversion.fit import Clock
from groupify.conversion.held_out import HeldOutImages
from groupify.conversion.in_order import Calibration, Converted, convert_from_weights, convert_in_order
from groupify.conversion.layer_samples import dense_parts
from groupify.conversion.site_fit import FitOptions, SiteFit, fit_site
from groupify.conversion.surgery import restructure
from groupify.conversion.weights_only import fit_to_weights
from groupify.graph.call import Call
from groupify.graph.model_graph import computes_the_same
from groupify.graph.parts import Part, find_parts, fitting, given_up, part_inputs, shown_names
from groupify.graph.plain_layers import CONVS, conv_of
from groupify.graph.prepared import batch_sizes
from groupify.kept import Shelf
from groupify.stats.samples import SampleBudget, Sampling, SiteSampler
from groupify.structures import SiteRecipe


def convert_by_part(
    dense: nn.Module,
    batches: Sequence[Call],
    sites: Mapping[str, SiteRecipe],
    calibration: Calibration,
    *,
    problem: str,
    seed: int,
    clock: Clock,
    shelf: Shelf,
    progress: bool,
) -> Converted:
    """Convert a model whose graph as a whole is not known.

    Each part is clustered and fitted in order, on what the dense model feeds it: a path that
    depends on values may take the student elsewhere, so that its own inputs would not match.

    Args:
        dense: the dense model, in evaluation mode; left untouched.
        batches: calibration images, float32.
        sites: the convs to replace, by name.
        calibration: how they are used.
        problem: why the model cannot be captured, one line.
        seed: seed of everything random.
        clock: takes the time of the parts.
        shelf: where activations wait.
        progress: show bars on stderr.
    """
    parts = find_parts(dense, sites, batches[0].head(2))
    clock.lap("parts")
    student, done, notes = copy.deepcopy(dense), [], []
    fits = []
    for part, inputs in part_inputs(dense, parts, batches, shelf):
        module = dense.get_submodule(part.name)
        graph = fitting(dense, part, inputs)
        if graph is None or not part.sites or not computes_the_same(module, graph, inputs[0]):
            continue
        found = convert_in_order(
            module, graph, inputs, _inside(part, sites), calibration,
            seed=seed, clock=clock, shelf=shelf, progress=progress,
        )  # fmt: skip
        _set(student, part.name, found.student)
        done.append(part)
        fits += [dataclasses.replace(fit, name=f"{part.name}.{fit.name}") for fit in found.fits]
        notes += [f"{part.name}: {note}" for note in found.notes]
    left = _left(sites, done)
    student = restructure(student, list(left.values()))
    fits += fit_by_module(
        student, dense, batches, left, calibration.budget, calibration.fit,
        seed=seed, shelf=shelf, progress=progress,
        keep={module for part in done for module in student.get_submodule(part.name).modules()},
    )  # fmt: skip
    clock.lap("fit")
    unreached = sites.keys() - {fit.name for fit in fits}
    if unreached:
        notes.append(
            f"no calibration image reaches {shown_names(sorted(unreached))}: converted from the weights alone"
        )
    return Converted(
        student, tuple(fits), (given_up(problem, [part.name for part in done], len(left)), *notes)
    )


def convert_parts_from_weights(
    dense: nn.Module, example: Call, sites: Mapping[str, SiteRecipe], *, problem: str, seed: int
) -> Converted:
    """Convert a model whose graph as a whole is not known without data; args as in ``convert_by_part``."""
    parts = find_parts(dense, sites, example)
    student, done, before, kept = copy.deepcopy(dense), [], 0.0, 0.0
    for part, inputs in part_inputs(dense, parts, [example]):
        module = dense.get_submodule(part.name)
        graph = fitting(dense, part, inputs)
        if graph is None or not part.sites or not computes_the_same(module, graph, inputs[0]):
            continue
        found = convert_from_weights(module, graph, inputs[0], _inside(part, sites), seed=seed)
        _set(student, part.name, found.student)
        done.append(part)
        before += (found.kept_before or 0.0) * len(part.sites)
        kept += (found.kept or 0.0) * len(part.sites)
    left = _left(sites, done)
    student = restructure(student, list(left.values()))
    fit_to_weights(student, dense, left)
    note = given_up(problem, [part.name for part in done], len(left))
    if not done:
        return Converted(student, notes=(note,))
    count = sum(len(part.sites) for part in done)
    return Converted(student, notes=(note,), kept_before=before / count, kept=kept / count)


def _inside(part: Part, sites: Mapping[str, SiteRecipe]) -> dict[str, SiteRecipe]:
    return {name: dataclasses.replace(sites[f"{part.name}.{name}"], name=name) for name in part.sites}


def _left(sites: Mapping[str, SiteRecipe], parts: Sequence[Part]) -> dict[str, SiteRecipe]:
    taken = {f"{part.name}.{name}" for part in parts for name in part.sites}
    return {name: site for name, site in sites.items() if name not in taken}


def _set(model: nn.Module, name: str, replacement: nn.Module) -> None:
    """Put a module in the place of another, under every name that it has."""
    old = model.get_submodule(name)
    for alias, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(parent), attribute, replacement)


def fit_by_module(
    student: nn.Module,
    dense: nn.Module,
    batches: Sequence[Call],
    sites: Mapping[str, SiteRecipe],
    budget: SampleBudget,
    options: FitOptions,
    *,
    seed: int,
    shelf: Shelf | None = None,
    progress: bool = False,
    keep: Container[nn.Module] = (),
) -> tuple[SiteFit, ...]:
    """Fit each conv on the dense model's inputs, then refresh the student's batch norms; in place.

    A conv that no image reaches is converted from its weights alone, and is not in the result.

    Args:
        student: the converted model.
        dense: the dense model.
        batches: calibration images.
        sites: the converted convs by name.
        budget: how many output positions are sampled.
        options: ridge and prior; what needs a graph is left out.
        seed: seed of the positions.
        shelf: where samples wait; None = in memory.
        progress: show a bar on stderr.
        keep: batch norms of the student that are not refreshed.
    """
    layers = {
        name: Sampling(site.structure.separate_fits(conv_of(dense, name).groups))
        for name, site in sites.items()
    }
    sampler = SiteSampler(layers, budget, batches, seed, shelf)
    _sample_by_hooks(dense, batches, sites, sampler, progress)
    held_out = HeldOutImages(batch_sizes(batches))
    fits = []
    with torch.no_grad():
        for name, site in sites.items():
            conv = conv_of(dense, name)
            samples = sampler.samples[name]
            if not samples.patches:
                fit_to_weights(student, dense, {name: site})
                continue
            parts = dense_parts(samples, held_out)
            fits.append(fit_site(student.get_submodule(name), conv, site, parts, None, options))
        if options.refresh_batch_norm:
            refresh_batch_norms(student, batches, keep=keep)
    return tuple(fits)


def _sample_by_hooks(
    dense: nn.Module, batches: Sequence[Call], names: Iterable[str], sampler: SiteSampler, progress: bool
) -> None:
    """Run the dense model over all batches and sample the convs that are reached."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            assert isinstance(module, CONVS)
            inputs = args[0] if args else kwargs["input"]
            if output.numel():
                sampler.sample(name, module, inputs.float(), output.float())

        return hook

    handles = [
        dense.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True) for name in names
    ]
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc="dense model", disable=None if progress else True, leave=False):
                sampler.start_batch(batch.batch_size)
                batch.run(dense)
    finally:
        for handle in handles:
            handle.remove()


def refresh_batch_norms(
    model: nn.Module, batches: Sequence[Call | Tensor], *, keep: Container[nn.Module] = ()
) -> None:
    """Replace the statistics of every batch norm by their average over the batches, in place.

    Those in ``keep``, and those that no batch reaches, stay as they are.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and m not in keep
    ]
    statistics = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        for call in map(Call.of, batches):
            if call.batch_size > 1:
                call.run_for_good(model)
    for norm, (training, momentum), buffers in zip(norms, before, statistics, strict=True):
        norm.momentum = momentum
        norm.train(training)
        if norm.num_batches_tracked == 0:
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
