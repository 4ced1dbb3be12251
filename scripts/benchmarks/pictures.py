"""The pictures of the README and the documentation, from the result files: accuracy against speed.

    python -m scripts.benchmarks.pictures                             # all of docs/*.svg
    python -m scripts.benchmarks.pictures benchmarks/peers.json -o peers.png

There is one picture for each amount of training, or for each net and size of the images. The x axis is the
speed-up in ONNX Runtime with one thread where every row has been timed, otherwise the MAC ratio.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupify.files import write_aside
from scripts.benchmarks.tables import BENCHMARKS, ROOT, net_name

PICTURES = {"accuracy": "accuracy_latency", "peers": "peers", "peers_latency": "peers_latency"}
# Of the result file "accuracy", the rows that a reader wants to compare.
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


@dataclass(frozen=True)
class Panel:
    """One picture: rows by method, the dense accuracy (%), and what the x values are called in the rows."""

    title: str
    rows: dict[str, list[dict[str, Any]]]
    dense: float
    key: str


def main() -> None:
    """Parse the arguments and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", help="default: all that the documentation shows")
    parser.add_argument("-o", "--output", type=Path, help=".svg or .png file")
    arguments = parser.parse_args()
    wanted = {
        BENCHMARKS / f"{name}.json": ROOT / "docs" / f"{picture}.svg" for name, picture in PICTURES.items()
    }
    if arguments.results is not None:
        if arguments.output is None or arguments.output.suffix not in (".svg", ".png"):
            sys.exit(f"pictures: {arguments.output}: expected -o with a .svg or .png file")
        wanted = {arguments.results: arguments.output}
    for results, output in wanted.items():
        try:
            draw(results, output)
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"pictures: {results}: {type(error).__name__}: {error}")
        print(f"wrote {output}")


def read_panels(path: Path) -> list[Panel]:
    """Return the pictures of a result file, from left to right."""
    document = json.loads(path.read_text("utf-8"))
    if not document["rows"]:
        raise ValueError("it has no rows")
    placed = [_placed(row, document) for row in document["rows"]]
    # A method has the same colour in every picture, also where some have not run yet.
    names = list(dict.fromkeys(row["method"] for *_, row in placed))
    names = [name for name in METHODS if name in names] or names
    placed = [(title, dense, row) for title, dense, row in placed if row["method"] in names]
    timed = all(row.get("speed_up") is not None for *_, row in placed)
    panels = []
    for title, dense in dict.fromkeys((title, dense) for title, dense, _ in placed):
        rows = sorted((row for at, _, row in placed if at == title), key=lambda row: row["groups"])
        by_method = {name: [row for row in rows if row["method"] == name] for name in names}
        panels.append(Panel(title, by_method, dense, "speed_up" if timed else "macs_ratio"))
    return panels


def _placed(row: dict[str, Any], document: dict[str, Any]) -> tuple[str, float, dict[str, Any]]:
    """Return the title of a row's picture, the dense accuracy (%), and the row as it is drawn."""
    if "side" not in row:
        epochs, dense = row.get("epochs", 0), document["dense_accuracy"]
        title = "no training" if epochs == 0 else f"{epochs:g} epoch" + ("s" if epochs > 1 else "")
        return title, float(dense), row
    net, side, dense = net_name(row["model"]), row["side"], row["dense_top1"]
    speed_up = row["latency"].get("1", {}).get("speed_up")
    drawn = {**row, "accuracy_mean": row["top1"], "accuracy_spread": 0.0, "speed_up": speed_up}
    return f"{net}, {side}×{side}\ndense {dense:.2f}%", dense, drawn


def draw(path: Path, target: Path) -> None:
    """Draw the pictures of a result file side by side, each with a scale of its own: training narrows it."""
    import matplotlib as mpl

    mpl.use("Agg")
    # The same input gives the same file, byte for byte; text stays text.
    mpl.rcParams.update({"svg.hashsalt": "groupify", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot as plt

    panels = read_panels(path)
    alone = len(panels) == 1
    size = (7.0, 4.2) if alone else (1 + 3.4 * len(panels), 4.6)
    figure, (row,) = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, panel in zip(row, panels, strict=True):
        draw_methods(axes, panel)
    row[0].set_ylabel("top-1, % of test images")
    if alone:
        row[0].legend(fontsize=8, loc="lower left")
    else:
        for axes, panel in zip(row, panels, strict=True):
            axes.set_title(panel.title)
        handles, labels = row[0].get_legend_handles_labels()
        if len({panel.dense for panel in panels}) > 1:
            labels = ["dense" if label.startswith("dense") else label for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    save(figure, target)
    plt.close(figure)


def draw_methods(axes: Any, panel: Panel) -> None:
    """Draw one line per method."""
    dense = panel.dense
    axes.axhline(dense, color="#999999", linewidth=1, linestyle="--", label=f"dense {dense:.2f}%")
    for index, (method, rows) in enumerate(panel.rows.items()):
        axes.errorbar(
            [row[panel.key] for row in rows],
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
    worst = min(row["accuracy_mean"] for rows in panel.rows.values() for row in rows)
    lowest = max(worst, dense - SHOWN_POINTS)
    margin = 0.06 * (dense - lowest)
    axes.set_ylim(lowest - margin, dense + margin)
    axes.set_xlabel("speed-up in ONNX Runtime" if panel.key == "speed_up" else "MACs: dense ÷ converted")
    axes.grid(alpha=0.3)


def save(figure: Any, target: Path) -> None:
    """Write a figure aside, then rename it."""
    drawn = io.BytesIO()
    metadata = {"Date": None} if target.suffix == ".svg" else None
    figure.savefig(drawn, format=target.suffix.lstrip("."), dpi=150, metadata=metadata)
    write_aside(target, drawn.getvalue())


if __name__ == "__main__":
    main()
