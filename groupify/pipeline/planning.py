"""Make a plan as asked for: uniform groups, a plan file, or a search with the images and table it needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from groupify.data.batches import UNLABELLED, first_input, iterate_batches
from groupify.data.splits import DataSplits
from groupify.errors import ArtefactError, SpecError
from groupify.machine import CPUS, blocked_width, describe_machine
from groupify.measure.latency_table import LatencyTable, measure_table
from groupify.models.specs import Source
from groupify.pipeline.inputs import tell_preprocessing, with_data
from groupify.pipeline.requests import ModelRequest, PlanRequest
from groupify.planning.candidates import candidates
from groupify.planning.like_groups import DEFAULT_GROUPS
from groupify.planning.plan_file import PlanFile
from groupify.planning.race import BudgetPlan, Frontier, trace_frontier
from groupify.planning.rules import Rules
from groupify.planning.search import HeldOut, Images, SearchOptions, plan_for_budget
from groupify.planning.uniform import plan
from groupify.structures import FLOAT32, Plan, Precision

_HELD_OUT = 500
# A share of right answers is known less well than a divergence.
_HELD_OUT_FOR_DROP = 2000
_HELD_OUT_BYTES = 2**30


@dataclass(frozen=True)
class Planned:
    """A plan, and where it was searched, how it was found.

    Attributes:
        plan: what is to be replaced; its notes begin with what was chosen since nothing was asked for.
        found: the race that it won; None where there was none.
        frontier: what other budgets would give, where that was asked for.
    """

    plan: Plan
    found: BudgetPlan | None = None
    frontier: Frontier | None = None

    def noted(self, notes: tuple[str, ...]) -> Planned:
        """Return the same with more notes in front of the plan's."""
        plan = replace(self.plan, notes=(*notes, *self.plan.notes))
        return replace(self, plan=plan, found=None if self.found is None else replace(self.found, plan=plan))


def make_plan(
    request: PlanRequest, source: Source, data: DataSplits | None, *, calibration_images: int, seed: int
) -> Planned:
    """Make a plan, or read it.

    Args:
        request: what may be replaced, and how.
        source: the dense model.
        data: gives calibration images, and others to compare plans on; None = from the weights alone.
        calibration_images: number of images to fit on; 0 = from the weights alone.
        seed: chooses the images.

    Raises:
        GroupifyError: the plan cannot be made, or the file cannot be read.
    """
    model, shape = source.model, source.spec.input_shape
    if request.file is not None:
        return Planned(PlanFile.read(request.file).apply(model, shape))
    if request.is_uniform:
        made = plan(model, shape, groups=request.groups or DEFAULT_GROUPS, rules=request.rules)
        return Planned(made).noted(request.notes)
    images = None
    if data is not None and calibration_images:
        drop = None if request.budget is None else request.budget.drop
        images = planning_images(data, calibration_images, for_drop=drop is not None, seed=seed)
    options = _with_table(request.search, request.latency_table)
    measure = _frontier_measure(request.frontier, model, images, options)
    found = plan_for_budget(
        model, shape, request.budget, images, groups=request.groups, rules=request.rules, options=options
    )
    frontier = None if request.frontier is None else trace_frontier(found, measure=measure)
    return Planned(found.plan, found, frontier).noted(request.notes)


def _frontier_measure(
    frontier: str | None, model: nn.Module, images: Images | None, options: SearchOptions
) -> HeldOut | None:
    if frontier != "measured":
        return None
    if images is None:
        raise SpecError("a measured frontier needs images; give --data")
    return HeldOut(model, images, options)


def run_plan(
    model: ModelRequest, request: PlanRequest, *, data: str | None, calibration_images: int, seed: int
) -> Planned:
    """Do what ``groupify plan`` does: load a model and its data, plan, and save the plan if asked for.

    Args:
        model: the dense model.
        data: data spec for a plan that is searched; None = from the weights alone.
        request, calibration_images, seed: as for ``make_plan``.
    """
    # Without a search a plan depends on shapes alone: weights not at hand are no reason to warn or to wait.
    if not request.is_searched and model.weights == "auto":
        model = replace(model, weights="none")
    source = model.load(seed)
    used = data if request.is_searched or not source.input_known else None
    source, splits = with_data(source, used, model.preprocessing, seed=seed)
    if splits is not None:
        tell_preprocessing(source, splits)
    planned = make_plan(request, source, splits, calibration_images=calibration_images, seed=seed)
    if request.save is not None:
        PlanFile.of(model.name, planned.plan).write(request.save)
    return planned


def _with_table(options: SearchOptions, path: Path | None) -> SearchOptions:
    if path is None:
        return options
    table = LatencyTable.read(path)
    if table.threads != options.threads:
        raise SpecError(
            f"the latency table {path} was measured with {table.threads} threads, "
            f"not {options.threads}: give --threads {table.threads}, or another table"
        )
    return replace(options, table=table)


def planning_images(data: DataSplits, count: int, *, for_drop: bool, seed: int) -> Images:
    """Draw the images to fit on, the same that a conversion draws, and others to compare plans on.

    Args:
        data: gives them.
        count: number of images to fit on.
        for_drop: whether a limit on the drop is to be held, which takes more of the others.
        seed: chooses the images.

    Raises:
        DataError: no images.
    """
    part = data.for_calibration
    first = first_input(part)
    most = _HELD_OUT_FOR_DROP if for_drop else _HELD_OUT
    more = max(1, min(most, _HELD_OUT_BYTES // (4 * first.numel())))
    drawn = iterate_batches(
        part, min(count, 256), shuffle_seed=seed, limit=count + more, labelled=data.labelled
    )
    batches = list(drawn)
    images = torch.cat([batch for batch, _ in batches])
    labels = torch.cat([batch for _, batch in batches])
    # Of a test part the labels must not choose anything.
    labelled = data.labelled and data.train is not None and not bool((labels == UNLABELLED).any())
    if len(images) <= count:  # few images: a quarter of them is held out
        return Images.split(images, labels if labelled else None)
    return Images(images[:count], images[count:], labels[count:] if labelled else None)


def make_table(
    model: nn.Module,
    input_shape: tuple[int, ...],
    path: Path,
    *,
    precisions: Sequence[Precision] = (FLOAT32,),
    threads: int = 1,
    progress: bool = False,
) -> LatencyTable:
    """Write a latency table of all that any plan of a model could need, whatever its options.

    Args:
        model: the dense model; latency does not depend on its weights.
        input_shape: (C, H, W) of one image.
        precisions: of the plans.
        path: file to write; a table of this machine and number of threads that is there is completed.
        threads: intra-op threads.
        progress: show a bar on stderr.

    Raises:
        ArtefactError: the file is there and holds something else, or cannot be written.
    """
    machine = str(describe_machine())
    table = LatencyTable.read(path) if path.exists() else LatencyTable(machine, threads)
    if (table.machine, table.threads) != (machine, threads):
        raise ArtefactError(
            f"{path} is a table of {table.machine}, {table.threads} threads; this is {machine}, {threads} "
            "threads: choose another file"
        )
    one_of_each_block = {blocked_width(cpu): cpu for cpu in CPUS}.values()
    every = (
        Rules(min_group_width=1, shuffle="all"),
        *(Rules(cpu=cpu, shuffle="all") for cpu in one_of_each_block),
    )
    for rules, precision in itertools.product(every, precisions):
        choices = candidates(model, input_shape, replace(rules, precision=precision))
        table = measure_table(model, choices, table, threads=threads, progress=progress)
    table.write(path)
    return table
