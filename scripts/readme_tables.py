"""Write the tables of README.md from benchmarks/*.json, so that no number in it is copied by hand.

python -m scripts.readme_tables            # write
python -m scripts.readme_tables --check    # fail if a table is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from typing import Any

from scripts.results import BENCHMARKS, write_text

README = BENCHMARKS.parent / "README.md"
_TABLE = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(?=<!-- end of results -->)", flags=re.DOTALL)
RECOVERY = {
    "groupify": "**groupify**",
    "groupify, no labels": "groupify `--labels none`",
    "Torch-Pruning, equal MACs": "Torch-Pruning (group L2 norm)",
    "truncation": "truncation",
    "random weights": "the grouped net from random weights",
}
CALIBRATED = {"groupify, no labels": "groupify"}
PLANNED = {"groupify.demo:fashion_resnet18": "ResNet-18", "groupify.demo:fashion_vgg11_bn": "VGG-11"}
QUANTITIES = {"macs": "MACs", "latency": "latency"}
LATENCY = {
    "resnet18 g=4": "resnet18 g=4",
    "resnet18 g=8": "resnet18 g=8",
    "resnet50 g=4": "resnet50 g=4",
    "resnet50 g=8": "resnet50 g=8",
    "wide_resnet50_2 g=4": "wide_resnet50_2 g=4",
    "vgg16_bn.features g=4": "vgg16_bn, convolutions g=4",
}


def main() -> None:
    """Parse the arguments, write or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if README.md would change")
    arguments = parser.parse_args()
    text = README.read_text("utf-8")
    filled = fill(text)
    if not arguments.check:
        write_text(README, filled)
    elif filled != text:
        sys.exit("README.md is not what benchmarks/ says: run python -m scripts.readme_tables")


def fill(text: str) -> str:
    """Return the README with its tables made anew."""
    return _TABLE.sub(lambda found: found[1] + TABLES[found[2]](results(found[2])) + "\n", text)


def recovery(document: dict[str, Any]) -> str:
    """Top-1 after no, a little and some training, a line per method, a column per number of groups."""
    rows = {(row["method"], row["groups"], row["epochs"]): row for row in document["rows"]}
    groups = sorted({count for _, count, _ in rows})
    trainings = [0.0, 0.1, 1.0]
    after = " / ".join(f"{count:g}" for count in trainings) + " epochs"
    lines = [[f"top-1 after {after}", *(f"g={count}" for count in groups)]]
    for method, title in RECOVERY.items():
        start = CALIBRATED.get(method, method)  # labels change nothing before the training
        cells = []
        for count in groups:
            found = [rows[start if epochs == 0 else method, count, epochs] for epochs in trainings]
            cells.append(" / ".join(f"{row['accuracy_mean']:.2f}" for row in found) + "%")
        lines.append([title, *cells])
    return markdown(lines)


def planner(document: dict[str, Any]) -> str:
    """Top-1 of uniform groups and of the plan at the same cost, a line per model and budget."""
    rows = document["rows"]
    groups = sorted({row["row"].partition(" g=")[2] for row in rows}, key=int)
    lines = [["uniform → planned top-1, at the cost of", *(f"g={count}" for count in groups)]]
    for model, quantity in dict.fromkeys((row["model"], row["row"].partition(" g=")[0]) for row in rows):
        cells = []
        for count in groups:
            same = [row for row in rows if (row["model"], row["row"]) == (model, f"{quantity} g={count}")]
            names = ("uniform", "planned") if same else ()
            means = [statistics.fmean(row[f"{name}_accuracy"] for row in same) for name in names]
            cells.append(" → ".join(f"{mean:.2f}%" for mean in means) or "–")
        dense = next(row["dense_accuracy"] for row in rows if row["model"] == model)
        lines.append([f"{PLANNED[model]} ({dense:.2f}%), same {QUANTITIES[quantity]}", *cells])
    return markdown(lines)


def latency(document: dict[str, Any]) -> str:
    """Milliseconds in ONNX Runtime, a line per model."""
    rows = {row["name"]: row for row in document["rows"]}
    lines = [["ONNX Runtime, 1 thread, batch 1", "dense → grouped", "speed-up", "MACs", "efficiency"]]
    for name, title in LATENCY.items():
        row = rows[name]
        times = (row["latency_ms"][model]["median"] for model in ("dense", "grouped"))
        lines.append(
            [
                title,
                " → ".join(f"{milliseconds:.1f}" for milliseconds in times) + " ms",
                f"**{row['speed_up']:.2f}×**",
                f"÷{row['mac_ratio']:.2f}",
                f"{row['efficiency']:.3f}",
            ]
        )
    return markdown(lines)


def markdown(rows: list[list[str]]) -> str:
    """Format rows, the first one the heading, as a Markdown table."""
    heading, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *others])


def results(name: str) -> dict[str, Any]:
    """Return a result file."""
    found: dict[str, Any] = json.loads((BENCHMARKS / f"{name}.json").read_text("utf-8"))
    return found


TABLES = {"recovery": recovery, "planner": planner, "latency": latency}


if __name__ == "__main__":
    main()
