"""Make a plan as asked for: uniform groups, a plan file, or a search with the images and table it needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from groupify.conversion.conversion import Calibration, Conversion, convert
from groupify.conversion.site_fit import FitOptions
from groupify.errors import ArtefactError, SpecError
from groupify.machine import CPUS, blocked_width, describe_machine
from groupify.measure.latency_table import LatencyTable, measure_table
from groupify.pipeline.inputs import tell_preprocessing, with_data
from groupify.pipeline.requests import ModelRequest, PlanRequest
from groupify.pipeline.subject import Subject
from groupify.planning.candidates import candidates
from groupify.planning.like_groups import DEFAULT_GROUPS
from groupify.planning.plan_file import PlanFile
from groupify.planning.race import BudgetPlan, Frontier, trace_frontier
from groupify.planning.rules import Rules
from groupify.planning.search import HeldOut, Images, SearchOptions, count_stages, plan_for_budget
from groupify.planning.uniform import plan
from groupify.stages import SILENT, Stages
from groupify.structures import FLOAT32, Plan, Precision, SiteRecipe


@dataclass(frozen=True)
class Planned:
    """A plan, and where it was searched, how it was found.

    Attributes:
        plan: what is to be replaced; its notes begin with what was chosen since nothing was asked for.
        found: the race that it won; None where there was none.
        conversion: by the plan, where it was converted for the race as the run itself would.
        frontier: what other budgets would give, where that was asked for.
    """

    plan: Plan
    found: BudgetPlan | None = None
    conversion: Conversion | None = None
    frontier: Frontier | None = None

    def noted(self, notes: tuple[str, ...]) -> Planned:
        """Return the same with more notes in front of the plan's."""
        plan = replace(self.plan, notes=(*notes, *self.plan.notes))
        return replace(self, plan=plan, found=None if self.found is None else replace(self.found, plan=plan))


def make_plan(request: PlanRequest, subject: Subject, *, stages: Stages = SILENT) -> Planned:
    """Make a plan, or read it.

    Args:
        request: what may be replaced, and how.
        subject: the dense model, and images to compare plans on.
        stages: says what is being done.

    Raises:
        GroupifyError: the plan cannot be made, or the file cannot be read.
    """
    model = subject.source.model
    if request.file is not None:
        return Planned(PlanFile.read(request.file).apply(model, subject.source.spec.input_shape))
    if request.is_uniform:
        made = plan(model, groups=request.groups or DEFAULT_GROUPS, rules=request.rules, **subject.how_called)
        return Planned(made).noted(request.notes)
    images = subject.planning_images(for_drop=request.budget is not None and request.budget.drop is not None)
    options = replace(_with_table(request.search, request.latency_table), stages=stages)
    measure = _frontier_measure(request.frontier, model, images, options)
    conversions = _Conversions(subject, options)
    reused = images is not None and conversions.fits(images) and not _bisects(request)
    found = plan_for_budget(
        model, budget=request.budget, images=images, groups=request.groups, rules=request.rules,
        options=options, convert_plan=conversions if reused else None, **subject.how_called,
    )  # fmt: skip
    frontier = None if request.frontier is None else trace_frontier(found, measure=measure)
    conversion = conversions.of_plans.get(found.plan.recipes)
    return Planned(found.plan, found, conversion, frontier).noted(request.notes)


def _bisects(request: PlanRequest) -> bool:
    """Whether so many plans are converted that they had better not be kept."""
    return request.budget is not None and not request.budget.costs


class _Conversions:
    """Converts plans that compete as the run itself would, and keeps what comes out: the winner is done."""

    def __init__(self, subject: Subject, options: SearchOptions) -> None:
        self._subject, self._options = subject, options
        self.of_plans: dict[tuple[SiteRecipe, ...], Conversion] = {}

    def fits(self, images: Images) -> bool:
        """Whether the run fits on the very images on which plans compete, and in the same way."""
        same_way = self._subject.reconstruct_steps == 0 and self._subject.seed == self._options.seed
        drawn = self._subject.calibration() if self._subject.given is None and same_way else None
        if drawn is None or not torch.equal(drawn.images, images.fit):
            return False
        fit = FitOptions(task=self._subject.task)
        self._calibration = Calibration(images.fit, fit=fit, memory=self._options.memory)
        return True

    def __call__(self, plan: Plan) -> nn.Module:
        """Convert by one plan."""
        conversion = convert(
            self._subject.source.model, plan, self._calibration, seed=self._subject.seed,
            progress=self._options.progress,
        )  # fmt: skip
        self.of_plans[plan.recipes] = conversion
        return conversion.model


def planning_stages(request: PlanRequest, subject: Subject) -> int:
    """Return the number of stages of :func:`make_plan`."""
    if not request.is_searched:
        return 0
    options = _with_table(request.search, request.latency_table)
    return count_stages(request.budget, options, images=subject.is_fitted)


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
        request: as for ``make_plan``.
        calibration_images: number of images to fit on; 0 = from the weights alone.
        seed: chooses the images.
    """
    # Without a search a plan depends on shapes alone: weights not at hand are no reason to warn or to wait.
    if not request.is_searched and model.weights == "auto":
        model = replace(model, weights="none")
    source = model.load(seed)
    used = data if request.is_searched or not source.input_known else None
    source, splits = with_data(source, used, model.preprocessing, seed=seed, task=request.search.task)
    if splits is not None:
        tell_preprocessing(source, splits)
    subject = Subject(source, source.spec.input_shape, splits, count=calibration_images, seed=seed)
    stages = Stages(planning_stages(request, subject), show=request.search.progress)
    planned = make_plan(request, subject, stages=stages)
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
        path: file to write, with what is timed so far; a table of this machine and number of threads that is
            there is completed.
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
        table = measure_table(
            model, choices, table, threads=threads, progress=progress, keep=lambda so_far: so_far.write(path)
        )
    return table
