"""groupify plan: what a conversion would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from groupify.cli.options import (
    calibrate_option,
    common_options,
    data_option,
    model_options,
    model_request,
    output_file,
    plan_options,
    plan_request,
)
from groupify.cli.shared import CONTEXT, print_json
from groupify.errors import SpecError


@click.command(context_settings=CONTEXT, short_help="Show what a conversion would do.")
@click.argument("model")
@model_options
@plan_options
@data_option
@calibrate_option
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of a latency.")
@click.option(
    "--frontier",
    type=click.Choice(["predicted", "measured"]),
    is_flag=False,
    flag_value="predicted",
    help="With a budget: show what more and less of it would give. measured: convert every point.",
)
@click.option(
    "--frontier-plot",
    type=click.Path(path_type=Path),
    callback=output_file,
    help="Draw it here, for example x.svg.",
)
@common_options
def plan(model: str, **options: Any) -> None:
    """Show what a conversion of MODEL would do; nothing is written but the files that are asked for.

    Example: groupify plan resnet50 --groups 8 --weights none

    Or, for a budget: groupify plan demo --target macs=30% --data demo --frontier
    """
    from groupify.planning.plan_file import PlanFile
    from groupify.reporting.document import change_document, site_document
    from groupify.reporting.sites import print_plan
    from groupify.reporting.tables import stdout_console

    request = plan_request(options)
    if request.search is not None:
        _plan_for_budget(model, options)
        return
    if options["frontier"] is not None or options["frontier_plot"] is not None:
        raise SpecError("--frontier needs a budget to mark on it, for example --target macs=40%")
    # Such a plan depends on shapes alone: weights that are not at hand are no reason to warn or to wait.
    if options["weights"] == "auto":
        options["weights"] = "none"
    source = model_request(model, options).load(options["seed"])
    result = request.make(source)
    if options["save_plan"] is not None:
        PlanFile.of(model, result).write(options["save_plan"])
    if options["as_json"]:
        print_json(
            {
                "model": model,
                "input_shape": list(result.input_shape),
                "groups": result.groups,
                "sites": [site_document(site) for site in result.sites],
                "params": change_document(result.params),
                "macs": change_document(result.macs),
                "notes": list(result.notes),
            }
        )
    else:
        print_plan(result, stdout_console())


def _plan_for_budget(model: str, options: dict[str, Any]) -> None:
    from groupify.pipeline.budget import find_frontier
    from groupify.planning.plan_file import PlanFile
    from groupify.reporting.budget import (
        budget_document,
        check_plot,
        plot_frontier,
        print_budget_plan,
        print_frontier,
    )
    from groupify.reporting.tables import stdout_console

    plot: Path | None = options["frontier_plot"]
    if plot is not None:
        check_plot(plot)
    result, frontier = find_frontier(
        model_request(model, options),
        plan_request(options),
        data=options["data"],
        calibration_images=options["calibrate"] or 0,
        frontier=options["frontier"] or ("predicted" if plot is not None else None),
        threads=options["threads"],
        seed=options["seed"],
        progress=not options["quiet"],
    )
    if options["save_plan"] is not None:
        PlanFile.of(model, result.plan).write(options["save_plan"])
    if options["as_json"]:
        print_json({"model": model, **budget_document(result, frontier)})
    else:
        print_budget_plan(result, stdout_console())
        if frontier is not None:
            print_frontier(frontier, stdout_console())
            plot = plot or Path(f"{model.rpartition(':')[2]}-frontier.png")
    if frontier is not None and plot is not None:
        plot_frontier(frontier, plot)
        if not options["as_json"]:
            click.echo(f"wrote {plot}")
