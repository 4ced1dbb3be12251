#!/usr/bin/env python3
"""Accuracy of a converted ResNet-18 on Fashion-MNIST without any training, part by part.

    python -m scripts.benchmarks.accuracy --checkpoint FILE [--data fashion-mnist] [--json FILE] [--quick]

The dense net is ``groupify.models.demo:fashion_resnet18`` (stride-1 stem, 28×28), from a checkpoint of
scripts/train_dense.py. All 3×3 convs but the first are converted; 1,000 unlabelled training images;
accuracy on all 10,000 test images; mean and spread (largest minus smallest) over the seeds.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupify.conversion.by_part import refresh_batch_norms
from groupify.conversion.clustering import SiteScore, cluster
from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.conversion.site_fit import FitOptions
from groupify.conversion.surgery import restructure
from groupify.data.batches import calibration_images
from groupify.data.splits import load_data
from groupify.graph.channels import channel_classes
from groupify.graph.permute import apply_orders
from groupify.graph.trace import trace
from groupify.machine import describe_machine
from groupify.models import load_model
from groupify.planning.rules import Rules
from groupify.planning.uniform import plan
from groupify.scores.accuracy import evaluate
from groupify.scores.cost import ModelCost, measure_cost
from groupify.structures import Plan
from scripts.benchmarks.harness import ResultFile

MODEL = "groupify.models.demo:fashion_resnet18"
SHAPE = (3, 28, 28)
IMAGES = 1000
SKIP = "*downsample*"
STEPS = 400  # of reconstruction, for each block
PLAIN = FitOptions(
    compensate_residual=False, relu_iterations=0, refit_dense=False, refresh_batch_norm=False, in_order=True
)


@dataclass(frozen=True)
class Row:
    """One method at one number of groups; accuracies in percent, the drop in points."""

    method: str
    groups: int
    accuracy_mean: float
    accuracy_spread: float
    drop_mean: float
    macs_ratio: float
    params_ratio: float
    seeds: int
    seconds: float


@dataclass(frozen=True)
class Setting:
    """The dense net and one seed's calibration images; ``min_group_width`` as in ``groupify.Rules``."""

    dense: nn.Module
    images: Tensor
    seed: int
    min_group_width: int | str = 1

    def plan(self, groups: int, kind: str = "grouped", shuffle: str = "none") -> Plan:
        """All 3×3 convs but the first."""
        rules = Rules(
            exclude=shortcuts(self.dense), min_group_width=self.min_group_width, shuffle=shuffle,
            structures=(kind,),
        )  # fmt: skip
        return plan(self.dense, SHAPE, groups=groups, rules=rules)

    def grouped_macs(self, groups: int) -> int:
        """MACs of the net with uniform groups, which every method is to meet."""
        return measure_cost(restructure(self.dense, self.plan(groups).recipes), self.images[:1]).macs

    def calibration(self, fit: FitOptions, clustering: str = "none") -> Calibration:
        """Calibrate on this seed's images."""
        return Calibration(self.images, fit=fit, clustering=clustering)

    def convert(
        self, groups: int, calibration: Calibration, kind: str = "grouped", shuffle: str = "none"
    ) -> nn.Module:
        """Convert and return the model."""
        return convert(self.dense, self.plan(groups, kind, shuffle), calibration, seed=self.seed).model


def shortcuts(model: nn.Module) -> list[str]:
    """Return the pattern of the 1×1 convs on the shortcuts, where a model has any."""
    return [SKIP] if fnmatch.filter(dict(model.named_modules()), SKIP) else []


Method = Callable[[Setting, int], nn.Module]


def truncation(setting: Setting, groups: int) -> nn.Module:
    """Keep the diagonal blocks of the dense weights."""
    return restructure(setting.dense, setting.plan(groups).recipes)


def weights_only(setting: Setting, groups: int) -> nn.Module:
    """Without images: clustering by norm, truncation, corrected batch norms."""
    return convert(setting.dense, setting.plan(groups), None, seed=setting.seed).model


def truncation_bias(setting: Setting, groups: int) -> nn.Module:
    """Truncation with corrected output means: the ridge leaves nothing of the fit but the bias."""
    fit = replace(PLAIN, ridge=1e6, keep_prior=True)
    return setting.convert(groups, setting.calibration(fit))


def truncation_refresh(setting: Setting, groups: int) -> nn.Module:
    """Truncation and fresh batch-norm statistics."""
    return refreshed(truncation(setting, groups), setting.images)


def norm_refresh(setting: Setting, groups: int) -> nn.Module:
    """Truncation after clustering by weight norm, fresh batch-norm statistics."""
    sites = setting.plan(groups).recipes
    traced = trace(setting.dense).module
    assert traced is not None
    channels = channel_classes(traced, setting.images[:1])
    weights = {site.name: setting.dense.get_submodule(site.name).get_parameter("weight") for site in sites}
    scores = [SiteScore(site, weights[site.name].detach().flatten(2).square().sum(2)) for site in sites]
    orders = cluster(channels, scores, seed=setting.seed).orders
    return refreshed(restructure(apply_orders(setting.dense, channels, orders), sites), setting.images)


def random_grouping(setting: Setting, groups: int) -> nn.Module:
    """The whole fit, but with channels put into groups at random."""
    traced = trace(setting.dense).module
    assert traced is not None
    channels = channel_classes(traced, setting.images[:1])
    generator = torch.Generator().manual_seed(setting.seed)
    orders = {
        index: torch.randperm(found.size, generator=generator) for index, found in enumerate(channels.classes)
    }
    scrambled = replace(setting, dense=apply_orders(setting.dense, channels, orders))
    return scrambled.convert(groups, scrambled.calibration(FitOptions()))


def refreshed(model: nn.Module, images: Tensor) -> nn.Module:
    """Give a model fresh batch-norm statistics, in place."""
    refresh_batch_norms(model, images.split(250))
    return model


def fitted(fit: FitOptions, clustering: str = "none") -> Method:
    """Return a method: least squares with some parts switched on."""
    return lambda setting, groups: setting.convert(groups, setting.calibration(fit, clustering))


def default(shuffle: str = "none", steps: int = 0) -> Method:
    """Return a method: groupify as it comes, perhaps with reconstruction."""

    def method(setting: Setting, groups: int) -> nn.Module:
        calibration = Calibration(setting.images, reconstruction=ReconstructionOptions(steps=steps))
        return setting.convert(groups, calibration, shuffle=shuffle)

    return method


def grouped_pointwise(setting: Setting, groups: int) -> nn.Module:
    """Grouped + pointwise with the number of groups whose MACs come nearest to the grouped net's."""
    example = setting.images[:1]
    wanted = setting.grouped_macs(groups)

    def distance(candidate: int) -> float:
        sites = setting.plan(candidate, "grouped-pointwise").recipes
        return abs(measure_cost(restructure(setting.dense, sites), example).macs - wanted)

    best = min((2, 4, 8, 16, 32, 64), key=distance)
    return setting.convert(best, Calibration(setting.images), kind="grouped-pointwise")


def torch_pruning(
    setting: Setting, groups: int, importance: Any = None, *, isomorphic: bool = False
) -> nn.Module:
    """Torch-Pruning: widths rounded to 16, at the grouped net's MACs, fresh batch norms.

    Args:
        setting: the dense net, with gradients where the importance reads them.
        groups: of the net whose MACs to meet.
        importance: None = group L2 norm.
        isomorphic: rank the channels of all alike layers together, rather than each layer alone.
    """
    import torch_pruning as tp

    example = setting.images[:1]
    wanted = setting.grouped_macs(groups)
    low, high, best = 0.0, 0.98, None
    for _ in range(12):
        ratio = (low + high) / 2
        model = copy.deepcopy(setting.dense)
        classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        for own, dense in zip(model.parameters(), setting.dense.parameters(), strict=True):
            own.grad = dense.grad  # deepcopy leaves them behind
        pruner = tp.pruner.BasePruner(
            model, example, importance=importance or tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio, ignored_layers=[classifier], round_to=16, global_pruning=isomorphic,
            isomorphic=isomorphic,
        )  # fmt: skip
        pruner.step()
        macs = measure_cost(model, example).macs
        if best is None or abs(macs - wanted) < abs(best[0] - wanted):
            best = (macs, model)
        low, high = (ratio, high) if macs > wanted else (low, ratio)
    assert best is not None
    best[1].zero_grad()
    return refreshed(best[1], setting.images)


_REFRESH = replace(PLAIN, refresh_batch_norm=True)
_COMPENSATE = replace(_REFRESH, compensate_residual=True)
_RELU = replace(_COMPENSATE, relu_iterations=FitOptions().relu_iterations)
_REFIT = replace(_RELU, refit_dense=True)
METHODS: dict[str, tuple[Method, bool]] = {  # name: (method, whether the seed matters)
    "truncation": (truncation, False),
    "weights only (--calibrate none)": (weights_only, False),
    "truncation + bias": (truncation_bias, True),
    "truncation + refresh": (truncation_refresh, True),
    "truncation + clustering by norm + refresh": (norm_refresh, True),
    "least squares, not in order": (fitted(replace(PLAIN, in_order=False)), True),
    "least squares, in order": (fitted(PLAIN), True),
    "  + refresh": (fitted(_REFRESH), True),
    "  + residual compensation": (fitted(_COMPENSATE), True),
    "  + ReLU-aware targets": (fitted(_RELU), True),
    "  + refit of the dense layers": (fitted(_REFIT), True),
    "  + clustering by norm": (fitted(_REFIT, "norm"), True),
    "groupify (clustering by data)": (default(), True),
    "groupify on a random grouping": (random_grouping, True),
    "groupify, shuffle all": (default(shuffle="all"), True),
    "groupify, grouped-pointwise, equal MACs": (grouped_pointwise, True),
    "Torch-Pruning + refresh, equal MACs": (torch_pruning, True),
    "groupify, reconstruction": (default(steps=STEPS), True),
    "groupify, shuffle all, reconstruction": (default(shuffle="all", steps=STEPS), True),
}


@dataclass(frozen=True)
class Bench:
    """What every measurement shares."""

    settings: Sequence[Setting]
    test: Any
    limit: int | None
    dense_top1: float
    dense_cost: ModelCost

    def measure(self, name: str, groups: int) -> Row:
        """Run one method for every seed."""
        method, seeded = METHODS[name]
        start = time.perf_counter()
        accuracies, cost = [], self.dense_cost
        for setting in self.settings if seeded else self.settings[:1]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = method(setting, groups)
            accuracies.append(100 * evaluate(model, self.test, limit=self.limit, batch_size=500).top1)
            cost = measure_cost(model, setting.images[:1])
        mean = statistics.fmean(accuracies)
        return Row(
            method=name,
            groups=groups,
            accuracy_mean=mean,
            accuracy_spread=max(accuracies) - min(accuracies),
            drop_mean=self.dense_top1 - mean,
            macs_ratio=self.dense_cost.macs / cost.macs,
            params_ratio=self.dense_cost.params / cost.params,
            seeds=len(accuracies),
            seconds=(time.perf_counter() - start) / len(accuracies),
        )


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="dense weights, from train_dense.py")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--groups", default="2,4,8")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="*", metavar="GLOB|GLOB…")
    parser.add_argument("--json", type=Path, help="rows of other methods that it holds already are kept")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, 4 groups, 300 images, 1000 test images"
    )
    arguments = parser.parse_args()
    groups = [4] if arguments.quick else [int(count) for count in arguments.groups.split(",")]
    seeds = 1 if arguments.quick else arguments.seeds
    images, limit = (300, 1000) if arguments.quick else (IMAGES, None)
    source = load_model(MODEL, checkpoint=arguments.checkpoint)
    data = load_data(arguments.data, source.spec)
    assert data.train is not None
    assert data.test is not None
    dense_top1 = 100 * evaluate(source.model, data.test, limit=limit, batch_size=500).top1
    settings = [
        Setting(source.model, calibration_images(data.train, images, seed=seed), seed)
        for seed in range(seeds)
    ]
    cost = measure_cost(source.model, settings[0].images[:1])
    print(f"{describe_machine()}\ndense top-1 {dense_top1:.2f}%, {images} unlabelled images, {seeds} seeds\n")
    bench = Bench(settings, data.test, limit, dense_top1, cost)
    results = None
    if arguments.json:
        shared = {"dense_accuracy": dense_top1, "calibration_images": images}
        results = ResultFile(arguments.json, shared, keys=("method", "groups"))
    for name in METHODS:
        if not any(fnmatch.fnmatchcase(name, wanted) for wanted in arguments.methods.split("|")):
            continue
        for count in groups:
            row = bench.measure(name, count)
            print(
                f"{row.method:44s} g={row.groups}"
                f"  top-1 {row.accuracy_mean:6.2f} ± {row.accuracy_spread / 2:.2f}"
                f"  drop {row.drop_mean:6.2f}  MACs ÷{row.macs_ratio:.2f}  {row.seconds:5.0f} s",
                flush=True,
            )
            if results:
                results.merge(asdict(row), order=in_order)


def in_order(row: dict[str, Any]) -> tuple[int, int]:
    """As the methods are listed."""
    return list(METHODS).index(row["method"]), row["groups"]


if __name__ == "__main__":
    main()
