"""How numbers, changes and convs are written, wherever they are shown."""

from __future__ import annotations

import math

from groupify.paired import Paired
from groupify.structures import Change, SitePlan

# What is said of the speed where the machine was busy and nothing says within what bounds it lies.
UNCERTAIN = "uncertain"


def count(number: float) -> str:
    """``1814073344`` → ``1.81G``."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:g}"


def size(number: float) -> str:
    """``46796608`` → ``44.6 MiB``."""
    for factor, suffix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{number / factor:.1f} {suffix}"
    return f"{number:g} B"


def ratio(value: float) -> str:
    """``3.344`` → ``3.34×``; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.2f}×"


def ratio_within(value: float, within: tuple[float, float] | None) -> str:
    """``3.1, (2.95, 3.2)`` → ``3.10× (2.95–3.20)``; without bounds the ratio alone."""
    return ratio(value) if within is None else f"{ratio(value)} ({within[0]:.2f}–{within[1]:.2f})"


def percent(value: float | None) -> str:
    """A fraction in percent; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.2f}%"


def milliseconds(value: float | None) -> str:
    """``47.166`` → ``47.17 ms``; a dash where there is none."""
    return "–" if value is None else f"{value:.2f} ms"


def points(value: float, digits: int = 2) -> str:
    """``-1.153`` → ``−1.15``."""
    rounded = round(value, digits) + 0.0  # no minus in front of nothing
    return f"{rounded:+.{digits}f}".replace("-", "−")


def lost(changed: Paired) -> str:
    """The drop of accuracy between two models and its error: ``lost 0.31 ± 0.22 points``."""
    verb = "lost" if changed.drop >= 0 else "gained"
    return f"{verb} {abs(changed.drop):.2f} ± {changed.error:.2f} points"


def plural(number: int, word: str) -> str:
    """``(2, "thread")`` → ``2 threads``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def counts(change: Change[int], changed: bool) -> str:
    """``24.6k → 6.14k``, or one number where nothing has changed."""
    return f"{count(change.dense)} → {count(change.grouped)}" if changed else count(change.grouped)


def shape(site: SitePlan) -> str:
    """``64 → 128, 3×3 / 2, 28×28``: channels, kernel, stride, output size."""
    kernel = "×".join(map(str, site.kernel_size))
    steps = set(site.stride)
    stride = "×".join(map(str, steps if len(steps) == 1 else site.stride))
    output = f", {'×'.join(map(str, site.output_size))}" if site.output_size else ""
    return (
        f"{site.in_channels} → {site.out_channels}, {kernel}{'' if steps <= {1} else f' / {stride}'}{output}"
    )


def extras(site: SitePlan) -> str:
    """What stands behind the number of groups."""
    inside = "" if site.structure.is_one_conv else f" in {site.structure}"
    return inside + (" + shuffle" if site.shuffle else "")
