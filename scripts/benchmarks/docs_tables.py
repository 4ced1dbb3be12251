"""A hook of mkdocs: put the results of benchmarks/*.json where a page says ``<!-- table: NAME -->``.

So that no number is copied by hand. A result file that is not there yet is named in the table's place.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
_MARK = re.compile(r"<!-- table: ([\w-]+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of a page.

    Raises:
        KeyError: a page asks for a table that nobody makes.
    """
    return _MARK.sub(lambda found: table(found[1]), markdown)


def table(name: str) -> str:
    """Return one table as Markdown, with the command and the machine that it comes from."""
    command, make = TABLES[name]
    path = BENCHMARKS / f"{name}.json"
    if not path.exists():
        return f"*Not measured yet: `{command}` writes `benchmarks/{name}.json`.*"
    document = json.loads(path.read_text("utf-8"))
    machine = document["machine"]
    if not isinstance(machine, str):
        machine = (
            f"{machine['cpu']} ({machine['simd']}), torch {machine['torch']}, "
            f"onnxruntime {machine['onnxruntime']}"
        )
    lines = [" | ".join(("", *row, "")).strip() for row in make(document)]
    columns = lines[0].count("|") - 1
    lines.insert(1, "|" + "---|" * columns)
    return "\n".join(lines) + f"\n\n`{command}` → `benchmarks/{name}.json`, {machine}"


Rows = list[tuple[str, ...]]


def accuracy(document: dict[str, Any]) -> Rows:
    """A line per method, a column per number of groups."""
    groups = sorted({row["groups"] for row in document["rows"]})
    methods = list(dict.fromkeys(row["method"] for row in document["rows"]))
    rows: Rows = [("top-1 (MACs)", *(f"g={count}" for count in groups))]
    for method in methods:
        found = {row["groups"]: row for row in document["rows"] if row["method"] == method}
        cells = [
            f"{found[count]['accuracy_mean']:.2f}% (÷{found[count]['macs_ratio']:.1f})"
            if count in found
            else "–"
            for count in groups
        ]
        rows.append((method.strip(), *cells))
    return rows


def latency(document: dict[str, Any]) -> Rows:
    """A line per model: times, speed-up, MAC ratio, efficiency."""
    rows: Rows = [("", "dense → grouped", "speed-up", "MACs", "efficiency", "convs in the blocked kernel")]
    for row in document["rows"]:
        times = row["latency_ms"]
        blocked = row["blocked_convs"]["grouped"]
        rows.append(
            (
                row["name"],
                f"{times['dense']['median']:.1f} → {times['grouped']['median']:.1f} ms",
                f"{row['speed_up']:.2f}×",
                f"÷{row['mac_ratio']:.2f}",
                f"{row['efficiency']:.2f}",
                f"{blocked['blocked']} of {blocked['total']}",
            )
        )
    return rows


def peers(document: dict[str, Any]) -> Rows:
    """A line per method, MACs and training."""
    threads = sorted({count for row in document["rows"] for count in row["latency"] or {}})
    trainings = sorted({row["epochs"] for row in document["rows"]})
    head = [f"{count:g} epochs" for count in trainings] + [f"speed-up, {count} thr." for count in threads]
    rows: Rows = [("", "MACs", "params", *head)]
    for key in dict.fromkeys((row["groups"], row["method"]) for row in document["rows"]):
        found = {row["epochs"]: row for row in document["rows"] if (row["groups"], row["method"]) == key}
        one = next(iter(found.values()))
        tops = [f"{found[count]['accuracy_mean']:.2f}%" if count in found else "–" for count in trainings]
        times = one["latency"] or {}
        speeds = [f"{times[count]['speed_up']:.2f}×" if count in times else "–" for count in threads]
        rows.append((key[1], f"÷{one['macs_ratio']:.2f}", f"÷{one['params_ratio']:.2f}", *tops, *speeds))
    return rows


def peers_latency(document: dict[str, Any]) -> Rows:
    """A line per net, MACs and method."""
    threads = sorted({count for row in document["rows"] for count in row["latency"]})
    speeds = [f"{what}, {count} thr." for count in threads for what in ("dense → own", "speed-up")]
    rows: Rows = [("", "top-1", "MACs", "params", *speeds)]
    for row in document["rows"]:
        cells = [f"{row['model'].rpartition(':')[2]}, {row['method']}", f"{row['top1']:.2f}%"]
        cells += [f"÷{row[name]:.2f}" for name in ("macs_ratio", "params_ratio")]
        for count in threads:
            time = row["latency"].get(count)
            cells += (
                [f"{time['dense_ms']:.1f} → {time['ms']:.1f} ms", f"{time['speed_up']:.2f}×"]
                if time
                else ["–", "–"]
            )
        rows.append(tuple(cells))
    return rows


def recovery(document: dict[str, Any]) -> Rows:
    """A line per method and number of groups, a column per training."""
    trainings = sorted({row["epochs"] for row in document["rows"]})
    rows: Rows = [("top-1", "MACs", *(f"{count:g} epochs" for count in trainings))]
    for key in dict.fromkeys((row["groups"], row["method"]) for row in document["rows"]):
        found = {row["epochs"]: row for row in document["rows"] if (row["groups"], row["method"]) == key}
        cells = []
        for count in trainings:
            row = found.get(count)
            spread = "" if row is None or len(row["accuracy"]) < 2 else f" ± {row['accuracy_spread'] / 2:.2f}"
            cells.append("–" if row is None else f"{row['accuracy_mean']:.2f}{spread}%")
        ratio = next(iter(found.values()))["macs_ratio"]
        rows.append((f"{key[1]}, g={key[0]}", f"÷{ratio:.2f}", *cells))
    return rows


def planner(document: dict[str, Any]) -> Rows:
    """A line per model and budget: uniform groups and the plan at the same cost, means over the seeds."""
    titles = ("seeds", "dense", "uniform", "planned", "of uniform's drop closed", "speed-ups of both")
    rows: Rows = [("", *titles)]
    for model, row in dict.fromkeys((one["model"], one["row"]) for one in document["rows"]):
        same = [one for one in document["rows"] if (one["model"], one["row"]) == (model, row)]
        dense, uniform, planned = (
            statistics.fmean(one[f"{name}_accuracy"] for one in same)
            for name in ("dense", "uniform", "planned")
        )
        closed = f"{100 * (planned - uniform) / (dense - uniform):.0f}%" if uniform < dense else "–"
        name = f"{model.rpartition(':')[2]}, {row}"
        timed = [one["speed_up"] for one in same if one["speed_up"]]
        speeds = [statistics.fmean(one[plan] for one in timed) for plan in ("uniform", "planned") if timed]
        tops = (f"{top1:.2f}%" for top1 in (dense, uniform, planned))
        rows.append((name, str(len(same)), *tops, closed, " → ".join(f"{s:.2f}×" for s in speeds) or "–"))
    return rows


def prediction(document: dict[str, Any]) -> Rows:
    """A line per model and plan: predicted and measured milliseconds."""
    rows: Rows = [("", "plan", "predicted", "measured", "error", "error of the speed-up")]
    for row in document["rows"]:
        times = (f"{row[name]:.2f} ms" for name in ("predicted", "measured"))
        errors = (f"{100 * row[name]:+.1f}%" for name in ("error", "speed_up_error"))
        rows.append((row["model"], row["plan"], *times, *errors))
    return rows


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], Rows]]] = {
    "accuracy": ("python -m scripts.benchmarks.accuracy --checkpoint FILE --json FILE", accuracy),
    "latency": ("python -m scripts.benchmarks.latency --json FILE", latency),
    "peers": ("python -m scripts.benchmarks.peers --checkpoint FILE --twin FILE", peers),
    "peers_vgg11": (
        "python -m scripts.benchmarks.peers --model groupify.models.demo:fashion_vgg11_bn --checkpoint FILE "
        "--json benchmarks/peers_vgg11.json",
        peers,
    ),
    "peers_shuffle": (
        "python -m scripts.benchmarks.peers --checkpoint FILE --methods 'groupify*' --groups 4 --epochs 0"
        " --seeds 3 --json benchmarks/peers_shuffle.json",
        peers,
    ),
    "peers_latency": (
        "python -m scripts.benchmarks.peers_latency --checkpoint FILE [--model MODEL]",
        peers_latency,
    ),
    "recovery": ("python -m scripts.benchmarks.recovery --checkpoint FILE --twin FILE", recovery),
    "planner": ("python -m scripts.benchmarks.planner --checkpoint FILE", planner),
    "prediction": ("python -m scripts.benchmarks.prediction --json FILE", prediction),
}
