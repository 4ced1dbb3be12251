"""Accuracy after a little training, at equal MACs of the whole net: ResNet-18 on Fashion-MNIST, and rivals.

    python -m scripts.benchmarks.recovery --checkpoint FILE --twin FILE [--only 'groupify ÷*'] [--quick]

Every method gets the same 1,000 unlabelled images to make its net from, the same images to train on (55,000,
and 5,000 held out to choose between the net as made and as trained), the same number of steps, and the same
distillation from the dense net. Its learning rate is the best of --learning-rates for it, chosen on a smaller
net by images that neither that net nor its training has seen; see training.py. "groupify" takes the rate that
follows from what was lost, as the product does, which looks at no other run. Accuracy is that of all 10,000
test images, in float32.

A row is one run, and is not measured again. A training that is stopped goes on where it stood when the same
command is started again, from a state in --keep; several commands may share the rows by --only.
"""

from __future__ import annotations

import argparse
import functools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from groupify.conversion.surgery import restructure
from groupify.data.batches import calibration_images
from groupify.data.splits import load_data
from groupify.files import cache_folder
from groupify.models.sources import load_model
from groupify.scores import measure_cost
from groupify.structures import FAMILIES
from groupify.training.finetuning import FinetuneResult
from groupify.training.state import Checkpointing
from scripts.benchmarks.contest import IMAGES, MODEL, training_setting
from scripts.benchmarks.harness import Parser, Results, matches
from scripts.benchmarks.low_rank import STRUCTURES
from scripts.benchmarks.methods import Setting, make, pruned, randomised, rules_for
from scripts.benchmarks.rivals import Scores, Way, chosen, groupify, low_rank, pack, scores_on
from scripts.benchmarks.training import Trainer, add_training

KEYS = ("method", "size", "epochs", "seed")
QUICK = "one seed, ÷6.9, 0 and 0.1 epochs of 2,000 images, two rates, 300 images, 1,000 test images"
SAVED_EVERY = 100  # steps of a training


@dataclass(frozen=True)
class Row:
    """One run; accuracies in percent, the drop in points.

    Attributes:
        size: how many times fewer MACs of the whole net were asked for.
        divergence: KL divergence of the class probabilities from the dense net's, nats, mean over the images.
        learning_rate: None where nothing was trained.
        trained: whether the trained weights were taken; None where nothing was trained.
        gain: by how much they lower the loss on held-out images, those that were taken or else the last ones.
        gain_error: its standard error.
        seconds: of the training; of making the net, where nothing was trained.
        right: which test images were right, see ``rivals.pack``.
    """

    method: str
    size: float
    epochs: float
    seed: int
    top1: float
    drop: float
    divergence: float
    macs_ratio: float
    params_ratio: float
    seconds: float
    right: str
    learning_rate: float | None = None
    trained: bool | None = None
    gain: float | None = None
    gain_error: float | None = None

    def __str__(self) -> str:
        rate = "" if self.learning_rate is None else f"  rate {self.learning_rate:.2g}"
        taken = "" if self.trained is not False else "  as made"
        return (
            f"{row_name(self.method, self.size, self.epochs, self.seed):50s} top-1 {self.top1:6.2f}  drop "
            f"{self.drop:6.2f}  KL {self.divergence:.4f}  MACs ÷{self.macs_ratio:.2f}{rate}{taken}"
            f"  {self.seconds:5.0f} s"
        )


def row_name(method: str, size: float, epochs: float, seed: int) -> str:
    """What ``--only`` selects."""
    return f"{method} ÷{size:g} epochs={epochs:g} seed={seed}"


def from_random(setting: Setting, macs: int) -> nn.Module:
    """The architecture of groupify's net with random weights."""
    plan = chosen(
        setting, macs, tuple(FAMILIES)
    )  # as groupify's own rows ask for it, so that it is found once
    return randomised(restructure(setting.dense, plan.recipes), setting.seed)


OURS, OURS_TUNED = "groupify", "groupify, rate chosen"
_AS_IT_COMES = groupify()
METHODS: dict[str, Way] = {
    OURS: _AS_IT_COMES,
    OURS_TUNED: _AS_IT_COMES,
    **{name: low_rank(name) for name in STRUCTURES},
    "Torch-Pruning": pruned,
    "random weights": from_random,
}


def macs_for(setting: Setting, size: float) -> int:
    """MACs of the whole net to come down to."""
    return round(setting.macs(setting.dense) / size)


@functools.lru_cache(maxsize=4)
def made(way: Way, setting: Setting, size: float) -> tuple[nn.Module, float]:
    """Return the net before the training, which all rows of a seed start from, and the seconds it took."""
    start = time.perf_counter()
    return make(way, setting, macs_for(setting, size)), time.perf_counter() - start


@dataclass(frozen=True)
class Recovery:
    """Measures rows.

    Attributes:
        settings: one for each seed.
        test: runs a net on the test images.
        trainer: trains.
        results: where the rows go.
        keep: folder for the states of trainings that are stopped.
        until: time of ``time.monotonic`` after which no row is begun; None = none.
    """

    settings: Sequence[Setting]
    test: Callable[[nn.Module], Scores]
    trainer: Trainer
    results: Results[Row]
    keep: Path
    until: float | None = None

    @functools.cached_property
    def dense(self) -> Scores:
        """The dense net's."""
        return self.test(self.settings[0].dense)

    def run(self, sizes: Sequence[float], epochs: Sequence[float], only: str) -> None:
        """Measure what is missing, seed by seed and method by method."""
        for setting in self.settings:
            for method in METHODS:
                for size in sizes:
                    for length in sorted(epochs):
                        if self.until is not None and time.monotonic() > self.until:
                            return
                        key = method, size, length, setting.seed
                        if matches(row_name(*key), only) and self.results.known(*key) is None:
                            row = self.measure(method, size, length, setting)
                            self.results.put(row)
                            print(row, flush=True)

    def measure(self, method: str, size: float, epochs: float, setting: Setting) -> Row:
        """Measure one row."""
        model, seconds = made(METHODS[method], setting, size)
        if not epochs:
            return self._row(method, size, setting, model, seconds)
        name, rate = row_name(method, size, epochs, setting.seed), self._rate(method, size)
        result = self._train(model, name, epochs, setting, rate)
        row = self._row(method, size, setting, result.model, result.seconds)
        told = result.best if result.best_step else result.history[-1]
        assert told.gain is not None
        return replace(
            row, epochs=epochs, learning_rate=result.settings.learning_rate, trained=result.best_step > 0,
            gain=told.gain.mean, gain_error=told.gain.error,
        )  # fmt: skip

    def _row(self, method: str, size: float, setting: Setting, model: nn.Module, seconds: float) -> Row:
        found, example = self.test(model), setting.images[:1]
        cost, dense = measure_cost(model, example), measure_cost(setting.dense, example)
        return Row(
            method, size, 0.0, setting.seed, found.top1, self.dense.top1 - found.top1,
            self.dense.divergence(found), dense.macs / cost.macs, dense.params / cost.params, seconds,
            pack(found.right),
        )  # fmt: skip

    def _train(
        self, model: nn.Module, name: str, epochs: float, setting: Setting, rate: float | None
    ) -> FinetuneResult:
        """Train, and go on with a training that was stopped."""
        self.keep.mkdir(parents=True, exist_ok=True)
        state = self.keep / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.state"
        checkpointing = Checkpointing(state, SAVED_EVERY, resume=True)
        result = self.trainer.train(model, epochs, rate, setting.seed, checkpointing)
        state.unlink(missing_ok=True)
        return result

    def _rate(self, method: str, size: float) -> float | None:
        """None = as much as was lost asks for."""
        if method == OURS:
            return None
        return self.trainer.learning_rate(
            f"{method} ÷{size:g}", lambda twin: make(METHODS[method], twin, macs_for(twin, size))
        )


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "recovery", QUICK)
    parser.add_net(MODEL)
    add_training(parser)
    parser.add_numbers("--sizes", "6.9,3.7,11", "MACs of the dense net ÷ those of a row", float)
    parser.add_numbers("--epochs", "0,0.1,1", "of training", float)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no row later")
    parser.add_argument(
        "--keep", type=Path, default=cache_folder() / "recovery", metavar="FOLDER",
        help="states of trainings that are stopped (default: %(default)s)",
    )  # fmt: skip
    measure(parser.parse())


def measure(arguments: argparse.Namespace) -> None:
    """Measure what the options ask for."""
    until = None if arguments.stop_after is None else time.monotonic() + arguments.stop_after
    count, limit, seeds = (300, 1000, 1) if arguments.quick else (IMAGES, None, arguments.seeds)
    source = load_model(arguments.model, checkpoint=arguments.checkpoint)
    data = load_data(arguments.data, source.spec)
    assert data.train is not None
    settings = [
        Setting(source.model, calibration_images(data.train, count, seed=seed), seed, rules_for(source.model))
        for seed in range(seeds)
    ]
    shared = {"calibration_images": count, "training": training_setting("amp")}
    results = Results(Row, KEYS, arguments.json, shared, order, again=arguments.again)
    trainer = Trainer.load(arguments, source.model, data, results, count)
    test = functools.partial(scores_on, data.test, limit)
    recovery = Recovery(settings, test, trainer, results, arguments.keep, until)
    sizes, epochs = ([6.9], [0.0, 0.1]) if arguments.quick else (arguments.sizes, arguments.epochs)
    recovery.run(sizes, epochs, arguments.only)
    results.show("recovery")


def order(row: Row) -> tuple[float, int, float, int]:
    """By size, then as the methods are listed."""
    return row.size, list(METHODS).index(row.method), row.epochs, row.seed


if __name__ == "__main__":
    main()
