"""Results as dataclasses and, apart from them, their formatters."""

from groupify.reporting.document import report_document
from groupify.reporting.results import (
    AccuracyChange,
    CostChange,
    Int8File,
    LatencyChange,
    Report,
    UniformRun,
)
from groupify.reporting.text import print_plan, print_report

__all__ = [
    "AccuracyChange",
    "CostChange",
    "Int8File",
    "LatencyChange",
    "Report",
    "UniformRun",
    "print_plan",
    "print_report",
    "report_document",
]
