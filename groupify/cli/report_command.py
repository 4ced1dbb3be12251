"""groupify report: a page or a table from what earlier runs wrote."""

from __future__ import annotations

from pathlib import Path

import click

from groupify.cli.options import command, output
from groupify.cli.shared import print_json
from groupify.errors import ArtefactError, SpecError
from groupify.files import write_aside

FORMATS = ("html", "md", "json", "text")
COMPARISON = "comparison.html"


@command(short_help="Make a page or a table of one or several runs.")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER...")
@output(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="html",
    show_default=True,
    help="html writes a file; md (for a pull request), json and text go to standard output.",
)
@output(
    "-o",
    "--output",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"File to write (default for html: FOLDER/report.html; for several folders: {COMPARISON}).",
)
def report(folders: tuple[Path, ...], form: str, path: Path | None) -> None:
    """Show what the runs in FOLDER... measured; several are compared.

    Example: groupify report demo-g4 demo-g8 --format md
    """
    from groupify.reporting.html import comparison_page, report_page
    from groupify.reporting.read import earlier_runs, read_report
    from groupify.reporting.tables import stdout_console
    from groupify.reporting.text import markdown, print_summary

    runs = [read_report(folder) for folder in folders]
    if form == "html":
        if len(runs) == 1:
            page = report_page(runs[0], earlier_runs(folders[0], runs[0].report))
        else:
            page = comparison_page(runs)
        target = path or (folders[0] / "report.html" if len(runs) == 1 else Path(COMPARISON))
        _write(target, page)
        click.echo(f"wrote {target}")
        return
    if path is not None:
        if form != "md":
            raise SpecError(
                f"--output writes html or md, not {form}; leave it out and redirect standard output"
            )
        _write(path, markdown(runs))
        click.echo(f"wrote {path}")
    elif form == "md":
        click.echo(markdown(runs), nl=False)
    elif form == "json":
        documents = [run.report.values() for run in runs]
        print_json(documents[0] if len(documents) == 1 else documents)
    else:
        print_summary(runs, stdout_console())


def _write(target: Path, text: str) -> None:
    try:
        write_aside(target, text)
    except OSError as error:
        raise ArtefactError(f"cannot write {target}: {error.strerror}; choose another with -o") from error
