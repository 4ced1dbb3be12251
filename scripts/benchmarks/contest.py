"""Accuracy of methods at the MACs of uniform groups, with and without training: what two experiments are.

A row is one method at the MACs of one number of groups after one amount of training. It is measured seed by
seed, so that a run that is stopped loses one seed at most.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from groupify.data.batches import calibration_images
from groupify.data.splits import DataSplits, load_data
from groupify.models.sources import load_model
from groupify.scores import evaluate, measure_cost
from scripts.benchmarks.harness import Latencies, Results, Timing, describe_latency, matches
from scripts.benchmarks.methods import Method, Setting, make, rules_for
from scripts.benchmarks.training import FAST, Trainer

MODEL = "groupify.models.demo:fashion_resnet18"
IMAGES = 1000
QUICK = "one seed, 4 groups, 300 images, 1000 test images"
KEYS = ("method", "groups", "epochs")


@dataclass(frozen=True)
class Row:
    """One method at one number of groups after some training; accuracies in percent, the drop in points.

    Attributes:
        accuracy: by seed; empty in the rows of older files, which have the mean alone.
        accuracy_spread: the largest minus the smallest.
        seeds: how many the mean is of.
        seconds: of the last seed, the conversion and the training.
        amp: type of the mixed precision of the training.
        latency: by threads, beside the dense net; None = not timed.
        speed_up: with one thread.
    """

    method: str
    groups: int
    accuracy_mean: float
    accuracy_spread: float
    drop_mean: float
    macs_ratio: float
    params_ratio: float
    seconds: float
    epochs: float = 0.0
    accuracy: Mapping[str, float] = field(default_factory=dict)
    seeds: int = 0
    learning_rate: float | None = None
    amp: str | None = None
    latency: Latencies | None = None
    speed_up: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", max(self.seeds, len(self.accuracy)))

    @property
    def name(self) -> str:
        """What ``--only`` selects."""
        return row_name(self.method, self.groups, self.epochs)

    def timed(self, latency: Latencies) -> Row:
        """Return the row with latencies."""
        return replace(self, latency=latency, speed_up=latency.get("1", {}).get("speed_up"))

    def __str__(self) -> str:
        rate = "" if self.learning_rate is None else f"  rate {self.learning_rate:g}"
        return (
            f"{self.name:50s} top-1 {self.accuracy_mean:6.2f} ± {self.accuracy_spread / 2:.2f}"
            f"  drop {self.drop_mean:6.2f}  MACs ÷{self.macs_ratio:.2f}  params ÷{self.params_ratio:.2f}"
            f"{rate}{describe_latency(self.latency or {})}  {self.seconds:5.0f} s, {self.seeds} seeds"
        )


def row_name(method: str, groups: int, epochs: float) -> str:
    """Return the name of a row, like ``groupify g=4 epochs=0.1``."""
    return f"{method} g={groups} epochs={epochs:g}"


@dataclass(frozen=True)
class Contestant:
    """A way to a small net, and how it is trained.

    Attributes:
        make: gives the net before the training.
        seeded: whether the seed matters where nothing is trained.
    """

    make: Method
    seeded: bool = True

    def run(
        self, trainer: Trainer | None, setting: Setting, groups: int, epochs: float, rate: float | None
    ) -> nn.Module:
        """Make the net and train it; without training it may be one that other rows start from as well."""
        model = _made(self.make, setting, groups)
        if trainer is not None and rate is not None:
            model = trainer.train(model, epochs, rate, setting.seed).model
        return model


# Training leaves its model untouched, so that rows of the same net share it.
_made: Callable[[Method, Setting, int], nn.Module] = functools.lru_cache(maxsize=16)(make)


@dataclass(frozen=True)
class Net:
    """The dense net, a setting for each seed, and the data to train and judge on.

    Attributes:
        limit: of the test images; None = all.
    """

    settings: Sequence[Setting]
    data: DataSplits
    limit: int | None = None

    @classmethod
    def load(cls, arguments: argparse.Namespace, seeds: int, min_group_width: int | str = 1) -> Net:
        """Load what the options say: ``--model``, ``--checkpoint``, ``--data`` and ``--quick``."""
        count, limit = (300, 1000) if arguments.quick else (IMAGES, None)
        source = load_model(arguments.model, checkpoint=arguments.checkpoint)
        data = load_data(arguments.data, source.spec)
        assert data.train is not None
        assert data.test is not None
        rules = rules_for(source.model, min_group_width)
        settings = [
            Setting(source.model, calibration_images(data.train, count, seed=seed), seed, rules)
            for seed in range(1 if arguments.quick else seeds)
        ]
        return cls(settings, data, limit)

    @property
    def dense(self) -> nn.Module:
        """The net itself."""
        return self.settings[0].dense

    @property
    def images(self) -> int:
        """How many calibration images each seed has."""
        return len(self.settings[0].images)

    @property
    def shared(self) -> dict[str, Any]:
        """What a result file keeps of it."""
        return {"dense_accuracy": self.dense_top1, "calibration_images": self.images}

    @functools.cached_property
    def dense_top1(self) -> float:
        """Percent of the test images."""
        top1 = self.top1(self.dense)
        print(f"dense top-1 {top1:.2f}%, {self.images} unlabelled images", flush=True)
        return top1

    def top1(self, model: nn.Module) -> float:
        """Percent of the test images."""
        assert self.data.test is not None
        return 100 * evaluate(model, self.data.test, limit=self.limit, batch_size=500).top1

    def ratios(self, model: nn.Module, shape: tuple[int, ...] | None = None) -> tuple[float, float]:
        """How many times fewer MACs and parameters than the dense net, on images of a shape."""
        example = self.settings[0].images[:1]
        if shape is not None:
            example = example.new_zeros(1, *shape)
        dense, own = measure_cost(self.dense, example), measure_cost(model, example)
        return dense.macs / own.macs, dense.params / own.params


def order_of(contestants: Mapping[str, object]) -> Callable[[Row], tuple[float, int, int]]:
    """Return an order of rows: by training, then as the methods are listed."""
    names = list(contestants)
    return lambda row: (row.epochs, names.index(row.method), row.groups)


def training_setting(*without: str) -> dict[str, Any]:
    """Return the settings of the training that all rows share."""
    return {name: value for name, value in asdict(FAST).items() if name not in ("epochs", "seed", *without)}


@dataclass(frozen=True)
class Contest:
    """Measures rows.

    Attributes:
        net: the dense net.
        results: where the rows go.
        contestants: by name.
        trainer: None where nothing is trained.
        timing: times each net's file beside the dense one's; None = no timing.
        rate_groups: the number of groups that learning rates are chosen at; None = each row's own.
    """

    net: Net
    results: Results[Row]
    contestants: Mapping[str, Contestant]
    trainer: Trainer | None = None
    timing: Timing | None = None
    rate_groups: int | None = None

    def run(self, groups: Sequence[int], epochs: Sequence[float] = (0.0,), only: str = "*") -> None:
        """Measure what is missing, number of groups by number of groups."""
        for count in groups:
            for name in self.contestants:
                wanted = [length for length in sorted(epochs) if matches(row_name(name, count, length), only)]
                self.measure(name, count, wanted)

    def measure(self, name: str, groups: int, epochs: Sequence[float]) -> None:
        """Measure the rows of one method at one number of groups that are not there yet."""
        before = {length: self.results.known(name, groups, length) for length in epochs}
        for setting in self.net.settings:
            for length in epochs:
                self._measure_seed(name, groups, length, setting)
        if self.timing is not None and epochs:
            self._time(name, groups, self.timing)
        for length in epochs:
            row = self.results.known(name, groups, length)
            if row is not None and row != before[length]:
                print(row, flush=True)

    def _measure_seed(self, name: str, groups: int, epochs: float, setting: Setting) -> None:
        contestant, known = self.contestants[name], self.results.known(name, groups, epochs)
        seeds = len(self.net.settings) if contestant.seeded or epochs else 1
        if known is not None and known.seeds >= seeds:
            return
        accuracy = dict(known.accuracy) if known is not None else {}
        if str(setting.seed) in accuracy:
            return
        rate, start = self._rate(name, groups) if epochs else None, time.perf_counter()
        model = contestant.run(self.trainer, setting, groups, epochs, rate)
        seconds = time.perf_counter() - start
        accuracy[str(setting.seed)] = self.net.top1(model)
        mean = statistics.fmean(accuracy.values())
        macs_ratio, params_ratio = self.net.ratios(model)
        self.results.put(
            Row(
                method=name,
                groups=groups,
                epochs=epochs,
                accuracy=accuracy,
                accuracy_mean=mean,
                accuracy_spread=max(accuracy.values()) - min(accuracy.values()),
                drop_mean=self.net.dense_top1 - mean,
                macs_ratio=macs_ratio,
                params_ratio=params_ratio,
                learning_rate=rate,
                amp=FAST.amp if epochs else None,
                seconds=seconds,
                latency=known.latency if known else None,
                speed_up=known.speed_up if known else None,
            )
        )

    def _rate(self, name: str, groups: int) -> float:
        assert self.trainer is not None
        method, at = self.contestants[name].make, self.rate_groups or groups
        key = name if self.rate_groups else f"{name} g={at}"
        return self.trainer.learning_rate(key, lambda twin: make(method, twin, at))

    def _time(self, name: str, groups: int, timing: Timing) -> None:
        """Time the untrained net, and put that into all of its rows that have no latency."""
        rows = [row for row in self.results.rows.values() if (row.method, row.groups) == (name, groups)]
        untimed = [row for row in rows if not row.latency]
        if not untimed:
            return
        own = timing.file(
            name, groups, lambda: _made(self.contestants[name].make, self.net.settings[0], groups)
        )
        if not timing.threads:
            return
        latency = next((row.latency for row in rows if row.latency), None) or timing.against_dense(own)
        for row in untimed:
            self.results.put(row.timed(latency))
