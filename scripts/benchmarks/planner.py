#!/usr/bin/env python3
"""Planned against uniform groups at the same MACs and at the same latency, without any training.

    python -m scripts.benchmarks.planner --checkpoint resnet18.safetensors
    python -m scripts.benchmarks.planner --model groupify.models.demo:fashion_vgg11_bn \
        --checkpoint vgg11.safetensors
    python -m scripts.benchmarks.planner --model demo --data demo --seeds 1 --rows 'macs g=8' --images 300

Checkpoints come from scripts/train_dense.py (--model vgg11_bn --epochs 5 for the second). For each row,
uniform groups set the budget: their MACs (any width of a group), or their measured latency on this machine
(widths clamped to its blocked kernel). The planner gets exactly that, with 1,000 unlabelled training images
to fit on and 500 others to compare plans on. Both models are then fitted on the 1,000 images and measured on
all test images; for latency rows both are timed beside the dense model in ONNX Runtime. Results are merged,
one entry for each row and seed, into the JSON file: entries that are there are not measured again. Every plan
is converted and measured once for each seed; one seed of all rows of resnet18 takes about 15 conversions.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.surgery import restructure
from groupify.data.batches import Data, calibration_images
from groupify.data.splits import DataSplits, load_data
from groupify.files import cache_folder
from groupify.measure.benchmarks import speed_ups
from groupify.models import Source, load_model
from groupify.onnx.exporting import export_onnx
from groupify.planning.budget import LATENCY, MACS, Budget, Limit
from groupify.planning.candidates import candidates
from groupify.planning.plan_timer import PlanTimer
from groupify.planning.rules import Rules
from groupify.planning.search import Images, SearchOptions, make_costing, plan_for_budget
from groupify.scores.accuracy import evaluate
from groupify.structures import Plan, SiteRecipe
from scripts.benchmarks.accuracy import shortcuts
from scripts.benchmarks.harness import ResultFile

IMAGES, HELD_OUT = 1000, 500
GROUPS = (2, 4, 8)
KEYS = ("model", "row", "seed", "shuffle", "images")
ROWS = tuple(f"{quantity} g={groups}" for quantity in (MACS, LATENCY) for groups in GROUPS)
SESSIONS, SECONDS = 5, 2.0


@dataclass(frozen=True)
class Entry:
    """One row and one seed; accuracies in percent, losses as predicted, divergences on held-out images."""

    model: str
    row: str
    seed: int
    dense_accuracy: float
    uniform_accuracy: float
    planned_accuracy: float
    uniform_cost: float  # share of the dense model's MACs or latency
    planned_cost: float
    winner: str
    predicted: Mapping[str, float]
    divergence: Mapping[str, float | None]
    speed_up: Mapping[str, float] | None  # measured beside the dense model
    plan: Mapping[str, str]
    shuffle: str
    images: int
    seconds: float


def main() -> None:
    """Parse, measure what is missing, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="groupify.models.demo:fashion_resnet18")
    parser.add_argument("--checkpoint", type=Path, help="dense weights, from train_dense.py")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="*", metavar="GLOB", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--shuffle", choices=("none", "all"), default="none", help="shuffles as candidates")
    parser.add_argument("--sensitivity", choices=("fisher", "exact"), default="fisher")
    parser.add_argument("--images", type=int, default=IMAGES, help="to fit on (default: %(default)s)")
    parser.add_argument(
        "--retime",
        action="store_true",
        help="only time the plans of the latency rows again, on a quiet machine",
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/planner.json"))
    arguments = parser.parse_args()
    rows = [row for row in ROWS if fnmatch.fnmatchcase(row, arguments.rows)]
    if not rows:
        parser.error(f"no row is called {arguments.rows!r}: there are {', '.join(ROWS)}")
    source = load_model(arguments.model, checkpoint=arguments.checkpoint)
    data = load_data(arguments.data, source.spec)
    results = ResultFile(arguments.json, keys=KEYS)
    if arguments.retime:
        for key, known in results.rows.items():
            if key[0] == arguments.model and known["row"] in rows and known["speed_up"] is not None:
                results.merge(asdict(retimed(Entry(**known), source, arguments)), order=in_order)
    else:
        measure_missing(results, rows, source, data, arguments)
    print_summary([Entry(**entry) for key, entry in results.rows.items() if key[0] == arguments.model])


def measure_missing(
    results: ResultFile, rows: Sequence[str], source: Source, data: DataSplits, arguments: argparse.Namespace
) -> None:
    """Measure the rows that are not there yet, seed by seed."""
    assert data.train is not None
    assert data.test is not None
    for seed in range(arguments.seeds):
        missing = [
            row
            for row in rows
            if (arguments.model, row, seed, arguments.shuffle, arguments.images) not in results.rows
        ]
        if not missing:
            continue
        images = calibration_images(data.train, arguments.images + HELD_OUT, seed=seed)
        run = Run(source, images[: arguments.images], images[arguments.images :], arguments, seed, data.test)
        for row in missing:
            entry = run.measure(row)
            print_entry(entry)
            results.merge(asdict(entry), order=in_order)


@dataclass(frozen=True)
class Run:
    """What the rows of one seed share; plans that several of them meet are converted and measured once."""

    source: Source
    images: Tensor
    held_out: Tensor
    arguments: argparse.Namespace
    seed: int
    test: Data
    _models: dict[tuple[SiteRecipe, ...], nn.Module] = field(default_factory=dict, init=False)
    _top1: dict[tuple[SiteRecipe, ...], float] = field(default_factory=dict, init=False)

    def measure(self, row: str) -> Entry:
        """Plan at the cost of uniform groups, convert both, measure both."""
        start = time.perf_counter()
        quantity, _, groups = row.partition(" g=")
        model, shape = self.source.model, self.source.spec.input_shape
        rules, options = what_may_be_planned(model, quantity, self.arguments, self.seed)
        images = Images(self.images, self.held_out)
        costing = make_costing(model, shape, images, rules, options, latency=quantity == LATENCY)
        uniform = costing.choices.uniform["grouped", int(groups), False]
        amount = costing.costs(uniform)[quantity]
        if costing.latencies is not None:
            timer = PlanTimer(model, costing.choices, costing.latencies.dense_ms, cache=options.cache)
            amount = timer(costing.choices.plan(uniform))
        budget = Budget((Limit(quantity, amount, relative=False),))
        found = plan_for_budget(
            model, shape, budget, images, rules=rules, options=options, convert_plan=self.convert
        )
        plans = {"uniform": costing.choices.plan(uniform), "planned": found.plan}
        models = {name: self.convert(plan) for name, plan in plans.items()}
        accuracy = {name: self.top1(plan) for name, plan in plans.items()}
        total = found.dense_costs[quantity]
        contenders = {contender.name: contender for contender in found.contenders}
        measured = {name: c.measured.divergence if c.measured else None for name, c in contenders.items()}
        return Entry(
            model=self.arguments.model,
            row=row,
            seed=self.seed,
            dense_accuracy=self.top1(None),
            uniform_accuracy=accuracy["uniform"],
            planned_accuracy=accuracy["planned"],
            uniform_cost=amount / total,
            planned_cost=found.winner.costs[quantity] / total,
            winner=found.winner.name,
            predicted={name: c.loss for name, c in contenders.items()} | {"row": costing.loss(uniform)},
            divergence=measured,
            speed_up=timed_beside(model, models, shape) if quantity == LATENCY else None,
            plan={
                site.name: f"{site.kind} {site.groups}" + (" shuffle" if site.shuffle else "")
                for site in found.plan.converted
            },
            shuffle=self.arguments.shuffle,
            images=len(self.images),
            seconds=time.perf_counter() - start,
        )

    def convert(self, plan: Plan) -> nn.Module:
        """Fit on the calibration images."""
        key = plan.recipes
        if key not in self._models:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                calibration = Calibration(self.images)
                self._models[key] = convert(self.source.model, plan, calibration, seed=self.seed).model
        return self._models[key]

    def top1(self, plan: Plan | None) -> float:
        """Percent of the test images; None = of the dense model."""
        key = () if plan is None else plan.recipes
        if key not in self._top1:
            model = self.source.model if plan is None else self.convert(plan)
            self._top1[key] = 100 * evaluate(model, self.test, batch_size=500).top1
        return self._top1[key]


def what_may_be_planned(
    model: nn.Module, quantity: str, arguments: argparse.Namespace, seed: int
) -> tuple[Rules, SearchOptions]:
    """What the planner may do, and how it looks for it."""
    rules = Rules(
        exclude=shortcuts(model),
        min_group_width="auto" if quantity == LATENCY else 1,
        shuffle=arguments.shuffle,
    )
    return rules, SearchOptions(
        sensitivity=arguments.sensitivity,
        cache=cache_folder(),
        seed=seed,
        progress=True,
    )


def retimed(entry: Entry, source: Source, arguments: argparse.Namespace) -> Entry:
    """Return a latency row with its two models timed again; the weights make no difference."""
    quantity, _, groups = entry.row.partition(" g=")
    model, shape = source.model, source.spec.input_shape
    rules, _ = what_may_be_planned(model, quantity, arguments, entry.seed)
    choices = candidates(model, shape, rules)
    planned = []
    for name, site in entry.plan.items():
        kind, count, *shuffle = site.split()
        planned.append(SiteRecipe(name, kind, int(count), bool(shuffle)))
    uniform = choices.plan(choices.uniform["grouped", int(groups), False]).recipes
    models = {
        name: restructure(model, recipes) for name, recipes in (("uniform", uniform), ("planned", planned))
    }
    timed = replace(entry, speed_up=timed_beside(model, models, shape))
    print(f"{entry.model} {entry.row} seed {entry.seed}: {entry.speed_up} → {timed.speed_up}", flush=True)
    return timed


def timed_beside(
    dense: nn.Module, models: Mapping[str, nn.Module], shape: tuple[int, ...]
) -> dict[str, float]:
    """Return how many times faster than the dense model each is."""
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: export_onnx(model, Path(folder, f"{name}.onnx"), input_shape=shape).path
            for name, model in {"dense": dense, **models}.items()
        }
        return speed_ups(files, "dense", input_shape=shape, sessions=SESSIONS, seconds=SECONDS)


def print_entry(entry: Entry) -> None:
    """Print one row and seed."""
    print(
        f"{entry.model} {entry.row} seed {entry.seed}: dense {entry.dense_accuracy:.2f}, "
        f"uniform {entry.uniform_accuracy:.2f}, planned {entry.planned_accuracy:.2f} ({entry.winner}; "
        f"{100 * entry.planned_cost:.1f}% of the cost against {100 * entry.uniform_cost:.1f}%)",
        flush=True,
    )


def print_summary(entries: list[Entry]) -> None:
    """Print the means over the seeds, and how much of uniform's drop the plan closes."""
    for row in dict.fromkeys(entry.row for entry in entries):
        same = [entry for entry in entries if entry.row == row]
        dense, uniform, planned = (
            statistics.fmean(getattr(entry, f"{name}_accuracy") for entry in same)
            for name in ("dense", "uniform", "planned")
        )
        drop = dense - uniform
        closed = f"{100 * (planned - uniform) / drop:.0f}%" if drop > 0 else "none to close"
        speeds = ""
        if all(entry.speed_up is not None for entry in same):
            means = {n: statistics.fmean((e.speed_up or {})[n] for e in same) for n in ("uniform", "planned")}
            speeds = f"; measured speed-up {means['uniform']:.2f} and {means['planned']:.2f}"
        print(
            f"{row:14s} drop of uniform {drop:.2f}, of planned {dense - planned:.2f}: closed {closed} "
            f"({len(same)} seeds){speeds}"
        )


def in_order(row: dict[str, Any]) -> tuple[str, int, int]:
    """Model by model, as the rows are listed."""
    return row["model"], ROWS.index(row["row"]), row["seed"]


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
