"""groupify plan: what a conversion would do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from groupify.cli.options import (
    command,
    common_options,
    device_option,
    fit_options,
    frontier_options,
    model_options,
    plan_options,
    precision_option,
    threads_option,
)
from groupify.cli.shared import model_label, model_request, plan_request, print_json
from groupify.errors import SpecError

if TYPE_CHECKING:
    from groupify.pipeline.planning import Planned


@command(short_help="Show what a conversion would do.")
@click.argument("model")
@model_options
@plan_options
@frontier_options
@precision_option("What the converted model will compute in; latencies are those of it. both: int8.")
@threads_option
@fit_options
@device_option
@common_options
def plan(model: str, **options: Any) -> None:
    """Show what a conversion of MODEL would do; nothing is written but the files that are asked for.

    Without --groups and --budget, each conv gets the structure that loses least at the MACs of 4 groups.

    Example: groupify plan resnet50 --groups 8 --weights none

    Or, for a budget: groupify plan demo --budget macs=30% --data demo --frontier
    """
    from groupify.pipeline.planning import run_plan
    from groupify.reporting.budget import check_plot

    plot: Path | None = options["frontier_plot"]
    frontier = options["frontier"] or ("predicted" if plot is not None else None)
    request = plan_request(options)
    if frontier is not None and not request.is_searched:
        raise SpecError(
            "--frontier shows what more and less of a limit would give: give one, for example "
            "--budget macs=40%, or let each conv's structure be chosen with --structure auto"
        )
    if plot is not None:
        check_plot(plot)
    planned = run_plan(
        model_request(model, options),
        replace(request, frontier=frontier),
        data=options["data"],
        calibration_images=options["calibrate"],
        seed=options["seed"],
    )
    _show(model, planned, options["as_json"])
    # People get a picture of a frontier in any case.
    if plot is None and planned.frontier is not None and not options["as_json"]:
        plot = Path(f"{model_label(model, options['arguments'])}-frontier.png")
    if planned.frontier is not None and plot is not None:
        _draw(planned, plot, options["as_json"])


def _show(model: str, planned: Planned, as_json: bool) -> None:
    from groupify.reporting.budget import budget_document, print_budget_plan, print_frontier
    from groupify.reporting.document import plan_document
    from groupify.reporting.sites import print_plan
    from groupify.reporting.tables import stdout_console

    found, frontier = planned.found, planned.frontier
    if as_json:
        document = plan_document(planned.plan) if found is None else budget_document(found, frontier)
        print_json({"model": model, **document})
    elif found is None:
        print_plan(planned.plan, stdout_console())
    else:
        print_budget_plan(found, stdout_console())
        if frontier is not None:
            print_frontier(frontier, stdout_console())


def _draw(planned: Planned, plot: Path, as_json: bool) -> None:
    from groupify.reporting.budget import plot_frontier

    assert planned.frontier is not None
    plot_frontier(planned.frontier, plot)
    if not as_json:
        click.echo(f"wrote {plot}")
