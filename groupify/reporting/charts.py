"""Where everything in a chart goes; the templates draw it as SVG, in the colours of the page.

By hand, because the page must work without a network: the plotting libraries whose charts react to the mouse
put 1 to 5 MB of JavaScript into every report, and matplotlib's know nothing of light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 296
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 32, 44
_LINE, _LETTER = 17, 8.5  # height and width of a label's letters, in pixels, where they are largest
_MARK = 6
_LONGEST = 18  # letters in a label


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels."""

    title: str
    low: float
    high: float
    start: float
    end: float
    unit: str = ""

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Pixel and text of each tick."""
        step = _step(self.high - self.low)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(self(i * step), f"{i * step:.{digits}f}{self.unit}") for i in range(first, last + 1)]


@dataclass(frozen=True)
class Point:
    """One mark: a value on each axis, its look, what hovering shows, and perhaps a label beside it."""

    x: float
    y: float
    look: str  # "dense" | "converted" | "recovered" | "uniform" | "other"
    title: str
    label: str = ""


@dataclass(frozen=True)
class Mark:
    """A point in pixels; the label goes where it hides nothing, and is left out where there is no room."""

    x: float
    y: float
    look: str
    title: str
    label: str
    label_x: float
    label_y: float
    anchor: str


@dataclass(frozen=True)
class Chart:
    """A chart in pixels: two axes, marks, and lines as SVG paths with their look."""

    name: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    paths: tuple[tuple[str, str], ...]
    width: int = WIDTH
    height: int = HEIGHT


def chart(
    name: str,
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    x_unit: str = "",
    y_unit: str = "",
    from_zero: bool = False,
    lines: Sequence[tuple[str, Sequence[Point]]] = (),
) -> Chart:
    """Lay out a chart.

    Args:
        name: what it shows, for readers who do not see it.
        points: the marks, those first whose labels matter most.
        x_title, y_title, x_unit, y_unit: of the axes.
        from_zero: whether the x axis begins at 0.
        lines: look and points of lines to draw below the marks.
    """
    every = [*points, *(point for _, line in lines for point in line)]
    x = _axis(x_title, [point.x for point in every], _LEFT, WIDTH - _RIGHT, x_unit, from_zero=from_zero)
    y = _axis(y_title, [point.y for point in every], HEIGHT - _BOTTOM, _TOP, y_unit)
    paths = tuple(
        (look, "M" + "L".join(f"{x(point.x)} {y(point.y)}" for point in line)) for look, line in lines if line
    )
    return Chart(name, x, y, _marks(points, x, y), paths)


def _marks(points: Sequence[Point], x: Axis, y: Axis) -> tuple[Mark, ...]:
    places = [(x(point.x), y(point.y)) for point in points]
    taken = [_Box(px - _MARK, px + _MARK, py - _MARK, py + _MARK) for px, py in places]
    marks = []
    for point, (px, py) in zip(points, places, strict=True):
        label = point.label if len(point.label) <= _LONGEST else f"{point.label[: _LONGEST - 1]}…"
        box = _free_box(len(label) * _LETTER, px, py, taken) if label else None
        if box is None:
            marks.append(Mark(px, py, point.look, point.title, "", px, py, "start"))
            continue
        taken.append(box)
        right = box.left > px
        marks.append(
            Mark(
                px, py, point.look, point.title, label,
                round(box.left if right else box.right, 1), round((box.top + box.bottom) / 2 + 4, 1),
                "start" if right else "end",
            )
        )  # fmt: skip
    return tuple(reversed(marks))  # the first ones, drawn last, hide the others and not the reverse


@dataclass(frozen=True)
class _Box:
    left: float
    right: float
    top: float
    bottom: float

    def touches(self, other: _Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def _free_box(width: float, px: float, py: float, taken: Sequence[_Box]) -> _Box | None:
    """Return a free place for a label, beside its mark or a little above or below; None where all is full."""
    for shift in (0, 0.5, -0.5, 1, -1, 1.5, -1.5, 2, -2):
        top = py + (shift - 0.5) * _LINE
        for left in (px + _MARK + 3, px - _MARK - 3 - width):
            box = _Box(left, left + width, top, top + _LINE)
            inside = box.left >= _LEFT and box.right <= WIDTH and box.bottom <= HEIGHT - _BOTTOM
            if inside and box.top >= _TOP - _LINE / 2 and not any(box.touches(other) for other in taken):
                return box
    return None


def _axis(
    title: str, values: Sequence[float], start: float, end: float, unit: str, *, from_zero: bool = False
) -> Axis:
    low, high = (0.0 if from_zero else min(values)), max(values)
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(title, low if from_zero else low - margin, high + margin, start, end, unit)


def _step(span: float) -> float:
    """Return a round distance that cuts the span into three to seven parts."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 6)
