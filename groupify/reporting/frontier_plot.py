"""The frontier as a picture: divergence against cost, planned and uniform groups, with the asked budget."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from groupify.errors import GroupifyError, SpecError
from groupify.files import write_aside
from groupify.planning.budget import MACS
from groupify.planning.frontier import Frontier, FrontierPoint


def check_plot(path: Path) -> None:
    """Refuse what ``plot_frontier`` could not draw, before anything is measured for it.

    Raises:
        SpecError: matplotlib does not know the ending of the file.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in known:
        raise SpecError(
            f"cannot draw {path}: its ending is {path.suffix!r}, expected one of {', '.join(known)}"
        )


def plot_frontier(frontier: Frontier, path: Path) -> None:
    """Draw the frontier into a file, which is written aside and renamed.

    Raises:
        GroupifyError: the file cannot be written, or its name has an ending that matplotlib does not know.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    measured = all(point.measured is not None for point in frontier.points)
    kinds = {False: ("planned", "o-", "#0072b2"), True: ("uniform", "s", "#d55e00")}
    for uniform, (label, style, colour) in kinds.items():
        points = [point for point in frontier.points if point.uniform == uniform]
        if points:
            values = [_height(point, measured) for point in points]
            axes.plot([100 * point.share for point in points], values, style, color=colour, label=label)
    for point in frontier.points:
        if point.asked:
            place: Any = (100 * point.share, _height(point, measured))
            axes.plot(*place, "*", color="black", markersize=14, label="asked budget", zorder=3)
    axes.set_xlabel(f"{'MACs' if frontier.quantity == MACS else 'latency'}, % of the dense model")
    axes.set_ylabel(f"{'measured' if measured else 'predicted'} divergence, nats")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatter())  # 20, not 2×10¹, and between the powers of ten as well
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=path.suffix.removeprefix("."))
        write_aside(path, drawn.getvalue())
    except (OSError, ValueError) as error:
        raise GroupifyError(f"cannot draw {path}: {error}; choose another file, for example x.png") from error


def _height(point: FrontierPoint, measured: bool) -> float:
    value = point.measured.divergence if measured and point.measured is not None else point.loss
    return max(value, 1e-9)
