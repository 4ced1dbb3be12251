"""Does the loss that the planner adds up rank plans as they really do? Random plans of equal MACs.

    python -m scripts.benchmarks.ranking --checkpoint FILE [--only 'fisher*'] [--quick]
    python -m scripts.benchmarks.ranking --model demo --data demo

Each plan is the planner's own, for losses that are multiplied by random factors (log-normal, one for each
conv, its deviation drawn between 0 and --spread), at MACs ÷4 within 2%. All are converted with the same 300
unlabelled images, without targets behind the ReLU (an order of plans needs no last digit), and compared with
the dense net on the test images. The losses that are multiplied
are those of Fisher information. For each way to predict, a row: Spearman's rank correlation of the predicted
loss with the measured KL divergence and with the drop of the top-1 accuracy, over all plans of one net.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.site_fit import FitOptions
from groupify.data.batches import calibration_images
from groupify.data.splits import load_data
from groupify.models.sources import load_model
from groupify.planning.budget import MACS
from groupify.planning.candidates import candidates
from groupify.planning.costing import Chosen, Costing
from groupify.planning.rules import AUTO, Rules
from groupify.planning.sensitivity import ERRORS, FISHER, OUTPUTS, Sensitivity, measure_sensitivity
from groupify.scores import measure_cost
from groupify.structures import Choices
from scripts.benchmarks.contest import MODEL
from scripts.benchmarks.harness import Parser, Results, matches
from scripts.benchmarks.methods import Setting
from scripts.benchmarks.rivals import Scores, scores_on
from scripts.benchmarks.tables import net_name

KEYS = ("net", "losses", "power")
RATIO = 4.0
TOLERANCE = 0.02
IMAGES = 300
POWERS = (1.0, 0.5)
_TRIES = 10  # draws for each plan that is wanted


@dataclass(frozen=True)
class Row:
    """One way to predict, on one net.

    Attributes:
        losses: how those of the convs were predicted, see ``SearchOptions.sensitivity``.
        power: of the losses that are added up.
        plans: how many were compared.
        divergence_correlation: of the predicted loss and the measured KL divergence (Spearman).
        drop_correlation: of the predicted loss and the measured drop of top-1.
        least, most: measured KL divergences of the best and of the worst plan, nats.
    """

    net: str
    losses: str
    power: float
    plans: int
    divergence_correlation: float
    drop_correlation: float
    least: float
    most: float

    def __str__(self) -> str:
        return (
            f"{self.net} {self.losses}, power {self.power:g}: rank correlation "
            f"{self.divergence_correlation:.3f} with the divergence, {self.drop_correlation:.3f} with the "
            f"drop; {self.plans} plans, KL {self.least:.4f} to {self.most:.4f}"
        )


def random_plans(costing: Costing, count: int, spread: float, seed: int) -> list[Chosen]:
    """Return different plans of nearly equal MACs: those for randomly changed losses.

    Raises:
        SystemExit: the choices are too few for so many.
    """
    limits = {MACS: costing.dense_costs[MACS] / RATIO}
    found = list(dict.fromkeys(_within(costing, limits[MACS], count, spread, seed)))
    if len(found) < count:
        raise SystemExit(
            f"{len(found)} different plans at MACs ÷{RATIO:g}, {count} wanted; give a larger --spread"
        )
    return found[:count]


def _within(costing: Costing, macs: float, count: int, spread: float, seed: int) -> Iterator[Chosen]:
    random = np.random.default_rng(seed)
    for _ in range(_TRIES * count):
        deviation = spread * random.random()
        factors = np.exp(deviation * random.standard_normal(len(costing.choices.sites))).tolist()
        chosen = replace(costing, sensitivity=_changed(costing, factors)).best({MACS: macs})
        if chosen is not None and costing.costs(chosen)[MACS] >= (1 - TOLERANCE) * macs:
            yield chosen


def _changed(costing: Costing, factors: Sequence[float]) -> Sensitivity:
    losses = {
        option.key: factor * costing.sensitivity.loss(option)
        for options, factor in zip(costing.choices.sites, factors, strict=True)
        for option in options
    }
    return Sensitivity(losses, "randomly changed")


@dataclass(frozen=True)
class Measured:
    """What became of one plan."""

    chosen: Chosen
    divergence: float
    drop: float


def measure(
    setting: Setting, choices: Choices, plans: Sequence[Chosen], test: object, limit: int | None
) -> list[Measured]:
    """Convert plans and compare them with the dense net."""
    dense = scores_on(test, limit, setting.dense)
    calibration = Calibration(setting.images, fit=FitOptions(relu_iterations=0))

    def scores(chosen: Chosen) -> Scores:
        converted = convert(setting.dense, choices.plan(chosen), calibration, seed=setting.seed)
        return scores_on(test, limit, converted.model)

    found = []
    for chosen in tqdm(plans, "plans", unit="plan"):
        after = scores(chosen)
        found.append(Measured(chosen, dense.divergence(after), dense.top1 - after.top1))
    return found


def row(net: str, losses: str, power: float, costing: Costing, measured: Sequence[Measured]) -> Row:
    """Compare what was predicted with what was measured."""
    predicted = [costing.loss(one.chosen, power=power) for one in measured]
    divergences = [one.divergence for one in measured]
    return Row(
        net, losses, power, len(measured), _correlation(predicted, divergences),
        _correlation(predicted, [one.drop for one in measured]), min(divergences), max(divergences),
    )  # fmt: skip


def _correlation(one: Sequence[float], other: Sequence[float]) -> float:
    found = float(spearmanr(one, other).statistic)
    return 0.0 if math.isnan(found) else found


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "ranking", "5 plans, 64 images, 500 test images")
    parser.add_net(MODEL, checkpoint=False)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--spread", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse()
    count, images, limit = (5, 64, 500) if arguments.quick else (arguments.plans, IMAGES, None)
    source = load_model(arguments.model, checkpoint=arguments.checkpoint)
    data = load_data(arguments.data, source.spec)
    if data.train is None or data.test is None:
        parser.error(f"--data {arguments.data}: expected training and test images")
    net, seed = net_name(arguments.model), arguments.seed
    results = Results(Row, KEYS, arguments.json, {"calibration_images": images}, again=arguments.again)
    setting = Setting(source.model, calibration_images(data.train, images, seed=seed), seed)
    choices = candidates(source.model, setting.shape, Rules(min_group_width=AUTO))
    cost = measure_cost(source.model, setting.images[:1])
    costings = {
        losses: Costing(
            choices, measure_sensitivity(source.model, choices, setting.images, of=losses, seed=seed), cost
        )
        for losses in (FISHER, OUTPUTS, ERRORS)
        if matches(f"{net} {losses}", arguments.only)
    }
    if not costings:
        parser.error(f"no row is called {arguments.only!r}: there are {FISHER}, {OUTPUTS} and {ERRORS}")
    plans = random_plans(next(iter(costings.values())), count, arguments.spread, seed)
    measured = measure(setting, choices, plans, data.test, limit)
    for losses, costing in costings.items():
        for power in POWERS:
            found = row(net, losses, power, costing, measured)
            results.put(found)
            print(found, flush=True)
    results.show("ranking")


if __name__ == "__main__":
    main()
