"""Plans as text: a row for each conv, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from groupify.reporting.formatting import count, counts, extras, ratio, shape
from groupify.reporting.tables import Table, is_narrow, print_lines
from groupify.structures import FLOAT32, Plan, SitePlan


def print_plan(plan: Plan, console: Console) -> None:
    """Print the table of sites and their totals."""
    print_sites(plan.sites, console)
    totals = (("params", plan.params), ("MACs", plan.macs))
    rows = [
        (title, count(change.dense), count(change.grouped), ratio(change.ratio)) for title, change in totals
    ]
    Table(("convs", "dense", "grouped", "ratio"), tuple(rows), words=("convs",)).print(console)
    planned_for = plan.cpu if plan.precision == FLOAT32 else f"{plan.cpu}, {plan.precision}"
    counted = f"{len(plan.converted)} of {len(plan.sites)} convs are converted"
    print_lines([f"{counted}, planned for {planned_for}"], console)
    print_lines(plan.notes, console)


def print_sites(sites: Sequence[SitePlan], console: Console) -> None:
    """Print one row per conv: name, shape, groups before → after, params, MACs, reason.

    On a narrow terminal the cells are packed, and the reasons are numbers that are explained below.
    """
    reasons = list(dict.fromkeys(site.reason for site in sites if site.reason))
    narrow = is_narrow(console)
    numbers = {reason: str(index) if narrow else reason for index, reason in enumerate(reasons, start=1)}
    rows = [(*site_cells(site), numbers.get(site.reason or "", "")) for site in sites]
    if narrow:
        rows = [tuple(map(_packed, row)) for row in rows]
    last = "why" if narrow else "reason"
    Table(
        ("site", "shape", "groups", "params", "MACs", last),
        tuple(rows),
        words=("site", "shape", "groups", last),
    ).print(console)
    if narrow:
        for reason, number in numbers.items():
            console.print(Text(f"{number}: {reason}"))
    console.print()


def site_table(sites: Sequence[SitePlan]) -> Table:
    """Return one row per conv, shorter: name, groups, params, MACs, reason."""
    rows = []
    for site in sites:
        changes = (counts(change, site.converted) for change in (site.params, site.macs))
        rows.append((site.name, f"{site.groups}{extras(site)}", *changes, site.reason or ""))
    return Table(("site", "groups", "params", "MACs", "reason"), tuple(rows), words=("site", "reason"))


def site_cells(site: SitePlan) -> tuple[str, ...]:
    """Return name, shape, groups, params and MACs of a conv."""
    groups = f"{site.groups_before} → {site.groups}" if site.converted else f"{site.groups_before}"
    return (
        site.name or "(the model)",
        shape(site),
        groups + extras(site),
        counts(site.params, site.converted),
        counts(site.macs, site.converted),
    )


def _packed(text: str) -> str:
    return text.replace(" → ", "→").replace(", ", " ").replace(" / ", "/").replace(" + ", "+")
