"""Write the tables of README.md from benchmarks/*.json, so that no number in it is copied by hand.

python -m scripts.benchmarks.tables            # write
python -m scripts.benchmarks.tables --check    # fail if a table is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from groupify.files import write_aside
from scripts.benchmarks.harness import BENCHMARKS

README = BENCHMARKS.parent / "README.md"
_TABLE = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(?=<!-- end of results -->)", flags=re.DOTALL)
LATENCY = ("resnet18 g=4", "resnet18 g=8", "resnet50 g=4", "resnet50 g=8")  # of more in docs/kernels.md


def main() -> None:
    """Parse the arguments, write or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if README.md would change")
    arguments = parser.parse_args()
    text = README.read_text("utf-8")
    filled = fill(text)
    if not arguments.check:
        write_aside(README, filled)
    elif filled != text:
        sys.exit("README.md is not what benchmarks/ says: run python -m scripts.benchmarks.tables")


def fill(text: str) -> str:
    """Return the README with its tables made anew."""
    return _TABLE.sub(lambda found: found[1] + TABLES[found[2]](results(found[2])) + "\n", text)


def peers(document: dict[str, Any]) -> str:
    """Top-1 after each training, and the speed-up: a line per method, a column per MACs."""
    rows = {(row["method"], row["groups"], row["epochs"]): row for row in document["rows"]}
    groups = sorted({count for _, count, _ in rows})
    trainings = sorted({epochs for *_, epochs in rows})
    after = " / ".join(f"{count:g}" for count in trainings) + " epochs, and speed-up"
    saved = (rows["groupify", count, 0.0]["macs_ratio"] for count in groups)
    lines = [[f"top-1 after {after}", *(f"MACs ÷{ratio:.1f}" for ratio in saved)]]
    for method in dict.fromkeys(name for name, *_ in rows):
        cells = []
        for count in groups:
            found = [rows.get((method, count, epochs)) for epochs in trainings]
            tops = " / ".join("–" if row is None else f"{row['accuracy_mean']:.1f}" for row in found)
            speed = next((row["speed_up"] for row in found if row and row["speed_up"]), None)
            cells.append(f"{tops}%" + ("" if speed is None else f", {speed:.2f}×"))
        lines.append([f"**{method}**" if method.startswith("groupify") else method, *cells])
    return markdown(lines)


def latency(document: dict[str, Any]) -> str:
    """Milliseconds in ONNX Runtime, a line per model."""
    rows = {row["name"]: row for row in document["rows"]}
    lines = [["ONNX Runtime, 1 thread, batch 1", "dense → grouped", "speed-up", "MACs", "efficiency"]]
    for name in LATENCY:
        row = rows[name]
        times = (row["latency_ms"][model]["median"] for model in ("dense", "grouped"))
        lines.append(
            [
                name,
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


TABLES = {"peers": peers, "latency": latency}


if __name__ == "__main__":
    main()
