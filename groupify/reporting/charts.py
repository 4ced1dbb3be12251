"""Charts as SVG for the pages: drawn by matplotlib, in the colours and letters of the page they stand in."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 440, 296
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 424, 32, 252  # of the axes, in pixels from the upper left corner
_LINE, _LETTER = 17, 8.5  # height and width of a label's letters, in pixels, where they are largest
_MARK, _REACH = 6, 12  # radius of a mark, and of what reacts to the mouse around it
_LONGEST = 18  # letters in a label
_TICKS = 6
# matplotlib knows nothing of a page that is light or dark: it draws in stand-ins, which then give way to the
# variables of the page's style sheet.
_COLOURS = {"page": "#010101", "ink": "#020202", "soft": "#030303", "rule": "#040404"} | {
    "accent": "#050505", "pale": "#060606", "other": "#070707"
}  # fmt: skip
_LOOKS = {  # fill, edge and size of a mark
    "dense": ("soft", "soft", 10),
    "converted": ("page", "accent", 10),
    "recovered": ("accent", "accent", 10),
    "uniform": ("page", "other", 10),
    "other": ("other", "other", 10),
    "small": ("accent", "accent", 5),
}
_MARKERS = {"": "o", "below": "v", "above": "^", "right": ">"}
_LINES = {"trace": ("pale", 1.5, (0, (4, 4))), "curve": ("accent", 2.0, "solid")}


@dataclass(frozen=True)
class Point:
    """One mark: a value on each axis, its look, what hovering shows, and perhaps a label beside it."""

    x: float
    y: float
    look: str  # "dense" | "converted" | "recovered" | "uniform" | "other" | "small"
    title: str
    label: str = ""
    edge: str = ""  # "below" | "above" | "right": which way it really lies, off the scale


@dataclass(frozen=True)
class Label:
    """Where a label goes, in pixels: beside its mark, to the right ("left"-aligned) or the left of it."""

    text: str
    x: float
    y: float
    align: str  # "left" | "right"


def chart(
    name: str,
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    from_zero: bool = False,
    lines: Sequence[tuple[str, Sequence[Point]]] = (),
) -> str:
    """Draw a chart; return an ``<svg>`` element to put into a page.

    Args:
        name: what it shows, for readers who do not see it.
        points: the marks, those first whose labels matter most.
        x_title, y_title: of the axes.
        from_zero: whether the x axis begins at 0.
        lines: look ("trace" | "curve") and points of lines to draw below the marks.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same chart gives the same text, and text stays text. In a figure of 72 dots per inch a point is one
    # pixel of the SVG.
    with mpl.rc_context({"svg.hashsalt": "groupify", "svg.fonttype": "none", "font.size": 12}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, facecolor="none")
        box = (_LEFT / WIDTH, 1 - _BOTTOM / HEIGHT, (_RIGHT - _LEFT) / WIDTH, (_BOTTOM - _TOP) / HEIGHT)
        axes = figure.add_axes(box, facecolor="none")
        every = [*points, *(point for _, line in lines for point in line)]
        axes.set_xlim(_limits([point.x for point in every], from_zero=from_zero))
        axes.set_ylim(_limits([point.y for point in every]))
        _draw_frame(axes, x_title, y_title)
        for look, line in lines:
            _draw_line(axes, look, line)
        places = [(x, HEIGHT - y) for x, y in axes.transData.transform([(one.x, one.y) for one in points])]
        labels = place_labels([point.label for point in points], places)
        # The first ones, drawn last, hide the others and not the reverse.
        for number in reversed(range(len(points))):
            _draw_mark(axes, f"mark-{number}", points[number], places[number], labels[number])
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_a_page(drawn.getvalue(), name, points, places, labels)


def round_ticks(low: float, high: float) -> list[float]:
    """Return up to five round numbers, at equal distances, from below ``low`` to above ``high``."""
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(3, steps=[1, 2, 5, 10], min_n_ticks=1).tick_values(low, high)]


def _limits(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    low, high = (0.0 if from_zero else min(values)), max(values)
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero else low - margin), high + margin


def _draw_frame(axes: Axes, x_title: str, y_title: str) -> None:
    """Axes with few round ticks, horizontal rules, and titles where they take no room from the marks."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(_TICKS, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
        axis.get_major_formatter().set_scientific(False)  # type: ignore[attr-defined]
    axes.tick_params(length=0, pad=6, labelcolor=_COLOURS["soft"])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(_COLOURS["soft"])
    axes.grid(axis="y", color=_COLOURS["rule"], linewidth=1)
    axes.set_axisbelow(True)
    for x, y, align, text in ((_RIGHT, HEIGHT - 8, "right", x_title), (0, 12, "left", y_title)):
        _write(axes, x, y, text, "soft", align)


def _draw_line(axes: Axes, look: str, line: Sequence[Point]) -> None:
    colour, width, dashes = _LINES[look]
    x, y = [point.x for point in line], [point.y for point in line]
    axes.plot(x, y, color=_COLOURS[colour], linewidth=width, linestyle=dashes, clip_on=False)


def _draw_mark(axes: Axes, name: str, point: Point, place: tuple[float, float], label: Label | None) -> None:
    """One mark as a group of that name, with what reacts to the mouse around it, and its label."""
    from matplotlib.lines import Line2D

    fill, edge, size = _LOOKS[point.look]
    axes.add_artist(
        Line2D(
            [place[0]], [HEIGHT - place[1]], transform=None, clip_on=False, gid=name, linestyle="none",
            marker=_MARKERS[point.edge], markersize=size, markerfacecolor=_COLOURS[fill],
            markeredgecolor=_COLOURS[edge], markeredgewidth=2.5 if fill != edge else 0,
        )
    )  # fmt: skip
    if label is not None:
        colour = "soft" if point.look in ("uniform", "other") else "ink"
        # A stand-in as well: matplotlib would take "$" for mathematics, and miss the letters of many scripts.
        _write(axes, label.x, label.y, f"label-{name}", colour, label.align)


def _write(axes: Axes, x: float, y: float, text: str, colour: str, align: str) -> None:
    """Put a text at a place given in pixels from the upper left corner, ``y`` being its base line."""
    place = (x, HEIGHT - y)
    axes.annotate(
        text, place, xycoords="figure pixels", color=_COLOURS[colour], ha=align, va="baseline",
        annotation_clip=False,
    )  # fmt: skip


def _for_a_page(
    drawn: str,
    name: str,
    points: Sequence[Point],
    places: Sequence[tuple[float, float]],
    labels: Sequence[Label | None],
) -> str:
    """Make of a file an element of a page: its colours and letters, and what hovering shows."""
    body = drawn[drawn.index('<g id="figure_1">') :]  # leaves out a style that would hold for the whole page
    for colour, stand_in in _COLOURS.items():
        body = body.replace(stand_in, f"var(--{colour})")
    body = re.sub(r"\bfont[^;\"]*; ?", "", body)
    for number, (point, (x, y), label) in enumerate(zip(points, places, labels, strict=True)):
        title = f"<g><title>{html.escape(point.title)}</title>"
        reach = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_REACH}" fill="transparent"/>'
        body = body.replace(f'<g id="mark-{number}">', title + reach)
        if label is not None:
            body = body.replace(f">label-mark-{number}<", f">{html.escape(label.text)}<")
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # which several charts of one page would share
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(name)}">'
    return head + re.sub(r"\s+", " ", body)


def place_labels(texts: Sequence[str], places: Sequence[tuple[float, float]]) -> list[Label | None]:
    """Find for each label, in turn, a place that hides nothing; None where it is empty or all is full.

    Args:
        texts: the labels; long ones are cut.
        places: of the marks, in pixels from the upper left corner.
    """
    taken = [_Box(x - _MARK, x + _MARK, y - _MARK, y + _MARK) for x, y in places]
    labels: list[Label | None] = []
    for text, (x, y) in zip(texts, places, strict=True):
        short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
        box = _free_box(len(short) * _LETTER, x, y, taken) if short else None
        if box is None:
            labels.append(None)
            continue
        taken.append(box)
        base = (box.top + box.bottom) / 2 + 4
        right = box.left > x
        labels.append(Label(short, box.left if right else box.right, base, "left" if right else "right"))
    return labels


@dataclass(frozen=True)
class _Box:
    left: float
    right: float
    top: float
    bottom: float

    def touches(self, other: _Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def _free_box(width: float, x: float, y: float, taken: Sequence[_Box]) -> _Box | None:
    """Return a free place for a label, beside its mark or a little above or below; None where all is full."""
    for shift in (0, 0.5, -0.5, 1, -1, 1.5, -1.5, 2, -2):
        top = y + (shift - 0.5) * _LINE
        for left in (x + _MARK + 3, x - _MARK - 3 - width):
            box = _Box(left, left + width, top, top + _LINE)
            inside = box.left >= _LEFT and box.right <= WIDTH and box.bottom <= _BOTTOM
            if inside and box.top >= _TOP - _LINE / 2 and not any(box.touches(other) for other in taken):
                return box
    return None
