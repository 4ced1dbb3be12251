"""What a fine-tune has brought, in a line."""

from __future__ import annotations

from collections.abc import Iterator

from groupify.reporting.results import Report


def training_lines(report: Report) -> Iterator[str]:
    """Say which weights a fine-tune has left, and by how much they are better; nothing without training."""
    chosen = report.chosen
    if chosen is None:
        return
    gains = {row.step: row.gain for row in report.history if row.gain is not None}
    of = f"the loss on {chosen.images} held-out images"
    if chosen.step > 0:
        gain = gains[chosen.step]
        yield f"training: the weights of step {chosen.step} lower {of} by {gain.mean:.4f} ± {gain.error:.4f}"
        return
    best = max(gains.values(), key=lambda gain: gain.mean, default=None)
    by = "" if best is None else f": at best it rose by {-best.mean:.4f} ± {best.error:.4f}"
    yield f"training: not taken, since it did not lower {of}{by}"
