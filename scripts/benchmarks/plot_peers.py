"""Draw groupify and its peers: accuracy against speed, one picture for each amount of training.

    python -m scripts.benchmarks.plot_peers [benchmarks/peers.json] [-o docs/peers.svg]
    python -m scripts.benchmarks.plot_peers benchmarks/peers_latency.json -o docs/peers_latency.svg

Reads what ``scripts/benchmarks/peers.py`` wrote, or ``scripts/benchmarks/peers_latency.py``: then one picture
for each net. The x axis is the speed-up in ONNX Runtime with one thread where every row has been timed,
otherwise the MAC ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks.pictures import ROOT, draw_methods, save


@dataclass(frozen=True)
class Panel:
    """One picture: rows by method, the dense accuracy (%), and what the x values are called in the rows."""

    title: str
    rows: dict[str, list[dict[str, Any]]]
    dense: float
    key: str


def read_panels(path: Path) -> list[Panel]:
    """Return the pictures of a result file, from left to right."""
    document = json.loads(path.read_text("utf-8"))
    if not document["rows"]:
        raise ValueError("it has no rows")
    placed = [_placed(row, document) for row in document["rows"]]
    timed = all(row["speed_up"] is not None for *_, row in placed)
    # A method has the same colour in every picture, also where some have not run yet.
    names = list(dict.fromkeys(row["method"] for *_, row in placed))
    panels = []
    for title, dense in dict.fromkeys((title, dense) for title, dense, _ in placed):
        rows = sorted((row for at, _, row in placed if at == title), key=lambda row: row["groups"])
        by_method = {name: [row for row in rows if row["method"] == name] for name in names}
        panels.append(Panel(title, by_method, dense, "speed_up" if timed else "macs_ratio"))
    return panels


def _placed(row: dict[str, Any], document: dict[str, Any]) -> tuple[str, float, dict[str, Any]]:
    """Return the title of a row's picture, the dense accuracy (%), and the row as it is drawn."""
    if "side" not in row:
        epochs, dense = row["epochs"], document["dense_accuracy"]
        title = "no training" if epochs == 0 else f"{epochs:g} epoch" + ("s" if epochs > 1 else "")
        return title, float(dense), row
    net, side, dense = row["model"].rpartition(":")[2], row["side"], row["dense_top1"]
    speed_up = row["latency"].get("1", {}).get("speed_up")
    drawn = {**row, "accuracy_mean": row["top1"], "accuracy_spread": 0.0, "speed_up": speed_up}
    return f"{net}, {side}×{side}\ndense {dense:.2f}%", dense, drawn


def draw(path: Path, target: Path) -> None:
    """Draw the pictures of a result file side by side, each with a scale of its own: training narrows it."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "groupify", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot as plt

    panels = read_panels(path)
    figure, row = plt.subplots(
        1, len(panels), figsize=(1 + 3.4 * len(panels), 4.6), layout="constrained", squeeze=False
    )
    for axes, panel in zip(row[0], panels, strict=True):
        draw_methods(axes, panel.rows, panel.dense, panel.key)
        axes.set_title(panel.title)
    row[0][0].set_ylabel("top-1, % of test images")
    handles, labels = row[0][0].get_legend_handles_labels()
    if len({panel.dense for panel in panels}) > 1:
        labels = ["dense" if label.startswith("dense") else label for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    save(figure, target)
    plt.close(figure)


def main() -> None:
    """Parse the arguments and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "benchmarks" / "peers.json")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "peers.svg")
    arguments = parser.parse_args()
    if arguments.output.suffix not in (".svg", ".png"):
        sys.exit(f"plot_peers: {arguments.output}: expected a .svg or .png file")
    try:
        draw(arguments.results, arguments.output)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"plot_peers: {arguments.results}: {type(error).__name__}: {error}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
