"""Write a report into an output folder, as JSON and as a page."""

from __future__ import annotations

import json
from pathlib import Path

from groupify.reporting.document import report_document
from groupify.reporting.html import report_page
from groupify.reporting.read import REPORT_FILE, Run, earlier_runs
from groupify.reporting.results import Report

PAGE_FILE = "report.html"


def write_report(folder: Path, final_folder: Path, report: Report) -> None:
    """Write ``report.json`` and ``report.html``.

    Args:
        folder: where to write now.
        final_folder: what it will be called; earlier runs of the same model beside it are shown too.
        report: what was measured.
    """
    document = report_document(report)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    run = Run(final_folder.resolve().name, report)
    (folder / PAGE_FILE).write_text(report_page(run, earlier_runs(final_folder, report)), encoding="utf-8")
