"""groupify plan: what a conversion would do."""

from __future__ import annotations

from typing import Any

import click

from groupify.cli.options import common_options, model_options, model_request, plan_options, plan_request
from groupify.cli.shared import CONTEXT, print_json


@click.command(context_settings=CONTEXT, short_help="Show what a conversion would do.")
@click.argument("model")
@model_options
@plan_options
@common_options
def plan(model: str, **options: Any) -> None:
    """Show what a conversion of MODEL would do; nothing is written.

    Example: groupify plan resnet50 --groups 8 --weights none
    """
    from groupify.reporting import print_plan
    from groupify.reporting.document import change_document, site_document
    from groupify.reporting.text import stdout_console

    # A plan depends on shapes alone: weights that are not at hand are no reason to warn or to wait.
    if options["weights"] == "auto":
        options["weights"] = "none"
    source = model_request(model, options).load(options["seed"])
    result = plan_request(options).make(source)
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
