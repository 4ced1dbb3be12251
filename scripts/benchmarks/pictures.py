"""Draw the README's picture: accuracy against saved MACs, one line per method.

    python -m scripts.benchmarks.pictures [benchmarks/accuracy.json] [-o docs/accuracy_latency.svg]

Reads what ``scripts/benchmarks/accuracy.py --json`` wrote. Where every row has a ``speed_up`` (measured in
ONNX Runtime), that is the x axis, otherwise it is the MAC ratio.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from groupify.files import write_aside

ROOT = Path(__file__).resolve().parent.parent.parent
# The rows of the table that a reader wants to compare; a file without any of them is drawn whole.
METHODS = (
    "truncation + refresh",
    "truncation + clustering by norm + refresh",
    "Torch-Pruning + refresh, equal MACs",
    "least squares, in order",
    "groupify (clustering by data)",
    "groupify, reconstruction",
    "groupify, grouped-pointwise, equal MACs",
)
# Okabe and Ito (2008): told apart by colour-blind readers too.
COLOURS = ("#e69f00", "#56b4e9", "#cc79a7", "#d55e00", "#009e73", "#0072b2", "#555555", "#a6761d", "#000000")
MARKERS = "osD^vPX*h"
SHOWN_POINTS = 25.0  # below the dense accuracy; what is worse leaves the picture


def read_rows(path: Path) -> tuple[dict[str, list[dict[str, Any]]], float, str]:
    """Return the rows by method, by rising groups, the dense accuracy (%), and the key of the x values."""
    document = json.loads(path.read_text("utf-8"))
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(document["rows"], key=lambda row: row["groups"]):
        by_method.setdefault(row["method"], []).append(row)
    if not by_method:
        raise ValueError("it has no rows")
    chosen = {name: by_method[name] for name in METHODS if name in by_method} or by_method
    timed = all(row.get("speed_up") is not None for rows in chosen.values() for row in rows)
    return chosen, float(document["dense_accuracy"]), "speed_up" if timed else "macs_ratio"


def draw(path: Path, target: Path) -> None:
    """Draw the picture of a result file."""
    import matplotlib as mpl

    mpl.use("Agg")
    # The same input gives the same file, byte for byte; text stays text.
    mpl.rcParams.update({"svg.hashsalt": "groupify", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot as plt

    by_method, dense, key = read_rows(path)
    figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    draw_methods(axes, by_method, dense, key)
    axes.set_ylabel("top-1, % of test images")
    axes.legend(fontsize=8, loc="lower left")
    save(figure, target)
    plt.close(figure)


def draw_methods(axes: Any, by_method: dict[str, list[dict[str, Any]]], dense: float, key: str) -> None:
    """Draw one line per method, with ``key`` as the x axis."""
    axes.axhline(dense, color="#999999", linewidth=1, linestyle="--", label=f"dense {dense:.2f}%")
    for index, (method, rows) in enumerate(by_method.items()):
        axes.errorbar(
            [row[key] for row in rows],
            [row["accuracy_mean"] for row in rows],
            # The spread is that of all seeds, from the worst to the best.
            yerr=[row["accuracy_spread"] / 2 for row in rows],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=2.2 if method.startswith("groupify") else 1.2,
            capsize=3,
            label=method,
        )
    worst = min(row["accuracy_mean"] for rows in by_method.values() for row in rows)
    lowest = max(worst, dense - SHOWN_POINTS)
    margin = 0.06 * (dense - lowest)
    axes.set_ylim(lowest - margin, dense + margin)
    axes.set_xlabel("speed-up in ONNX Runtime" if key == "speed_up" else "MACs: dense ÷ converted")
    axes.grid(alpha=0.3)


def save(figure: Any, target: Path) -> None:
    """Write a figure aside, then rename it."""
    drawn = io.BytesIO()
    metadata = {"Date": None} if target.suffix == ".svg" else None
    figure.savefig(drawn, format=target.suffix.lstrip("."), dpi=150, metadata=metadata)
    write_aside(target, drawn.getvalue())


def main() -> None:
    """Parse the arguments and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "benchmarks" / "accuracy.json")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "accuracy_latency.svg")
    arguments = parser.parse_args()
    if arguments.output.suffix not in (".svg", ".png"):
        sys.exit(f"plot_readme: {arguments.output}: expected a .svg or .png file")
    try:
        draw(arguments.results, arguments.output)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"plot_readme: {arguments.results}: {type(error).__name__}: {error}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
