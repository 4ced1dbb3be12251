"""Plan for a budget: draw the images, read the latency table, search."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from groupify.data.batches import UNLABELLED, iterate_batches
from groupify.data.splits import DataSplits, load_data
from groupify.errors import ArtefactError, SpecError
from groupify.files import cache_folder
from groupify.machine import CPUS, blocked_width, describe_machine
from groupify.measure.latency_table import LatencyTable, measure_table
from groupify.models import Source
from groupify.pipeline.requests import ModelRequest, PlanRequest, SearchRequest
from groupify.planning.budget import Budget
from groupify.planning.candidates import candidates
from groupify.planning.frontier import Frontier, trace_frontier
from groupify.planning.race import BudgetPlan
from groupify.planning.rules import Rules
from groupify.planning.search import HeldOut, Images, SearchOptions, plan_for_budget

_HELD_OUT = 500
# A share of right answers is known less well than a divergence.
_HELD_OUT_FOR_DROP = 2000
_HELD_OUT_BYTES = 2**30


def find_plan(
    request: PlanRequest,
    search: SearchRequest,
    source: Source,
    data: DataSplits | None,
    *,
    calibration_images: int,
    threads: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> BudgetPlan:
    """Return the plan for the budget of a request.

    Args:
        request: what may be replaced, and how.
        search: the budget.
        source: the dense model.
        data: gives calibration images, and others to compare plans on; None = from the weights alone.
        calibration_images: number of images to fit on; 0 = from the weights alone.
        threads: intra-op threads of ONNX Runtime that a latency is for.
        seed: seed of everything random.
        progress: show bars on stderr.
    """
    images = _images(data, calibration_images, search, seed)
    options = search_options(search, threads=threads, seed=seed, progress=progress)
    return plan_for_budget(
        source.model, source.spec.input_shape, search.budget, images, rules=request.rules, options=options
    )


def _images(data: DataSplits | None, count: int, search: SearchRequest, seed: int) -> Images | None:
    if data is None or count == 0:
        return None
    return planning_images(data, count, search.budget, seed=seed)


def find_frontier(
    model: ModelRequest,
    request: PlanRequest,
    *,
    data: str | None,
    calibration_images: int,
    frontier: str | None,
    threads: int,
    seed: int,
    progress: bool,
) -> tuple[BudgetPlan, Frontier | None]:
    """Load a model and its data, plan for a budget and, where asked for, trace the frontier around it.

    Args:
        model, request: the dense model, and the budget in ``request.search``.
        data: data spec; None = from the weights alone.
        frontier: None, ``"predicted"``, or ``"measured"`` to convert every point.
        calibration_images, threads, seed, progress: as for ``find_plan``.
    """
    search = request.search
    assert search is not None
    source = model.load(seed)
    splits = None if data is None else load_data(data, source.spec, seed=seed)
    images = _images(splits, calibration_images, search, seed)
    options = search_options(search, threads=threads, seed=seed, progress=progress)
    found = plan_for_budget(
        source.model, source.spec.input_shape, search.budget, images, rules=request.rules, options=options
    )
    if frontier is None:
        return found, None
    measure = None
    if frontier == "measured":
        if images is None:
            raise SpecError("a measured frontier needs images; give --data")
        measure = HeldOut(source.model, images, options)
    return found, trace_frontier(found, measure=measure)


def search_options(search: SearchRequest, *, threads: int, seed: int, progress: bool) -> SearchOptions:
    """Return how to look for a plan."""
    table = None if search.latency_table is None else LatencyTable.read(search.latency_table)
    if table is not None and table.threads != threads:
        raise SpecError(
            f"the latency table {search.latency_table} was measured with {table.threads} threads, "
            f"not {threads}: give --threads {table.threads}, or another table"
        )
    return SearchOptions(
        sensitivity=search.sensitivity,
        verify=search.verify,
        table=table,
        threads=threads,
        cache=cache_folder(),
        seed=seed,
        progress=progress,
    )


def planning_images(data: DataSplits, count: int, budget: Budget, *, seed: int) -> Images:
    """Draw the images to fit on, the same that a conversion draws, and others to compare plans on.

    Raises:
        DataError: no images.
    """
    part = data.for_calibration
    first, _ = next(iter(iterate_batches(part, 1, limit=1)))
    most = _HELD_OUT if budget.drop is None else _HELD_OUT_FOR_DROP
    more = max(1, min(most, _HELD_OUT_BYTES // (4 * math.prod(first.shape[1:]))))
    batches = list(iterate_batches(part, min(count, 256), shuffle_seed=seed, limit=count + more))
    images = torch.cat([batch for batch, _ in batches])
    labels = torch.cat([batch for _, batch in batches])
    # Of a test part the labels must not choose anything.
    labelled = data.labelled and data.train is not None and not bool((labels == UNLABELLED).any())
    if len(images) <= count:  # few images: a quarter of them is held out
        return Images.split(images, labels if labelled else None)
    return Images(images[:count], images[count:], labels[count:] if labelled else None)


def make_table(
    model: nn.Module, input_shape: tuple[int, ...], path: Path, *, threads: int = 1, progress: bool = False
) -> LatencyTable:
    """Write a latency table of all that any plan of a model could need, whatever its options.

    Args:
        model: the dense model; latency does not depend on its weights.
        input_shape: (C, H, W) of one image.
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
    any_width = Rules(min_group_width=1, shuffle="all")
    one_of_each_block = {blocked_width(cpu): cpu for cpu in CPUS}.values()
    for rules in (any_width, *(Rules(cpu=cpu, shuffle="all") for cpu in one_of_each_block)):
        choices = candidates(model, input_shape, rules)
        table = measure_table(model, choices, table, threads=threads, progress=progress)
    table.write(path)
    return table
