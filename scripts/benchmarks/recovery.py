#!/usr/bin/env python3
"""Accuracy after a little training: converted ResNet-18 on Fashion-MNIST against its rivals.

    python -m scripts.benchmarks.recovery --checkpoint FILE --twin FILE [--rows GLOB] [--seeds N]
    python -m scripts.benchmarks.recovery --checkpoint FILE --speed

Setting and dense net are those of scripts/benchmarks/accuracy.py. Every method gets the same images (54,000
to train on, 6,000 held out to choose the best weights), the same budget and the same distillation from the
dense net; its learning rate is the best of --learning-rates for it (see training.py), so that no
rival has to make do with groupify's. Accuracy is measured on all 10,000 test images, in float32. Each
result goes into the JSON file as it comes; what is there is not measured again, so the run may be stopped
at any time and started again, and several may share the rows by --rows.

--speed measures a training step of the grouped net against the dense one, and the images per second of the
fine-tune with one and with two processes, one thread each.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupify.conversion.surgery import restructure
from groupify.data.batches import calibration_images
from groupify.data.ranks import process_group
from groupify.data.splits import DataSplits, load_data
from groupify.machine import describe_machine
from groupify.models import load_model
from groupify.scores.accuracy import evaluate
from groupify.scores.cost import measure_cost
from groupify.training.finetuning import finetune
from groupify.training.settings import FinetuneSettings
from scripts.benchmarks.accuracy import (
    IMAGES,
    MODEL,
    Method,
    Setting,
    default,
    grouped_pointwise,
    torch_pruning,
    truncation,
)
from scripts.benchmarks.harness import BENCHMARKS, ResultFile, check_quick
from scripts.benchmarks.training import FAST, RATES, RememberingTeacher, Trainer, Twin

ROOT = Path(__file__).resolve().parent.parent.parent
OUTPUT = BENCHMARKS / "recovery.json"
SPEED_STEPS = 12


def from_random(setting: Setting, groups: int) -> nn.Module:
    """The grouped architecture with random weights."""
    model = restructure(setting.dense, setting.plan(groups).recipes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return model


def densified(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a copy whose grouped convs are dense ones with block-diagonal weights: it computes the same."""
    model = copy.deepcopy(model)
    for name in names:
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        weight = conv.weight.new_zeros(conv.out_channels, conv.in_channels, *conv.kernel_size)
        rows, columns = conv.out_channels // conv.groups, conv.in_channels // conv.groups
        for group, block in enumerate(conv.weight.detach().split(rows)):
            weight[group * rows : (group + 1) * rows, group * columns : (group + 1) * columns] = block
        conv.weight, conv.groups = nn.Parameter(weight), 1
    return model


@dataclass(frozen=True)
class Contestant:
    """A way to a small net, and how it is trained.

    Attributes:
        make: gives the net before the training.
        labels: False = it only distils.
        tuned_as: the contestant that it has the learning rate of, if it is trained from the same net.
        gradual: start with 2 groups and double them as the training goes on, with an equal share of the
            training for each step.
    """

    make: Method
    labels: bool = True
    tuned_as: str | None = None
    gradual: bool = False

    def run(
        self, trainer: Trainer, setting: Setting, groups: int, epochs: float, rate: float | None
    ) -> nn.Module:
        """Make the net and train it."""
        steps = [groups]
        while self.gradual and epochs and steps[0] > 2:
            steps.insert(0, steps[0] // 2)
        for count in steps:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = self.make(setting, count)
            if rate is not None:
                share = epochs / len(steps)
                model = trainer.train(model, share, rate, setting.seed, labels=self.labels).model
            sites = [site.name for site in setting.plan(count).converted]
            setting = replace(setting, dense=densified(model, sites)) if self.gradual else setting
        return model


_converted = functools.cache(default())  # training leaves it untouched, so all rows start from the same nets
CONTESTANTS = {
    "groupify": Contestant(_converted),
    "groupify, gradual": Contestant(_converted, tuned_as="groupify", gradual=True),
    "groupify, no labels": Contestant(_converted, tuned_as="groupify", labels=False),
    "groupify, grouped-pointwise": Contestant(grouped_pointwise, tuned_as="groupify"),
    "Torch-Pruning, equal MACs": Contestant(torch_pruning),
    "truncation": Contestant(truncation),
    "random weights": Contestant(from_random),
}


@dataclass(frozen=True)
class Row:
    """One method at one number of groups after some training; accuracies in percent, by seed.

    ``seconds`` is the time of the last seed, the conversion included.
    """

    method: str
    groups: int
    epochs: float
    accuracy: dict[str, float]
    accuracy_mean: float
    accuracy_spread: float
    drop_mean: float
    learning_rate: float | None
    macs_ratio: float
    params_ratio: float
    seconds: float

    @property
    def key(self) -> str:
        """What --rows selects."""
        return row_key(self.method, self.groups, self.epochs)


def row_key(method: str, groups: int, epochs: float) -> str:
    """Return the name of a row, like ``groupify g=4 epochs=0.1``."""
    return f"{method} g={groups} epochs={epochs:g}"


@dataclass(frozen=True)
class Bench:
    """What every measurement shares."""

    trainer: Trainer
    settings: tuple[Setting, ...]
    dense_top1: float
    limit: int | None

    def measure(self, method: str, groups: int, epochs: float) -> None:
        """Measure what is missing of a row, seed by seed."""
        results, contestant = self.trainer.results, CONTESTANTS[method]
        for setting in self.settings:
            known = results.rows.get((method, groups, epochs), {"accuracy": {}})
            if str(setting.seed) in known["accuracy"]:
                continue
            start = time.perf_counter()
            rate = None
            if epochs:
                rate = self.trainer.learning_rate(
                    f"{contestant.tuned_as or method} g={groups}",
                    lambda twin: contestant.make(twin, groups),
                )
            model = contestant.run(self.trainer, setting, groups, epochs, rate)
            example = setting.images[:1]
            dense, own = measure_cost(setting.dense, example), measure_cost(model, example)
            top1 = 100 * evaluate(model, self.trainer.data.test, limit=self.limit, batch_size=500).top1  # type: ignore[arg-type]
            accuracy = {**known["accuracy"], str(setting.seed): top1}
            values = list(accuracy.values())
            mean = statistics.fmean(values)
            row = Row(
                method=method,
                groups=groups,
                epochs=epochs,
                accuracy=accuracy,
                accuracy_mean=mean,
                accuracy_spread=max(values) - min(values),
                drop_mean=self.dense_top1 - mean,
                learning_rate=rate,
                macs_ratio=dense.macs / own.macs,
                params_ratio=dense.params / own.params,
                seconds=time.perf_counter() - start,
            )
            results.merge(asdict(row), order=in_order)
            print(f"{describe(row)}  seed {setting.seed}: {top1:.2f}", flush=True)


def in_order(row: dict[str, Any]) -> tuple[float, int, int]:
    """By training, then as the methods are listed."""
    return row["epochs"], list(CONTESTANTS).index(row["method"]), row["groups"]


def describe(row: Row) -> str:
    """One line on a row."""
    rate = "" if row.learning_rate is None else f"  rate {row.learning_rate:g}"
    return (
        f"{row.key:44s} top-1 {row.accuracy_mean:6.2f} ± {row.accuracy_spread / 2:.2f}"
        f"  drop {row.drop_mean:5.2f}  MACs ÷{row.macs_ratio:.2f}{rate}  {row.seconds:5.0f} s"
    )


def table(document: dict[str, Any]) -> str:
    """The rows of a result file as Markdown: a line per method and MACs, a column per training."""
    rows = [Row(**values) for values in document["rows"]]
    trainings = sorted({row.epochs for row in rows})
    head = ["method", "MACs", *(f"{count:g} epochs" for count in trainings)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for groups in sorted({row.groups for row in rows}):
        for method in CONTESTANTS:
            found = {row.epochs: row for row in rows if (row.method, row.groups) == (method, groups)}
            if found:
                cells = [method, f"÷{next(iter(found.values())).macs_ratio:.2f}"]
                cells += [
                    f"{found[count].accuracy_mean:.2f}% ± {found[count].accuracy_spread / 2:.2f}"
                    if count in found
                    else "–"
                    for count in trainings
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# speed ---------------------------------------------------------------------------------------------


def step_seconds(
    models: dict[str, nn.Module], settings: FinetuneSettings, images: Tensor
) -> dict[str, float]:
    """Median seconds of a training step of each model, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in models}
    runs: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        inputs = images.contiguous(memory_format=layout)
        model = model.train().to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True)

        def run(
            model: nn.Module = model, optimizer: torch.optim.SGD = optimizer, inputs: Tensor = inputs
        ) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.amp is not None):
                loss = model(inputs).float().square().mean()
            loss.backward()
            optimizer.step()

        runs[name] = run
    for number in range(SPEED_STEPS + 2):
        for name, step in runs.items():
            start = time.perf_counter()
            step()
            if number > 1:  # the first two warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_speed(setting: Setting, results: ResultFile, arguments: argparse.Namespace) -> None:
    """A training step against the dense one, and images per second with 1 and 2 processes."""
    torch.set_num_threads(1)
    images = setting.images[: FAST.batch_size]
    speed: dict[str, Any] = {"batch_size": len(images), "threads": 1, "steps": SPEED_STEPS}
    for name, settings in (
        ("float32", FinetuneSettings()),
        (f"{FAST.amp or 'float32'}, channels last", FAST),
    ):
        grouped = restructure(setting.dense, setting.plan(4).recipes)
        seconds = step_seconds({"dense": setting.dense, "grouped": grouped}, settings, images)
        speed[name] = {
            "dense_ms": 1e3 * seconds["dense"],
            "grouped_ms": 1e3 * seconds["grouped"],
            "ratio": seconds["dense"] / seconds["grouped"],
        }
        print(f"training step, {name}: {speed[name]}", flush=True)
    rates: dict[str, float] = {}
    for processes in (1, 2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            "-m", "scripts.benchmarks.recovery", "--worker", "--checkpoint", str(arguments.checkpoint),
            "--data", arguments.data,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        rates[str(processes)] = float(done.stdout.strip().splitlines()[-1])
        print(f"{processes} processes: {rates[str(processes)]:.0f} images per second", flush=True)
    speed["finetune_images_per_second"] = rates
    speed["two_processes_ratio"] = rates["2"] / rates["1"]
    with results.changing() as document:
        document["speed"] = speed


def work(setting: Setting, data: DataSplits) -> None:
    """One of the processes whose images per second are measured; the teacher works as well."""
    torch.set_num_threads(1)
    model = restructure(setting.dense, setting.plan(4).recipes)
    assert data.train is not None
    held_out = [(setting.images[:100], torch.zeros(100, dtype=torch.int64))]
    epochs = 2 * SPEED_STEPS * FAST.batch_size / len(data.train)  # type: ignore[arg-type]
    # A validation in the middle: what is before it warms up.
    settings = replace(FAST, epochs=epochs, validations_per_epoch=max(2, round(2 / epochs)))
    with process_group() as ranks, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = finetune(
            model, data, teacher=setting.dense, settings=settings, validation=held_out, distributed=True
        )
        if ranks.first:
            print(result.history[-1].images_per_second)


def main() -> None:
    """Parse, measure, merge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="dense weights, from train_dense.py")
    parser.add_argument("--twin", type=Path, help="weights of the net to choose learning rates on")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--groups", default="4,8")
    parser.add_argument("--epochs", default="0,0.1,1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="*", metavar="GLOB", help="like 'groupify g=4*' (default: all)")
    parser.add_argument(
        "--learning-rates", default=RATES, help="to choose from for each method (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="print the rows of --json as Markdown")
    parser.add_argument("--speed", action="store_true", help="time the training instead")
    parser.add_argument("--quick", action="store_true", help="1 seed and few images")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.json.read_text("utf-8"))))
        return
    if arguments.checkpoint is None:
        parser.error("give --checkpoint FILE")
    check_quick(parser, arguments, OUTPUT)
    count, limit = (300, 1000) if arguments.quick else (IMAGES, None)
    source = load_model(MODEL, checkpoint=arguments.checkpoint)
    data = load_data(arguments.data, source.spec)
    assert data.train is not None
    assert data.test is not None
    twin = None if arguments.twin is None else Twin.load(arguments.twin, data, count)
    if arguments.quick:
        data = replace(data, train=torch.utils.data.Subset(data.train, range(2000)))  # type: ignore[arg-type]
    settings = tuple(
        Setting(source.model, calibration_images(data.train, count, seed=seed), seed)  # type: ignore[arg-type]
        for seed in range(1 if arguments.quick or arguments.speed or arguments.worker else arguments.seeds)
    )
    if arguments.worker:
        work(settings[0], data)
        return
    top1 = 100 * evaluate(source.model, data.test, limit=limit, batch_size=500).top1  # type: ignore[arg-type]
    training = {key: value for key, value in asdict(FAST).items() if key not in ("epochs", "seed", "labels")}
    shared = {"dense_accuracy": top1, "calibration_images": count, "training": training}
    results = ResultFile(arguments.json, shared, keys=("method", "groups", "epochs"))
    if arguments.speed:
        measure_speed(settings[0], results, arguments)
        return
    rates = tuple(float(rate) for rate in arguments.learning_rates.split(","))
    trainer = Trainer(RememberingTeacher(source.model), data, results, rates, twin)
    bench = Bench(trainer, settings, top1, limit)
    print(f"{describe_machine()}\ndense top-1 {top1:.2f}%, {count} unlabelled images", flush=True)
    for epochs in sorted(float(part) for part in arguments.epochs.split(",")):
        for method in CONTESTANTS:
            for groups in (int(part) for part in arguments.groups.split(",")):
                if fnmatch.fnmatchcase(row_key(method, groups, epochs), arguments.rows):
                    bench.measure(method, groups, epochs)


if __name__ == "__main__":
    main()
