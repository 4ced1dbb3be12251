"""Draw groupify and its peers: accuracy against speed, one picture for each amount of training.

    python -m scripts.plot_peers [benchmarks/peers.json] [-o docs/peers.svg]

Reads what ``scripts/benchmark_peers.py`` wrote. The x axis is the speed-up in ONNX Runtime with one thread
where every row has been timed, otherwise the MAC ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scripts.plot_readme import ROOT, draw_methods, save


def read_panels(path: Path) -> tuple[dict[float, dict[str, list[dict[str, Any]]]], float, str]:
    """Return the rows by epochs of training and by method, the dense accuracy (%), and the x values' key."""
    document = json.loads(path.read_text("utf-8"))
    panels: dict[float, dict[str, list[dict[str, Any]]]] = {}
    for row in sorted(document["rows"], key=lambda row: (row["epochs"], row["groups"])):
        panels.setdefault(row["epochs"], {}).setdefault(row["method"], []).append(row)
    if not panels:
        raise ValueError("it has no rows")
    timed = all(row["speed_up"] is not None for row in document["rows"])
    # A method has the same colour in every picture, also where some have not run yet.
    names = list(dict.fromkeys(row["method"] for row in document["rows"]))
    whole = {
        epochs: {name: by_method.get(name, []) for name in names} for epochs, by_method in panels.items()
    }
    return whole, float(document["dense_accuracy"]), "speed_up" if timed else "macs_ratio"


def draw(path: Path, target: Path) -> None:
    """Draw the pictures of a result file side by side, each with a scale of its own: training narrows it."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "groupify", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot as plt

    panels, dense, key = read_panels(path)
    figure, row = plt.subplots(
        1, len(panels), figsize=(1 + 3.4 * len(panels), 4.6), layout="constrained", squeeze=False
    )
    for axes, (epochs, by_method) in zip(row[0], panels.items(), strict=True):
        draw_methods(axes, by_method, dense, key)
        axes.set_title("no training" if epochs == 0 else f"{epochs:g} epoch" + ("s" if epochs > 1 else ""))
    row[0][0].set_ylabel("top-1, % of test images")
    handles, labels = row[0][0].get_legend_handles_labels()
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
