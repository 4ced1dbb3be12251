"""Planned against uniform groups at the same MACs and at the same latency, without any training.

    python -m scripts.benchmarks.planner --checkpoint resnet18.safetensors
    python -m scripts.benchmarks.planner --model groupify.models.demo:fashion_vgg11_bn \\
        --checkpoint vgg11.safetensors
    python -m scripts.benchmarks.planner --model demo --data demo --seeds 1 --only 'macs g=8' --images 300

Checkpoints come from scripts/train_dense.py (--model vgg11_bn --epochs 5 for the second). For each row,
uniform groups set the budget: their MACs (any width of a group), or their measured latency on this machine
(widths clamped to its blocked kernel). The planner gets exactly that, with 1,000 unlabelled training images
to fit on and 500 others to compare plans on. Both models are then fitted on the 1,000 images and measured on
all test images; for latency rows both are timed beside the dense model in ONNX Runtime. There is one entry
for each row and seed. Every plan is converted and measured once for each seed; one seed of all rows of
resnet18 takes about 15 conversions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from groupify.conversion.surgery import restructure
from groupify.data.batches import Data, calibration_images
from groupify.data.splits import DataSplits, load_data
from groupify.files import cache_folder
from groupify.measure.benchmarks import speed_ups
from groupify.measure.plan_timer import PlanTimer
from groupify.models.sources import load_model
from groupify.models.specs import Source
from groupify.onnx.exporting import export_onnx
from groupify.planning.budget import LATENCY, MACS, Budget, Limit
from groupify.planning.candidates import candidates
from groupify.planning.rules import AUTO, Rules
from groupify.planning.search import Images, SearchOptions, make_costing, plan_for_budget
from groupify.scores import evaluate
from groupify.structures import GROUPED, Plan, SiteRecipe, Structure, Uniform
from scripts.benchmarks.contest import IMAGES, MODEL
from scripts.benchmarks.harness import Parser, Results
from scripts.benchmarks.methods import Setting, make, rules_for

HELD_OUT = 500
GROUPS = (2, 4, 8)
KEYS = ("model", "row", "seed", "shuffle", "images")
ROWS = tuple(f"{quantity} g={groups}" for quantity in (MACS, LATENCY) for groups in GROUPS)
SESSIONS, SECONDS = 5, 2.0


@dataclass(frozen=True)
class Row:
    """One budget and one seed; accuracies in percent, losses as predicted, divergences on held-out images.

    Costs are shares of the dense model's MACs or latency; speed-ups are measured beside the dense model.
    """

    model: str
    row: str
    seed: int
    dense_accuracy: float
    uniform_accuracy: float
    planned_accuracy: float
    uniform_cost: float
    planned_cost: float
    winner: str
    predicted: Mapping[str, float]
    divergence: Mapping[str, float | None]
    speed_up: Mapping[str, float] | None
    plan: Mapping[str, str]
    shuffle: str
    images: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.model} {self.row} seed {self.seed}: dense {self.dense_accuracy:.2f}, "
            f"uniform {self.uniform_accuracy:.2f}, planned {self.planned_accuracy:.2f} ({self.winner}; "
            f"{100 * self.planned_cost:.1f}% of the cost against {100 * self.uniform_cost:.1f}%)"
            + (f", speed-ups {dict(self.speed_up)}" if self.speed_up else "")
        )


def order(row: Row) -> tuple[str, int, int]:
    """Model by model, as the rows are listed."""
    return row.model, ROWS.index(row.row), row.seed


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "planner", "one seed, 4 groups, 300 images")
    parser.add_net(MODEL, checkpoint=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shuffle", choices=("none", "all"), default="none", help="shuffles as candidates")
    parser.add_argument("--sensitivity", choices=("fisher", "exact"), default="fisher")
    parser.add_argument("--images", type=int, default=IMAGES, help="to fit on (default: %(default)s)")
    parser.add_argument("--retime", action="store_true", help="only time the plans of the latency rows again")
    arguments = parser.parse()
    if arguments.quick:
        arguments.seeds, arguments.images = 1, 300
    rows = parser.chosen([row for row in ROWS if not arguments.quick or row.endswith("4")], arguments.only)
    source = load_model(arguments.model, checkpoint=arguments.checkpoint)
    results = Results(Row, KEYS, arguments.json, order=order, again=arguments.again)
    if arguments.retime:
        for known in results.rows.values():
            if known.model == arguments.model and known.row in rows and known.speed_up is not None:
                results.put(retimed(known, source))
    else:
        data = load_data(arguments.data, source.spec)
        measure_missing(results, rows, source, data, arguments)
    results.show("planner")


def measure_missing(
    results: Results[Row],
    rows: Sequence[str],
    source: Source,
    data: DataSplits,
    arguments: argparse.Namespace,
) -> None:
    """Measure the rows that are not there yet, seed by seed."""
    assert data.train is not None
    assert data.test is not None
    for seed in range(arguments.seeds):
        missing = [
            row
            for row in rows
            if not results.known(arguments.model, row, seed, arguments.shuffle, arguments.images)
        ]
        if missing:
            images = calibration_images(data.train, arguments.images + HELD_OUT, seed=seed)
            setting = Setting(source.model, images[: arguments.images], seed)
            run = Run(setting, images[arguments.images :], data.test, arguments)
            for row in missing:
                results.put(measured := run.measure(row))
                print(measured, flush=True)


@dataclass(frozen=True)
class Run:
    """What the rows of one seed share; plans that several of them meet are converted and measured once."""

    setting: Setting
    held_out: Tensor
    test: Data
    arguments: argparse.Namespace
    _models: dict[tuple[SiteRecipe, ...], nn.Module] = field(default_factory=dict, init=False)
    _top1: dict[tuple[SiteRecipe, ...], float] = field(default_factory=dict, init=False)

    def measure(self, row: str) -> Row:
        """Plan at the cost of uniform groups, convert both, measure both."""
        start = time.perf_counter()
        quantity, _, groups = row.partition(" g=")
        model, shape = self.setting.dense, self.setting.shape
        rules = budget_rules(model, quantity, self.arguments.shuffle)
        options = SearchOptions(
            sensitivity=self.arguments.sensitivity,
            cache=cache_folder(),
            seed=self.setting.seed,
            progress=True,
        )
        images = Images(self.setting.images, self.held_out)
        costing = make_costing(model, shape, images, rules, options, latency=quantity == LATENCY)
        uniform = costing.choices.uniform[Uniform(GROUPED, int(groups))]
        amount = costing.costs(uniform)[quantity]
        if costing.latencies is not None:
            timer = PlanTimer(model, costing.choices, costing.latencies.dense_ms, cache=options.cache)
            amount = timer(costing.choices.plan(uniform))
        budget = Budget((Limit(quantity, amount, relative=False),))
        found = plan_for_budget(
            model, shape, budget, images, rules=rules, options=options, convert_plan=self.convert
        )
        plans = {"uniform": costing.choices.plan(uniform), "planned": found.plan}
        total = found.dense_costs[quantity]
        timed = None
        if quantity == LATENCY:
            timed = timed_beside(model, {name: self.convert(plan) for name, plan in plans.items()}, shape)
        return Row(
            model=self.arguments.model,
            row=row,
            seed=self.setting.seed,
            dense_accuracy=self.top1(None),
            uniform_accuracy=self.top1(plans["uniform"]),
            planned_accuracy=self.top1(plans["planned"]),
            uniform_cost=amount / total,
            planned_cost=found.winner.costs[quantity] / total,
            winner=found.winner.name,
            predicted={c.name: c.loss for c in found.contenders} | {"row": costing.loss(uniform)},
            divergence={c.name: c.measured.divergence if c.measured else None for c in found.contenders},
            speed_up=timed,
            plan={site.name: written(site) for site in found.plan.recipes},
            shuffle=self.arguments.shuffle,
            images=len(self.setting.images),
            seconds=time.perf_counter() - start,
        )

    def convert(self, plan: Plan) -> nn.Module:
        """Fit on the calibration images."""
        key = plan.recipes
        if key not in self._models:
            self._models[key] = make(lambda setting, _: setting.convert(plan), self.setting, 0)
        return self._models[key]

    def top1(self, plan: Plan | None) -> float:
        """Percent of the test images; None = of the dense model."""
        key = () if plan is None else plan.recipes
        if key not in self._top1:
            model = self.setting.dense if plan is None else self.convert(plan)
            limit = 1000 if self.arguments.quick else None
            self._top1[key] = 100 * evaluate(model, self.test, limit=limit, batch_size=500).top1
        return self._top1[key]


def budget_rules(model: nn.Module, quantity: str, shuffle: str) -> Rules:
    """What the planner may do: MACs do not care for the kernel."""
    return rules_for(model, AUTO if quantity == LATENCY else 1, shuffle=shuffle)


def retimed(row: Row, source: Source) -> Row:
    """Return a latency row with its two models timed again; the weights make no difference."""
    quantity, _, groups = row.row.partition(" g=")
    model, shape = source.model, source.spec.input_shape
    choices = candidates(model, shape, budget_rules(model, quantity, row.shuffle))
    planned = [read(name, text) for name, text in row.plan.items()]
    uniform = choices.plan(choices.uniform[Uniform(GROUPED, int(groups))]).recipes
    recipes = {"uniform": uniform, "planned": planned}
    models = {name: restructure(model, sites) for name, sites in recipes.items()}
    timed = replace(row, speed_up=timed_beside(model, models, shape))
    print(f"{row.model} {row.row} seed {row.seed}: {row.speed_up} → {timed.speed_up}", flush=True)
    return timed


def written(site: SiteRecipe) -> str:
    """Return the reduce, groups and expand of a site as a row has them, such as ``- 4 64``."""
    structure = site.structure
    parts = [structure.reduce or "-", structure.groups, structure.expand or "-"]
    return " ".join(map(str, parts + ["shuffle"] * site.shuffle))


def read(name: str, text: str) -> SiteRecipe:
    """Return the site that ``written`` wrote."""
    reduce, groups, expand, *shuffle = text.split()
    reads, writes = (None if part == "-" else int(part) for part in (reduce, expand))
    return SiteRecipe(name, Structure(reads, int(groups), writes), bool(shuffle))


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


if __name__ == "__main__":
    main()
