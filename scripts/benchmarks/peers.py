#!/usr/bin/env python3
"""groupify against its peers: the same dense net, images, MACs and training; accuracy, size and latency.

    python -m scripts.benchmarks.peers --checkpoint FILE --twin FILE [--epochs 0,0.1,1] [--quick]
    python -m scripts.benchmarks.peers --model groupify.models.demo:fashion_vgg11_bn \
        --checkpoint vgg11.safetensors --json benchmarks/peers_vgg11.json

The setting is that of scripts/benchmarks/accuracy.py, with groups no narrower than this CPU's kernel wants.
Every method gets the same 1,000 unlabelled images and is brought as near as it can be to the MACs of the
net with 2, 4 or 8 groups (about 1.9×, 3.7× and 6.9× fewer). Training is ``groupify.finetune`` with
distillation, for all alike but for the learning rate, which is the best of --learning-rates for each at the
MACs of 4 groups (see training.py). Rows and rates that recovery.py has measured
already, with the same training, are taken from its file; another --model takes the rates of
benchmarks/peers.json. Each file is timed in ONNX Runtime side by side with the dense one. Rows go into the
result file one by one; what is there already is not measured again, so the run may be stopped and resumed.
``--table`` prints the rows as Markdown and measures nothing.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from groupify.conversion.conversion import Calibration, convert
from groupify.data.batches import calibration_images
from groupify.data.splits import load_data
from groupify.machine import blocked_width, describe_machine
from groupify.measure.benchmarks import Latency, benchmark_onnx, speed_up
from groupify.models import load_model
from groupify.onnx.exporting import export_onnx
from groupify.planning.budget import MACS, Budget, Limit
from groupify.planning.rules import Rules
from groupify.planning.search import SearchOptions, plan_for_budget
from groupify.scores.accuracy import evaluate
from groupify.scores.cost import measure_cost
from scripts.benchmarks.accuracy import (
    IMAGES,
    MODEL,
    SHAPE,
    Method,
    Setting,
    default,
    grouped_pointwise,
    norm_refresh,
    shortcuts,
    torch_pruning,
    truncation_refresh,
)
from scripts.benchmarks.harness import BENCHMARKS, ResultFile, check_quick
from scripts.benchmarks.low_rank import factorise
from scripts.benchmarks.training import FAST, RATES, RememberingTeacher, Trainer, Twin

OUTPUT = BENCHMARKS / "peers.json"
RECOVERY = BENCHMARKS / "recovery.json"
SESSIONS, SECONDS = 3, 3.0  # of the timing; seconds for each number of threads
RATE_GROUPS = 4  # whose MACs the learning rates are chosen at


def low_rank(structure: str) -> Method:
    """Return a method: a factorisation with the ranks that save as many MACs as groups would."""

    def method(setting: Setting, groups: int) -> nn.Module:
        chosen = setting.plan(groups)
        sites = {site.name: site.macs.dense for site in chosen.sites if site.converted}
        saved = chosen.macs.dense - chosen.macs.grouped
        return factorise(
            setting.dense, structure, sites, saved, setting.images, step=blocked_width(), seed=setting.seed
        )

    return method


def planned(setting: Setting, groups: int) -> nn.Module:
    """``--target macs=…``: whatever kinds and groups the planner chooses within the MACs of uniform groups.

    It gets no more images than the others: it plans on three quarters of them and compares plans on the rest.
    """
    rules = Rules(exclude=shortcuts(setting.dense))
    options = SearchOptions(seed=setting.seed)
    budget = Budget((Limit(MACS, setting.grouped_macs(groups), relative=False),))
    found = plan_for_budget(setting.dense, SHAPE, budget, setting.images, rules=rules, options=options)
    return convert(setting.dense, found.plan, Calibration(setting.images), seed=setting.seed).model


def torch_pruning_taylor(setting: Setting, groups: int) -> nn.Module:
    """Torch-Pruning as in Isomorphic Pruning (Fang et al., 2024): Taylor importance, ranked globally.

    It wants the gradient of a loss; without labels that is cross-entropy to the dense net's own classes.
    """
    import torch_pruning as tp

    graded = copy.deepcopy(setting.dense).eval()
    for images in setting.images.split(250):
        logits = graded(images)
        F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum").div(
            len(setting.images)
        ).backward()
    return torch_pruning(
        replace(setting, dense=graded), groups, tp.importance.GroupTaylorImportance(), isomorphic=True
    )


METHODS: dict[str, Method] = {
    "groupify": default(),
    "groupify, grouped-pointwise": grouped_pointwise,
    "groupify, planned": planned,
    "spatial SVD": low_rank("spatial SVD"),
    "Tucker-2": low_rank("Tucker-2"),
    "Torch-Pruning, L2 norm": lambda setting, groups: torch_pruning(setting, groups),
    "Torch-Pruning, Taylor, isomorphic": torch_pruning_taylor,
    "grouping by weight norm": norm_refresh,
    "truncation": truncation_refresh,
}
# name here: (name of the rows, name of the learning rates) in scripts/benchmarks/recovery.py
IN_RECOVERY = {
    "groupify": ("groupify", "groupify"),
    "groupify, grouped-pointwise": ("groupify, grouped-pointwise", "groupify"),
    "groupify, planned": ("groupify, planned", "groupify"),  # no rows, the same rates
    "Torch-Pruning, L2 norm": ("Torch-Pruning, equal MACs", "Torch-Pruning, equal MACs"),
}


def make(name: str, setting: Setting, groups: int) -> nn.Module:
    """Apply a method, its warnings unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return METHODS[name](setting, groups)


@dataclass(frozen=True)
class Row:
    """One method at the MACs of one number of groups, after some training; accuracies in percent.

    ``seconds`` is the time of one seed, training included. ``latency`` maps threads to dense and own
    milliseconds and their ratio, medians over sessions; ``speed_up`` is that with one thread. ``amp`` is the
    type of mixed precision that it was trained in.
    """

    method: str
    groups: int
    epochs: float
    accuracy_mean: float
    accuracy_spread: float
    drop_mean: float
    macs_ratio: float
    params_ratio: float
    seeds: int
    learning_rate: float | None
    seconds: float
    amp: str | None = None
    latency: dict[str, dict[str, float]] | None = None
    speed_up: float | None = None


def in_order(row: dict[str, Any]) -> tuple[float, int, int]:
    """By training, then as the methods are listed."""
    return row["epochs"], list(METHODS).index(row["method"]), row["groups"]


@dataclass(frozen=True)
class Bench:
    """What every measurement shares."""

    trainer: Trainer
    settings: Sequence[Setting]
    dense_top1: float
    limit: int | None
    threads: Sequence[int]
    files: Path | None = None

    def measure(self, name: str, groups: int, epochs: Sequence[float]) -> None:
        """Measure the rows of one method at one number of groups that are not there yet."""
        results = self.trainer.results
        known = [Row(**row) for key, row in results.rows.items() if key[:2] == (name, groups)]
        latency = next((row.latency for row in known if row.latency), None)
        untimed = [row for row in known if row.latency is None] if self.threads and latency is None else []
        missing = [
            count
            for count in epochs
            if not any(row.epochs == count and row.seeds >= len(self.settings) for row in known)
        ]
        if not missing and not untimed:
            return
        models, seconds = [], []
        for setting in self.settings if missing else ():
            start = time.perf_counter()
            models.append(make(name, setting, groups))
            seconds.append(time.perf_counter() - start)
        if models and self.files is not None:
            export_onnx(models[0], file_of(name, groups, self.files), input_shape=SHAPE)
        if self.threads and latency is None:
            latency = self._time(name, groups, models)
        speed = None if latency is None else latency.get("1", {}).get("speed_up")
        for row in untimed:
            results.merge(asdict(replace(row, latency=latency, speed_up=speed)), order=in_order)
        if not missing:
            return
        example = self.settings[0].images[:1]
        dense, own = measure_cost(self.settings[0].dense, example), measure_cost(models[0], example)
        for count in missing:
            rate = None
            if count:
                rate = self.trainer.learning_rate(name, lambda twin: METHODS[name](twin, RATE_GROUPS))
            accuracies, start = [], time.perf_counter()
            for setting, model in zip(self.settings, models, strict=True):
                trained = model
                if rate is not None:
                    trained = self.trainer.train(model, count, rate, setting.seed).model
                top1 = evaluate(trained, self.test, limit=self.limit, batch_size=500).top1
                accuracies.append(100 * top1)
            mean = statistics.fmean(accuracies)
            took = (time.perf_counter() - start + sum(seconds)) / len(models)
            row = Row(
                method=name,
                groups=groups,
                epochs=count,
                accuracy_mean=mean,
                accuracy_spread=max(accuracies) - min(accuracies),
                drop_mean=self.dense_top1 - mean,
                macs_ratio=dense.macs / own.macs,
                params_ratio=dense.params / own.params,
                seeds=len(models),
                learning_rate=rate,
                seconds=took,
                amp=FAST.amp if count else None,
                latency=latency,
                speed_up=speed,
            )
            results.merge(asdict(row), order=in_order)
            print(describe(row), flush=True)

    @property
    def test(self) -> Any:
        """The test images."""
        return self.trainer.data.test

    def _time(self, name: str, groups: int, models: Sequence[nn.Module]) -> dict[str, dict[str, float]]:
        """Time the exported file against the dense one."""
        with tempfile.TemporaryDirectory(prefix="groupify-") as aside:
            own = file_of(name, groups, self.files or Path(aside))
            if not own.exists():
                model = models[0] if models else make(name, self.settings[0], groups)
                export_onnx(model, own, input_shape=SHAPE)
            dense = export_onnx(self.settings[0].dense, Path(aside, "dense.onnx"), input_shape=SHAPE)
            return time_against(dense.path, own, SHAPE, self.threads)


def file_of(name: str, groups: int, folder: Path) -> Path:
    """Return where a folder keeps the exported file of a method at the MACs of some groups."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{groups}.onnx"


def time_against(
    dense: Path, own: Path, shape: tuple[int, ...], threads: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Return dense and own milliseconds and their ratio by threads, batch 1; medians over sessions.

    Where a session's weights come to lie in memory changes the time of a small model.
    """
    files = {"dense": dense, "own": own}
    sessions = [
        benchmark_onnx(files, input_shape=shape, threads=threads, seconds=SECONDS) for _ in range(SESSIONS)
    ]
    return {str(count): _medians(sessions, count) for count in threads}


def _medians(sessions: Sequence[Sequence[Latency]], threads: int) -> dict[str, float]:
    pairs = [[row for row in session if row.threads == threads] for session in sessions]
    found = {
        "dense_ms": [dense.median_ms for dense, _ in pairs],
        "ms": [own.median_ms for _, own in pairs],
        "speed_up": [speed_up(dense, own) for dense, own in pairs],
    }
    return {name: statistics.median(values) for name, values in found.items()}


def take_over(results: ResultFile, recovery: dict[str, Any], epochs: Sequence[float]) -> None:
    """Put in what the benchmark of the recovery has measured, where it is more than is there.

    Exits if its setting was another one; in which precision it trained may differ, and is said in the rows.
    """
    for name, value in results.setting.items():
        theirs = recovery[name]
        if name == "training":
            value, theirs = (
                {k: v for k, v in one.items() if k in theirs and k != "amp"} for one in (value, theirs)
            )
        if value != theirs:
            sys.exit(
                f"the rows of scripts/benchmarks/recovery.py have {name} {theirs!r}, here it is {value!r}"
            )
    known = results.rows
    for name, (theirs, rates) in IN_RECOVERY.items():
        with results.changing() as document:
            found = recovery["learning_rates"][f"{rates} g={RATE_GROUPS}"]
            document.setdefault("learning_rates", {}).setdefault(name, found)
        for row in recovery["rows"]:
            mine = known.get((name, row["groups"], row["epochs"]))
            seeds = len(row["accuracy"])
            if row["method"] != theirs or row["epochs"] not in epochs or (mine and mine["seeds"] >= seeds):
                continue
            shared = {field.name: row[field.name] for field in fields(Row) if field.name in row}
            amp = recovery["training"]["amp"] if row["epochs"] else None
            taken = Row(**{**shared, "method": name, "seeds": seeds, "amp": amp})
            timed = {key: mine[key] for key in ("latency", "speed_up")} if mine else {}
            results.merge(asdict(replace(taken, **timed)), order=in_order)


def take_rates(results: ResultFile, others: dict[str, Any]) -> None:
    """Put in the losses that the learning rates of another net's rows were chosen by."""
    with results.changing() as document:
        document["learning_rates"] = {**others["learning_rates"], **document.get("learning_rates", {})}


def describe(row: Row) -> str:
    """One line on a row."""
    times = "".join(
        f"  {count} thread{'s' if count != '1' else ''} {one['speed_up']:.2f}×"
        for count, one in (row.latency or {}).items()
    )
    return (
        f"{row.method:34s} g={row.groups} epochs {row.epochs:<4g} top-1 {row.accuracy_mean:6.2f}"
        f"  drop {row.drop_mean:6.2f}  MACs ÷{row.macs_ratio:.2f}  params ÷{row.params_ratio:.2f}{times}"
        f"  {row.seconds:5.0f} s"
    )


def table(document: dict[str, Any]) -> str:
    """The rows of a result file as Markdown: a line per method and MACs, a column per training."""
    rows = [Row(**values) for values in document["rows"]]
    trainings = sorted({row.epochs for row in rows})
    threads = sorted({count for row in rows for count in row.latency or {}})
    titles = [f"{count:g} epoch" + ("s" if count != 1 else "") for count in trainings]
    head = ["method", "MACs", "params", *titles]
    head += [f"speed-up, {count} thread" + ("s" if count != "1" else "") for count in threads]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for groups in sorted({row.groups for row in rows}):
        for method in METHODS:
            found = {row.epochs: row for row in rows if (row.method, row.groups) == (method, groups)}
            if not found:
                continue
            one = next(iter(found.values()))
            cells = [method, f"÷{one.macs_ratio:.2f}", f"÷{one.params_ratio:.2f}"]
            cells += [f"{found[count].accuracy_mean:.2f}%" if count in found else "–" for count in trainings]
            timed = one.latency or {}
            cells += [f"{timed[count]['speed_up']:.2f}×" if count in timed else "–" for count in threads]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, merge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="default: %(default)s")
    parser.add_argument("--checkpoint", type=Path, help="dense weights, from train_dense.py")
    parser.add_argument("--twin", type=Path, help="weights of the net to choose learning rates on")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--groups", default="2,4,8", help="whose MACs to meet (default: %(default)s)")
    parser.add_argument("--epochs", default="0,0.1,1", help="0 = without training (default: %(default)s)")
    parser.add_argument("--threads", default="1,2", help="of the timing; '' = none (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--learning-rates", default=RATES, help="to choose from for each method (default: %(default)s)"
    )
    parser.add_argument("--methods", default="*", metavar="GLOB")
    parser.add_argument(
        "--onnx",
        type=Path,
        metavar="FOLDER",
        help="keep the exported files there, and time those that are there: models that one run trains, a "
        "later one on a quiet machine times",
    )
    parser.add_argument("--json", type=Path, default=OUTPUT)
    parser.add_argument(
        "--recovery",
        type=Path,
        default=RECOVERY,
        help="rows to take over (default: benchmarks/recovery.json)",
    )
    parser.add_argument("--table", action="store_true", help="print the rows of --json as Markdown")
    parser.add_argument("--quick", action="store_true", help="300 images, 4 groups, 1000 test images")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.json.read_text("utf-8"))))
        return
    if arguments.checkpoint is None:
        parser.error("give --checkpoint FILE")
    check_quick(parser, arguments, OUTPUT)
    if arguments.model != MODEL and arguments.json == OUTPUT:
        parser.error("another --model needs a --json of its own")
    torch.manual_seed(0)
    count, limit = (300, 1000) if arguments.quick else (IMAGES, None)
    source = load_model(arguments.model, checkpoint=arguments.checkpoint)
    data = load_data(arguments.data, source.spec)
    assert data.train is not None
    assert data.test is not None
    top1 = 100 * evaluate(source.model, data.test, limit=limit, batch_size=500).top1
    training = {key: value for key, value in asdict(FAST).items() if key not in ("epochs", "seed", "amp")}
    shared = {"dense_accuracy": top1, "calibration_images": count, "training": training}
    results = ResultFile(arguments.json, shared, keys=("method", "groups", "epochs"))
    epochs = numbers(arguments.epochs, float)
    if arguments.model != MODEL:
        take_rates(results, json.loads(OUTPUT.read_text("utf-8")))
    elif arguments.recovery.exists() and not arguments.quick:
        take_over(results, json.loads(arguments.recovery.read_text("utf-8")), epochs)
    rates = tuple(numbers(arguments.learning_rates, float))
    twin = None if arguments.twin is None else Twin.load(arguments.twin, data, count)
    trainer = Trainer(RememberingTeacher(source.model), data, results, rates, twin)
    settings = [
        Setting(source.model, calibration_images(data.train, count, seed=seed), seed, "auto")
        for seed in range(arguments.seeds)
    ]
    print(f"{describe_machine()}\ndense top-1 {top1:.2f}%, {count} unlabelled images")
    if arguments.onnx is not None:
        arguments.onnx.mkdir(parents=True, exist_ok=True)
    bench = Bench(trainer, settings, top1, limit, numbers(arguments.threads, int), arguments.onnx)
    for groups in [4] if arguments.quick else numbers(arguments.groups, int):
        for name in METHODS:
            if fnmatch.fnmatchcase(name, arguments.methods):
                bench.measure(name, groups, epochs)


def numbers(text: str, kind: type) -> list[Any]:
    """Return the numbers of an option, which commas divide."""
    return [kind(part) for part in text.split(",") if part]


if __name__ == "__main__":
    main()
