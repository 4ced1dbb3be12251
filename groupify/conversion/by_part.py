"""Convert a model that cannot be traced: its traceable parts in order, the convs outside by module."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from groupify.conversion.by_module import fit_by_module
from groupify.conversion.calibration import Calibration
from groupify.conversion.clock import Clock
from groupify.conversion.in_order import (
    TracedConversion,
    convert_from_weights,
    convert_in_order,
    same_outputs,
)
from groupify.conversion.surgery import restructure
from groupify.graph.parts import Part, find_parts, given_up, part_inputs, shown_names
from groupify.structures import SiteRecipe


def convert_by_part(
    dense: nn.Module,
    batches: Sequence[Tensor],
    sites: Mapping[str, SiteRecipe],
    calibration: Calibration,
    *,
    problem: str,
    seed: int,
    clock: Clock,
    progress: bool,
) -> TracedConversion:
    """Convert a model whose graph as a whole is not known.

    Each traceable part is clustered and fitted in order, on what the dense model feeds it: a path that
    depends on values may take the student elsewhere, so that its own inputs would not match.

    Args:
        dense: the dense model, in evaluation mode; left untouched.
        batches: calibration images, float32.
        sites: the convs to replace, by name.
        calibration: how they are used.
        problem: why the model cannot be traced, one line.
        seed: seed of everything random.
        clock: takes the time of the parts.
        progress: show bars on stderr.
    """
    parts = find_parts(dense, sites, batches[0][:1])
    clock.lap("parts")
    student, done, notes = copy.deepcopy(dense), [], []
    fits = []
    for part, inputs in part_inputs(dense, parts, batches):
        module = dense.get_submodule(part.name)
        if not inputs or not same_outputs(module, part.traced, inputs[0][:1]):
            continue
        found = convert_in_order(
            module, part.traced, inputs, _inside(part, sites), calibration,
            seed=seed, clock=clock, progress=progress,
        )  # fmt: skip
        _set(student, part.name, found.student)
        done.append(part)
        fits += [dataclasses.replace(fit, name=f"{part.name}.{fit.name}") for fit in found.fits]
        notes += [f"{part.name}: {note}" for note in found.notes]
    left = _left(sites, done)
    student = restructure(student, list(left.values()))
    fits += fit_by_module(
        student, dense, batches, left, calibration.budget, calibration.fit, seed=seed, progress=progress,
        keep={module for part in done for module in student.get_submodule(part.name).modules()},
    )  # fmt: skip
    clock.lap("fit")
    unreached = sites.keys() - {fit.name for fit in fits}
    if unreached:
        notes.append(f"no calibration image reaches {shown_names(sorted(unreached))}: truncated, not fitted")
    return TracedConversion(
        student, tuple(fits), (given_up(problem, [part.name for part in done], len(left)), *notes)
    )


def convert_parts_from_weights(
    dense: nn.Module, example: Tensor, sites: Mapping[str, SiteRecipe], *, problem: str, seed: int
) -> TracedConversion:
    """Convert a model whose graph as a whole is not known without data; args as in ``convert_by_part``."""
    parts = find_parts(dense, sites, example)
    student, done, before, kept = copy.deepcopy(dense), [], 0.0, 0.0
    for part, inputs in part_inputs(dense, parts, [example]):
        module = dense.get_submodule(part.name)
        if not inputs or not same_outputs(module, part.traced, inputs[0][:1]):
            continue
        found = convert_from_weights(module, part.traced, inputs[0][:1], _inside(part, sites), seed=seed)
        _set(student, part.name, found.student)
        done.append(part)
        before += (found.kept_before or 0.0) * len(part.sites)
        kept += (found.kept or 0.0) * len(part.sites)
    left = _left(sites, done)
    student = restructure(student, list(left.values()))
    note = given_up(problem, [part.name for part in done], len(left))
    if not done:
        return TracedConversion(student, notes=(note,))
    count = sum(len(part.sites) for part in done)
    return TracedConversion(student, notes=(note,), kept_before=before / count, kept=kept / count)


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
