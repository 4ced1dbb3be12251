#!/usr/bin/env python3
"""Accuracy after a little training: converted ResNet-18 on Fashion-MNIST against its rivals.

    python -m scripts.benchmark_recovery --checkpoint FILE [--data fashion-mnist] [--rows GLOB] [--seeds N]
    python -m scripts.benchmark_recovery --checkpoint FILE --speed

Setting and dense net are those of scripts/benchmark_accuracy.py. Every method gets the same images (54,000
to train on, 6,000 held out to choose the best weights), the same budget and the same distillation from the
dense net; its learning rate is the best of --learning-rates with seed 0 and the row's own budget, by the
held-out images, so that no rival has to make do with groupify's. Accuracy is measured on all 10,000 test
images, in float32. Each result goes into the JSON file as it comes; what is there is not measured again, so
the run may be stopped at any time and started again, and several may share the rows by --rows.

--speed measures a training step of the grouped net against the dense one, and the images per second of the
fine-tune with one and with two processes, one thread each.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupify.conversion.surgery import restructure
from groupify.data import DataSplits, calibration_images, load_data
from groupify.deployment.machine import describe_machine
from groupify.distributed import process_group
from groupify.evaluation import evaluate
from groupify.planning import measure_cost
from groupify.recovery.finetune import FinetuneResult, FinetuneSettings, finetune
from groupify.zoo import load_model
from scripts.benchmark_accuracy import (
    IMAGES,
    MODEL,
    Method,
    Setting,
    default,
    torch_pruning,
    truncation,
)

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "recovery.json"
FAST = FinetuneSettings(amp="bfloat16", channels_last=True)
SPEED_STEPS = 12
RATES = "0.005,0.02,0.1"


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


@dataclass(frozen=True)
class Contestant:
    """A way to a small net, and how it is trained."""

    make: Method
    labels: bool = True


CONTESTANTS = {
    "groupify": Contestant(default()),
    "groupify, no labels": Contestant(default(), labels=False),
    "Torch-Pruning, equal MACs": Contestant(torch_pruning),
    "truncation": Contestant(truncation),
    "random weights": Contestant(from_random),
}


class RememberingTeacher(nn.Module):
    """A frozen teacher that computes each image once: without augmentation it would always say the same."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher.eval()
        self._known: dict[bytes, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RememberingTeacher:
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images (N, C, H, W)."""
        rows = images.contiguous().numpy()
        keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
        new = [index for index, key in enumerate(keys) if key not in self._known]
        if new:
            for index, logits in zip(new, self.teacher(images[new]).float(), strict=True):
                self._known[keys[index]] = logits.clone()
        return torch.stack([self._known[key] for key in keys])


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


class Results:
    """The result file: read before, written after each result, under a lock."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self._path, self._setting = path, setting
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, value in setting.items():
            if (found := self.read().get(name, value)) != value:
                sys.exit(f"benchmark_recovery: {path} has {name} {found!r}, this would be {value!r}")

    def read(self) -> dict[str, Any]:
        """Return the document."""
        found: dict[str, Any] = json.loads(self._path.read_text("utf-8")) if self._path.exists() else {}
        return found

    @contextlib.contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """Yield the document, and write it as it is at the end."""
        with self._path.with_name(f".{self._path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            document = {
                **self.read(),
                "command": "python -m scripts.benchmark_recovery --checkpoint FILE",
                **self._setting,
                "machine": asdict(describe_machine()),
            }
            yield document
            part = self._path.with_name(f".{self._path.name}.part")
            part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            part.replace(self._path)

    def row(self, key: str) -> dict[str, Any] | None:
        """Return a row, if it is there."""
        found: dict[str, Any] | None = self.read().get("rows", {}).get(key)
        return found


@dataclass(frozen=True)
class Bench:
    """What every measurement shares."""

    teacher: RememberingTeacher
    settings: tuple[Setting, ...]
    data: DataSplits
    dense_top1: float
    limit: int | None
    learning_rates: tuple[float, ...]
    results: Results

    def measure(self, method: str, groups: int, epochs: float) -> None:
        """Measure what is missing of a row, seed by seed."""
        key = row_key(method, groups, epochs)
        for setting in self.settings:
            known = self.results.row(key)
            if known is not None and str(setting.seed) in known["accuracy"]:
                continue
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = CONTESTANTS[method].make(setting, groups)
                example = setting.images[:1]
                dense, own = measure_cost(setting.dense, example), measure_cost(model, example)
                rate = None
                if epochs:
                    rate, tried = self._learning_rate(key, method, model, epochs, setting.seed)
                    model = tried or self._train(method, model, epochs, rate, setting.seed).model
            top1 = 100 * evaluate(model, self.data.test, limit=self.limit, batch_size=500).top1  # type: ignore[arg-type]
            with self.results.changing() as document:
                rows = document.setdefault("rows", {})
                accuracy = {**rows.get(key, {"accuracy": {}})["accuracy"], str(setting.seed): top1}
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
                rows[key] = asdict(row)
            print(f"{describe(row)}  seed {setting.seed}: {top1:.2f}", flush=True)

    def _train(self, method: str, model: nn.Module, epochs: float, rate: float, seed: int) -> FinetuneResult:
        settings = replace(
            FAST, epochs=epochs, learning_rate=rate, labels=CONTESTANTS[method].labels, seed=seed
        )
        return finetune(model, self.data, teacher=self.teacher, settings=settings, progress=True)

    def _learning_rate(
        self, key: str, method: str, model: nn.Module, epochs: float, seed: int
    ) -> tuple[float, nn.Module | None]:
        """Return the learning rate that does best on the held-out images, and what was trained with it.

        It is chosen with the first seed; the model is None for the others.
        """
        known: dict[str, float] = self.results.read().get("learning_rates", {}).get(key, {})
        trained: dict[float, nn.Module] = {}
        for rate in self.learning_rates if len(self.learning_rates) > 1 else ():
            if f"{rate:g}" in known:
                continue
            result = self._train(method, model, epochs, rate, seed)
            trained[rate] = result.model
            known = {**known, f"{rate:g}": 100 * result.best_validation_top1}
            with self.results.changing() as document:
                document.setdefault("learning_rates", {})[key] = known
            print(f"{key}, learning rate {rate:g}: held-out {known[f'{rate:g}']:.2f}", flush=True)
        best = max(self.learning_rates, key=lambda rate: known.get(f"{rate:g}", 0.0))
        return best, trained.get(best)


def describe(row: Row) -> str:
    """One line on a row."""
    rate = "" if row.learning_rate is None else f"  rate {row.learning_rate:g}"
    return (
        f"{row.key:44s} top-1 {row.accuracy_mean:6.2f} ± {row.accuracy_spread / 2:.2f}"
        f"  drop {row.drop_mean:5.2f}  MACs ÷{row.macs_ratio:.2f}{rate}  {row.seconds:5.0f} s"
    )


def table(document: dict[str, Any]) -> str:
    """The rows of a result file as Markdown: a line per method and MACs, a column per training."""
    rows = [Row(**values) for values in document["rows"].values()]
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


def measure_speed(setting: Setting, results: Results, arguments: argparse.Namespace) -> None:
    """A training step against the dense one, and images per second with 1 and 2 processes."""
    torch.set_num_threads(1)
    images = setting.images[: FAST.batch_size]
    speed: dict[str, Any] = {"batch_size": len(images), "threads": 1, "steps": SPEED_STEPS}
    for name, settings in (("float32", FinetuneSettings()), ("bfloat16, channels last", FAST)):
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
            "-m", "scripts.benchmark_recovery", "--worker", "--checkpoint", str(arguments.checkpoint),
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
    if arguments.quick and arguments.json == OUTPUT:
        parser.error("--quick needs a --json of its own: its rows say too little to be kept")
    count, limit = (300, 1000) if arguments.quick else (IMAGES, None)
    source = load_model(MODEL, checkpoint=arguments.checkpoint)
    data = load_data(arguments.data, source.spec)
    assert data.train is not None
    assert data.test is not None
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
    results = Results(
        arguments.json, {"dense_accuracy": top1, "calibration_images": count, "training": training}
    )
    if arguments.speed:
        measure_speed(settings[0], results, arguments)
        return
    rates = tuple(float(rate) for rate in arguments.learning_rates.split(","))
    bench = Bench(RememberingTeacher(source.model), settings, data, top1, limit, rates, results)
    print(f"{describe_machine()}\ndense top-1 {top1:.2f}%, {count} unlabelled images", flush=True)
    for epochs in sorted(float(part) for part in arguments.epochs.split(",")):
        for method in CONTESTANTS:
            for groups in (int(part) for part in arguments.groups.split(",")):
                if fnmatch.fnmatchcase(row_key(method, groups, epochs), arguments.rows):
                    bench.measure(method, groups, epochs)


if __name__ == "__main__":
    main()
