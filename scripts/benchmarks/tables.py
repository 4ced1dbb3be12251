"""The result files of ``benchmarks/`` as Markdown tables, so that no number in a page is copied by hand.

    python -m scripts.benchmarks.tables            # write the tables of README.md
    python -m scripts.benchmarks.tables --check    # fail if one of them is not what the results say
    python -m scripts.benchmarks.tables peers      # print one

The documentation's tables come into being when it is built: ``docs/conf.py`` has them put where a page says
``<!-- table: NAME -->``. A result file that is not there yet is named in its table's place.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import math
import re
import statistics
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from groupify.files import write_aside

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
README = ROOT / "README.md"
README_LATENCY = ("resnet18 g=4", "resnet18 g=8", "resnet50 g=4", "resnet50 g=8")
_MISSED = 0.02  # of the MACs wanted
_SHOWN = 0.02  # share of the time below which a kernel is not told
_IN_README = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(?=<!-- end of results -->)", flags=re.DOTALL)
_IN_PAGE = re.compile(r"<!-- table: ([\w-]+) -->")

Document = dict[str, Any]
Table = list[tuple[str, ...]]  # the first row is the heading


def main() -> None:
    """Parse the arguments, then print, compare or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"print: {', '.join(TABLES)}")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if README.md would change")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(TABLES):
        parser.error(f"no table is called {', '.join(unknown)}: there are {', '.join(TABLES)}")
    for name in arguments.names:
        print(table(name))
    if arguments.names:
        return
    text = README.read_text("utf-8")
    filled = fill(text)
    if not arguments.check:
        write_aside(README, filled)
    elif filled != text:
        sys.exit("README.md is not what benchmarks/ says: run python -m scripts.benchmarks.tables")


def fill(text: str) -> str:
    """Return the README with its tables made anew."""
    return _IN_README.sub(
        lambda found: found[1] + markdown(README_TABLES[found[2]](read(found[2]))) + "\n", text
    )


def fill_page(text: str) -> str:
    """Return a page of the documentation with its tables.

    Raises:
        KeyError: a page asks for a table that nobody makes.
    """
    return _IN_PAGE.sub(lambda found: table(found[1]), text)


def table(name: str) -> str:
    """Return one table as Markdown, with the command and the machine that it comes from."""
    command, make = TABLES[name]
    command = f"python -m scripts.benchmarks.{command}"
    if not (BENCHMARKS / f"{name}.json").exists():
        return f"*Not measured yet: `{command}` writes `benchmarks/{name}.json`.*"
    document = read(name)
    machine = document["machine"]
    where = f"{machine['cpu']} ({machine['simd']}), torch {machine['torch']}"
    where += f", onnxruntime {machine['onnxruntime']}"
    return f"{markdown(make(document))}\n\n`{command}` → `benchmarks/{name}.json`, {where}"


def read(name: str) -> Document:
    """Return a result file."""
    found: Document = json.loads((BENCHMARKS / f"{name}.json").read_text("utf-8"))
    return found


def markdown(rows: Table) -> str:
    """Format rows as a Markdown table."""
    heading, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *others])


# what the tables share ------------------------------------------------------------------------------


def times(ratio: float) -> str:
    """How many times faster."""
    return f"{ratio:.2f}×"


def saved(ratio: float, digits: int = 2) -> str:
    """How many times fewer MACs or parameters."""
    return f"÷{ratio:.{digits}f}"


def percent(value: float) -> str:
    """An accuracy."""
    return f"{value:.2f}%"


def milliseconds(*values: float) -> str:
    """Times before and after."""
    return " → ".join(f"{value:.1f}" for value in values) + " ms"


def grouped_by(rows: Iterable[Document], *names: str) -> dict[tuple[Any, ...], list[Document]]:
    """Return the rows by the values of some fields, in the order in which those come."""
    found: dict[tuple[Any, ...], list[Document]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def by_training(rows: list[Document]) -> list[tuple[tuple[int, str], list[Document | None]]]:
    """Return (groups, method) and the row after each training, None where there is none."""
    trainings = trainings_of(rows)
    lines = []
    for key, same in grouped_by(rows, "groups", "method").items():
        found = {row["epochs"]: row for row in same}
        lines.append(((key[0], key[1]), [found.get(count) for count in trainings]))
    return lines


def trainings_of(rows: list[Document]) -> list[float]:
    """All numbers of epochs."""
    return sorted({row["epochs"] for row in rows})


def threads_of(rows: list[Document]) -> list[str]:
    """All numbers of threads that something was timed with."""
    return sorted({count for row in rows for count in row["latency"] or {}})


# the tables -----------------------------------------------------------------------------------------


def accuracy(document: Document) -> Table:
    """A line per method, a column per number of groups."""
    groups = sorted({row["groups"] for row in document["rows"]})
    rows: Table = [("top-1 (MACs)", *(f"g={count}" for count in groups))]
    for (method,), same in grouped_by(document["rows"], "method").items():
        cells = {
            row["groups"]: f"{percent(row['accuracy_mean'])} ({saved(row['macs_ratio'], 1)})" for row in same
        }
        rows.append((method.strip(), *(cells.get(count, "–") for count in groups)))
    return rows


def conversion(document: Document) -> Table:
    """A line per step: seconds of the median round, and how many dense forward passes that is."""
    rounds = sorted(document["rounds"], key=lambda one: float(one["ratio"]))
    middle = rounds[len(rounds) // 2]
    forward = statistics.fmean(middle["forward_seconds"])
    steps = {
        f"conversion of {middle['sites']} convs": middle["conversion_seconds"],
        **middle["breakdown_seconds"],
    }
    rows: Table = [
        (f"{document['model']}, {document['images']} images of {document['size']}²", "seconds", "× forward"),
        ("dense forward pass", f"{forward:.2f}", "1.00"),
        *((name, f"{seconds:.2f}", f"{seconds / forward:.2f}") for name, seconds in steps.items()),
    ]
    ratios = [one["ratio"] for one in rounds]
    peak = max(one["peak_memory_bytes"] for one in rounds) / 2**30
    rows.append((f"over {len(rounds)} rounds", f"{peak:.2f} GiB", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"))
    return rows


def latency(document: Document) -> Table:
    """A line per model: times, speed-up, MAC ratio, efficiency."""
    rows: Table = [("", "dense → grouped", "speed-up", "MACs", "efficiency", "convs in the blocked kernel")]
    for row in document["rows"]:
        medians = (row["latency_ms"][name]["median"] for name in ("dense", "grouped"))
        blocked = row["blocked_convs"]["grouped"]
        rows.append(
            (
                row["name"],
                milliseconds(*medians),
                times(row["speed_up"]),
                saved(row["mac_ratio"]),
                f"{row['efficiency']:.2f}",
                f"{blocked['blocked']} of {blocked['total']}",
            )
        )
    return rows


def narrow_groups(document: Document) -> Table:
    """A line per conv: measured and expected speed-up, a column per group width."""
    widths = sorted({int(width) for row in document["rows"] for width in row["speed_up"]})
    rows: Table = [("speed-up (expected)", *(f"width {width}" for width in widths))]
    for row in document["rows"]:
        gains, expected, kernel = row["speed_up"], row.get("expected") or {}, row["kernel"]
        cells = (
            f"{gains[width]:.2f} ({expected.get(width, float('nan')):.2f})" if width in gains else ""
            for width in map(str, widths)
        )
        rows.append((f"{row['channels']}, {kernel}×{kernel}, {row['side']}²", *cells))
    return rows


def peers(document: Document) -> Table:
    """A line per method and MACs: a column per training, and the speed-ups."""
    threads = threads_of(document["rows"])
    trainings = trainings_of(document["rows"])
    head = [f"{count:g} epochs" for count in trainings] + [f"speed-up, {count} thr." for count in threads]
    rows: Table = [("", "MACs", "params", *head)]
    for (_, method), after in by_training(document["rows"]):
        one = next(row for row in after if row)
        tops = [percent(row["accuracy_mean"]) if row else "–" for row in after]
        timed = one["latency"] or {}
        speeds = [times(timed[count]["speed_up"]) if count in timed else "–" for count in threads]
        rows.append((method, saved(one["macs_ratio"]), saved(one["params_ratio"]), *tops, *speeds))
    return rows


def peers_latency(document: Document) -> Table:
    """A line per net, MACs and method."""
    threads = threads_of(document["rows"])
    speeds = [f"{what}, {count} thr." for count in threads for what in ("dense → own", "speed-up")]
    rows: Table = [("", "top-1", "MACs", "params", *speeds)]
    for row in document["rows"]:
        cells = [f"{net_name(row['model'])}, {row['method']}", percent(row["top1"])]
        cells += [saved(row[name]) for name in ("macs_ratio", "params_ratio")]
        for count in threads:
            timed = row["latency"].get(count)
            cells += (
                [milliseconds(timed["dense_ms"], timed["ms"]), times(timed["speed_up"])]
                if timed
                else ["–", "–"]
            )
        rows.append(tuple(cells))
    return rows


def recovery(document: Document) -> Table:
    """A line per size and method: a column per training, means over the seeds; the least that it brought."""
    trainings = trainings_of(document["rows"])
    titles = (f"{count:g} epochs (drop)" for count in trainings)
    lines: Table = [("MACs wanted", "method", "MACs", *titles, "seeds", "least gain over its start")]
    for (size, method), same in grouped_by(document["rows"], "size", "method").items():
        after = {count: rows for (count,), rows in grouped_by(same, "epochs").items()}
        starts = {row["seed"]: row["top1"] for row in after.get(0.0, [])}
        gains = [row["top1"] - starts[row["seed"]] for row in same if row["epochs"] and row["seed"] in starts]
        lines.append(
            (
                saved(size, 1),
                method,
                saved(statistics.fmean(row["macs_ratio"] for row in same)),
                *(_after_training(after.get(count, [])) for count in trainings),
                str(len({row["seed"] for row in same})),
                f"{min(gains):+.2f}" if gains else "–",
            )
        )
    return lines


def _after_training(rows: list[Document]) -> str:
    if not rows:
        return "–"
    tops = [row["top1"] for row in rows]
    spread = f" ± {(max(tops) - min(tops)) / 2:.2f}" if len(tops) > 1 else ""
    return f"{percent(statistics.fmean(tops))}{spread} ({statistics.fmean(row['drop'] for row in rows):.2f})"


def planner(document: Document) -> Table:
    """A line per model and budget: uniform groups and the plan at the same cost, means over the seeds."""
    titles = ("seeds", "dense", "uniform", "planned", "of uniform's drop closed", "speed-ups of both")
    rows: Table = [("", *titles)]
    for (model, row), same in grouped_by(document["rows"], "model", "row").items():
        dense, uniform, planned = (
            statistics.fmean(one[f"{name}_accuracy"] for one in same)
            for name in ("dense", "uniform", "planned")
        )
        closed = f"{100 * (planned - uniform) / (dense - uniform):.0f}%" if uniform < dense else "–"
        timed = [one["speed_up"] for one in same if one["speed_up"]]
        speeds = [times(statistics.fmean(one[p] for one in timed)) for p in ("uniform", "planned") if timed]
        tops = map(percent, (dense, uniform, planned))
        rows.append((f"{net_name(model)}, {row}", str(len(same)), *tops, closed, " → ".join(speeds) or "–"))
    return rows


def prediction(document: Document) -> Table:
    """A line per model and plan: predicted and measured milliseconds."""
    rows: Table = [("", "plan", "predicted", "measured", "error", "error of the speed-up")]
    for row in document["rows"]:
        both = (f"{row[name]:.2f} ms" for name in ("predicted", "measured"))
        errors = (f"{100 * row[name]:+.1f}%" for name in ("error", "speed_up_error"))
        in_int8 = ", int8" if row.get("precision") == "int8" else ""
        rows.append((row["model"] + in_int8, row["plan"], *both, *errors))
    return rows


def int8(document: Document) -> Table:
    """A line per plan: latency against the dense model in int8, accuracy, memory and file size."""
    threads = sorted({count for row in document["rows"] for count in row["latency"]})
    speeds = [f"{what}, {count} thr." for count in threads for what in ("ms", "over dense int8")]
    rows: Table = [("planned for int8", "MACs", *speeds, "top-1", "drop", "peak memory", "file")]
    for row in document["rows"]:
        cells = [row["name"], saved(row["mac_ratio"])]
        for count in threads:
            one = row["latency"][count]
            cells += [milliseconds(one["dense int8"], one["planned int8"]), times(one["speed_up"])]
        tops = row["top1"] and [100 * row["top1"][name] for name in ("dense int8", "planned int8")]
        cells += ["–", "–"] if tops is None else [" → ".join(map(percent, tops)), f"{tops[0] - tops[1]:.2f}"]
        for sizes in (row["peak_memory_bytes"], row["file_bytes"]):
            cells.append(f"{sizes['dense int8'] / 2**20:.1f} → {sizes['planned int8'] / 2**20:.1f} MiB")
        rows.append(tuple(cells))
    return rows


def efficiency(document: Document) -> Table:
    """A line per plan: MACs, latency, and how much of the MACs saved shows in it."""
    threads = sorted({count for row in document["rows"] for count in row["latency"]})
    speeds = [f"{what}, {count} thr." for count in threads for what in ("ms", "speed-up ÷ MAC ratio")]
    rows: Table = [("", "planned for", "MACs", *speeds, "time of its kernels")]
    for row in document["rows"]:
        cells = [row["model"], row["budget"], saved(row["mac_ratio"])]
        for count in threads:
            one = row["latency"][count]
            cells += [
                milliseconds(one["dense"], one["planned"]),
                f"{one['speed_up'] / row['mac_ratio']:.2f}",
            ]
        kernels = ", ".join(
            f"{name} {share:.0%}" for name, share in row["kernels"].items() if share >= _SHOWN
        )
        rows.append((*cells, kernels))
    return rows


def models(document: Document) -> Table:
    """A line per model: how far it came, and the seconds of it."""
    rows = document["rows"]
    counts = Counter(row["result"] for row in rows)
    results = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    titles = ("kind", "input", "convs", results, "batch", "export", "conversion", "ONNX Runtime")
    lines: Table = [(f"{len(rows)} models", *titles)]
    for row in rows:
        seconds, batch = row["stages"], row["batch"] if row["batch"] in ("dynamic", "fixed") else "–"
        converting = [seconds[stage] for stage in ("plan", "convert") if stage in seconds]
        lines.append(
            (
                row["name"],
                row["kind"],
                "×".join(map(str, row["input"] or [])),
                f"{row['converted']} / {row['convs']}" if row["convs"] else "",
                f"{row['result']}{': ' if row['reason'] else ''}{row['reason'] or ''}".replace("|", "\\|"),
                batch if "torch.export" in seconds else "",
                f"{seconds['torch.export']:.1f}" if "torch.export" in seconds else "",
                f"{sum(converting):.1f}" if converting else "",
                "" if row["parity"] is None else f"{row['parity']:.0e}",
            )
        )
    return lines


def rivals(document: Document) -> Table:
    """A line per net, size and method; means over the seeds, and what groupify is ahead by."""
    titles = ("MACs", "parameters", "top-1", "drop", "KL to the dense net", "groupify is ahead by")
    lines: Table = [("net, MACs wanted", "method", *titles)]
    for (net, size), same in grouped_by(document["rows"], "net", "size").items():
        ours = {row["seed"]: row for row in same if row["method"] == "groupify"}
        for (method,), found in grouped_by(same, "method").items():
            means = {
                name: statistics.fmean(row[name] for row in found)
                for name in ("macs_ratio", "params_ratio", "top1", "drop", "divergence")
            }
            tops = [row["top1"] for row in found]
            pairs = [(ours[row["seed"]]["right"], row["right"]) for row in found if row["seed"] in ours]
            lines.append(
                (
                    f"{net} {saved(size, 1)}",
                    method,
                    saved(means["macs_ratio"]),
                    saved(means["params_ratio"]),
                    f"{percent(means['top1'])} ± {(max(tops) - min(tops)) / 2:.2f}",
                    f"{means['drop']:.2f}",
                    f"{means['divergence']:.4f}",
                    "–" if method == "groupify" or not pairs else ahead(pairs),
                )
            )
    return lines


def best_structures(document: Document) -> Table:
    """A line per method on ResNet-18, a column per size; means over the seeds; MACs that miss it too."""
    cells: dict[str, list[str]] = {"groupify": [], "spatial SVD": [], "Tucker-2": []}
    sizes = sorted({row["size"] for row in document["rows"]})
    for size, (method, line) in itertools.product(sizes, cells.items()):
        wanted = ("fashion_resnet18", size, method)
        rows = [row for row in document["rows"] if (row["net"], row["size"], row["method"]) == wanted]
        quantities = ("top1", "divergence", "macs_ratio")
        top1, divergence, ratio = (statistics.fmean(row[name] for row in rows) for name in quantities)
        missed = f" ({saved(ratio)})" if abs(ratio / size - 1) > _MISSED else ""
        line.append(f"{percent(top1)}, {divergence:.4f}{missed}")
    titles = (f"MACs {saved(size, 1)}" for size in sizes)
    return [("top-1, KL to the dense net", *titles), *((name, *line) for name, line in cells.items())]


def imagenet(document: Document) -> Table:
    """A line per net, size and method, and one for each result that others published: all untrained."""
    lines = [
        {
            "net": net,
            "saved": 100 * (1 - 1 / _mean(rows, "macs_ratio")),
            "method": method,
            "drop": _mean(rows, "drop"),
            "source": "measured here",
        }
        for (net, method, _), rows in grouped_by(document["rows"], "net", "method", "size").items()
    ]
    lines += document["published"]
    lines.sort(key=lambda line: (line["net"], line["saved"]))
    return [
        ("net", "MACs saved", "method", "drop of top-1, points", "source"),
        *(
            (line["net"], f"{line['saved']:.0f}%", line["method"], f"{line['drop']:.2f}", line["source"])
            for line in lines
        ),
    ]


def _mean(rows: list[Document], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def craft(document: Document) -> Table:
    """A line per method and size: what its score maps are off by."""
    lines: Table = [("MACs wanted", "method", "MACs", "parameters", "rms of the score maps", "F", "seconds")]
    for row in document["rows"]:
        wanted = saved(row["size"], 0) if row["size"] else "–"
        ratios = (saved(row[name]) for name in ("macs_ratio", "params_ratio"))
        lines.append(
            (
                wanted,
                row["method"],
                *ratios,
                f"{row['rms']:.4f}",
                f"{row['f_score']:.3f}",
                f"{row['seconds']:.0f}",
            )
        )
    return lines


def ahead(pairs: list[tuple[str, str]]) -> str:
    """Points of accuracy that the first of each pair has more, with the 95% interval over the images.

    Args:
        pairs: which images two methods had right, for each seed.
    """
    images = [statistics.fmean(values) for values in zip(*map(_differences, pairs), strict=True)]
    mean = 100 * statistics.fmean(images)
    half = 196 * statistics.stdev(images) / math.sqrt(len(images))
    return f"{mean:+.2f} ({mean - half:+.2f} … {mean + half:+.2f})"


def _differences(pair: tuple[str, str]) -> list[int]:
    ours, theirs = (_bits(text) for text in pair)
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def _bits(text: str) -> list[int]:
    """Whether each image was right; what is beyond the last image is 0."""
    return [byte >> (7 - bit) & 1 for byte in zlib.decompress(base64.b64decode(text)) for bit in range(8)]


def readme_peers(document: Document) -> Table:
    """Top-1 after each training, and the speed-up: a line per method, a column per MACs."""
    rows = document["rows"]
    after = " / ".join(f"{count:g}" for count in trainings_of(rows)) + " epochs, and speed-up"
    ratios = {
        row["groups"]: row["macs_ratio"] for row in rows if (row["method"], row["epochs"]) == ("groupify", 0)
    }
    lines: Table = [
        (f"top-1 after {after}", *(f"MACs {saved(ratios[count], 1)}" for count in sorted(ratios)))
    ]
    cells: dict[str, list[str]] = {}
    for (_, method), found in sorted(by_training(rows), key=lambda line: line[0][0]):
        tops = " / ".join("–" if row is None else f"{row['accuracy_mean']:.1f}" for row in found)
        speed = next((row["speed_up"] for row in found if row and row["speed_up"]), None)
        cells.setdefault(method, []).append(f"{tops}%" + ("" if speed is None else f", {times(speed)}"))
    for method in dict.fromkeys(row["method"] for row in rows):
        lines.append((f"**{method}**" if method.startswith("groupify") else method, *cells[method]))
    return lines


def readme_latency(document: Document) -> Table:
    """Milliseconds in ONNX Runtime, a line per model; docs/kernels.md has more of them."""
    rows = {row["name"]: row for row in document["rows"]}
    lines: Table = [("ONNX Runtime, 1 thread, batch 1", "dense → grouped", "speed-up", "MACs", "efficiency")]
    for name in README_LATENCY:
        row = rows[name]
        medians = (row["latency_ms"][model]["median"] for model in ("dense", "grouped"))
        speed, ratio = f"**{times(row['speed_up'])}**", saved(row["mac_ratio"])
        lines.append((name, milliseconds(*medians), speed, ratio, f"{row['efficiency']:.3f}"))
    return lines


def net_name(spec: str) -> str:
    """Return a model's name without its module."""
    return spec.rpartition(":")[2]


def ranking(document: Document) -> Table:
    """A line per net and way to predict."""
    titles = ("plans", "their KL to the dense net", "rank correlation with the KL", "with the drop of top-1")
    return [
        ("net", "predicted loss", *titles),
        *(
            (
                row["net"],
                row["losses"] + ("" if row["power"] == 1 else f", each to the power of {row['power']:g}"),
                str(row["plans"]),
                f"{row['least']:.4f} to {row['most']:.4f}",
                f"{row['divergence_correlation']:.2f}",
                f"{row['drop_correlation']:.2f}",
            )
            for row in document["rows"]
        ),
    ]


README_TABLES = {"rivals": best_structures, "peers": readme_peers, "latency": readme_latency}
_VGG = "--model groupify.models.demo:fashion_vgg11_bn --checkpoint FILE"
_SHUFFLE = "--only 'groupify g=*|groupify, shuffle*|groupify, grouped*' --groups 4 --epochs 0 --seeds 3"
TABLES: dict[str, tuple[str, Callable[[Document], Table]]] = {  # name: (command, maker)
    "accuracy": ("accuracy --checkpoint FILE", accuracy),
    "conversion": ("conversion", conversion),
    "latency": ("latency", latency),
    "narrow_groups": ("narrow_groups", narrow_groups),
    "peers": ("peers --checkpoint FILE --twin FILE", peers),
    "peers_vgg11": (f"peers {_VGG} --json benchmarks/peers_vgg11.json", peers),
    "peers_shuffle": (f"peers --checkpoint FILE {_SHUFFLE} --json benchmarks/peers_shuffle.json", peers),
    "peers_latency": ("peers_latency --checkpoint FILE [--model MODEL]", peers_latency),
    "recovery": ("recovery --checkpoint FILE --twin FILE", recovery),
    "planner": ("planner --checkpoint FILE", planner),
    "rivals": ("rivals --checkpoint FILE [--model MODEL]", rivals),
    "craft": ("craft --photographs FOLDER", craft),
    "imagenet": ("imagenet --images FOLDER", imagenet),
    "ranking": ("ranking --checkpoint FILE [--model MODEL]", ranking),
    "prediction": ("prediction [--precision int8]", prediction),
    "int8": ("int8 --checkpoint FILE", int8),
    "efficiency": ("efficiency", efficiency),
    **{
        f"models_{library}": (f"models {library}", models)
        for library in ("torchvision", "timm", "huggingface", "others")
    },
}


if __name__ == "__main__":
    main()
