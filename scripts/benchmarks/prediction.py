#!/usr/bin/env python3
"""Predicted against measured latency of whole models in ONNX Runtime, one thread, batch 1, 3×224×224.

    python -m scripts.benchmarks.prediction                 # four models: about 20 minutes
    python -m scripts.benchmarks.prediction --only resnet18

The prediction is that of the planner: the dense model as measured when the table was made, less its convs
there, plus what the table says of their replacements. For every model the latency table is made anew; the
uniform models are timed in front of it and behind it, interleaved with the dense one, and the median is that
of all runs: the table takes minutes, in which the speed of a machine may change. Weights are random: latency
does not depend on them. Besides uniform groups there is a mixed plan, for half of the dense latency, which
can only be timed behind. Where the dense model's two times differ by more than 5%, all is measured again, at
most twice. Needs a quiet machine. How far the speed-up over the dense model was off, which a
change of the machine's speed leaves as it is, is told beside the error in milliseconds. The rows go into
benchmarks/prediction.json, in the place of those of the same model.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import tempfile
from pathlib import Path

from torch import nn

from groupify.conversion.surgery import restructure
from groupify.graph.trace import example_input
from groupify.measure.benchmarks import benchmark_onnx
from groupify.measure.latency_table import look_up, measure_table
from groupify.measure.timing import Timing
from groupify.models import load_model
from groupify.onnx.exporting import export_onnx
from groupify.planning.budget import LATENCY
from groupify.planning.candidates import candidates
from groupify.planning.costing import Costing
from groupify.planning.search import uniform_name
from groupify.planning.sensitivity import weight_sensitivity
from groupify.scores.cost import measure_cost
from groupify.structures import Plan
from scripts.benchmarks.harness import BENCHMARKS, ResultFile

MODELS = ("resnet18", "resnet50", "vgg16_bn", "densenet121")
OUTPUT = BENCHMARKS / "prediction.json"
ALLOWED = 0.10
STEADY = 0.05  # how much the dense model's time in front of the table and behind it may differ
MIXED = "planned for half of the latency"
UNIFORM = (
    ("grouped", 2, False),
    ("grouped", 4, False),
    ("grouped", 8, False),
    ("grouped-pointwise", 8, False),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One model with one plan; milliseconds."""

    model: str
    plan: str
    predicted: float
    measured: float
    p10: float
    p90: float
    dense_predicted: float
    dense_measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1

    @property
    def speed_up_error(self) -> float:
        """Relative error of the predicted speed-up over the dense model."""
        return (self.dense_predicted / self.predicted) / (self.dense_measured / self.measured) - 1


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="GLOB", default="*", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--seconds", type=float, default=10.0, help="timing per model (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=OUTPUT, help="where the rows go (default: %(default)s)")
    arguments = parser.parse_args()
    models = [model for model in MODELS if fnmatch.fnmatchcase(model, arguments.only)]
    if not models:
        parser.error(f"no model is called {arguments.only!r}: there are {', '.join(MODELS)}")
    results = ResultFile(arguments.json, keys=("model", "plan"))
    for name in models:
        for row in measure(name, (3, arguments.size, arguments.size), arguments.seconds):
            entry = {**dataclasses.asdict(row), "error": row.error, "speed_up_error": row.speed_up_error}
            results.merge(entry, order=lambda row: MODELS.index(row["model"]))
    for quantity in ("error", "speed_up_error"):
        within = [abs(row[quantity]) <= ALLOWED for row in results.rows.values()]
        print(f"{quantity.replace('_', ' ')}: {sum(within)} of {len(within)} within {ALLOWED:.0%}")


def measure(name: str, shape: tuple[int, ...], seconds: float, attempts: int = 3) -> list[Row]:
    """Predict, export and time the plans of one model; once more if the machine's speed changed meanwhile."""
    model = load_model(name, weights="none", input_shape=shape).model
    choices = candidates(model, shape)
    chosen = {"dense": (0,) * len(choices.sites)}
    chosen |= {uniform_name(key): choices.uniform[key] for key in UNIFORM if key in choices.uniform}
    with tempfile.TemporaryDirectory() as folder:
        files = {
            plan: export(model, choices.plan(indices), Path(folder, f"{number}.onnx"))
            for number, (plan, indices) in enumerate(chosen.items())
        }
        before = benchmark_onnx(files, input_shape=shape, seconds=seconds / 2, progress=True)
        latencies = look_up(measure_table(model, choices, progress=True), model, choices)
        cost = measure_cost(model, example_input(shape, like=model))
        costing = Costing(choices, weight_sensitivity(model, choices, progress=True), cost, latencies)
        half = costing.best({LATENCY: latencies.dense_ms / 2})
        if half is not None:
            chosen[MIXED] = half
            files[MIXED] = export(model, choices.plan(half), Path(folder, "half.onnx"))
        after = benchmark_onnx(files, input_shape=shape, seconds=seconds / 2, progress=True)
    first, second = ({row.model: row.timing for row in timed} for timed in (before, after))
    change = second["dense"].median_ms / first["dense"].median_ms - 1
    if abs(change) > STEADY and attempts > 1:
        print(f"{name}: the machine's speed changed by {100 * change:+.0f}%, once more", flush=True)
        return measure(name, shape, seconds, attempts - 1)
    pooled = {plan: pool(first[plan], second[plan]) for plan in first}
    dense = pooled["dense"].median_ms
    # The plan was not there in front of the table: its time is brought to the speed of both timings.
    to_both = dense / second["dense"].median_ms
    rows = []
    for plan, indices in chosen.items():
        timing, factor = (pooled[plan], 1.0) if plan in pooled else (second[plan], to_both)
        row = Row(
            name,
            plan,
            latencies.total(indices),
            factor * timing.median_ms,
            factor * timing.p10_ms,
            factor * timing.p90_ms,
            dense_predicted=latencies.dense_ms,
            dense_measured=dense,
        )
        print(
            f"{name:12s} {plan:34s} predicted {row.predicted:7.2f} ms, measured {row.measured:7.2f} ms "
            f"({row.p10:.2f}–{row.p90:.2f}): {100 * row.error:+.1f}%, "
            f"speed-up {100 * row.speed_up_error:+.1f}%",
            flush=True,
        )
        rows.append(row)
    return rows


def pool(one: Timing, other: Timing) -> Timing:
    """Return all runs of two timings as one."""
    return Timing(one.runs_ms + other.runs_ms, one.rounds_ms + other.rounds_ms)


def export(model: nn.Module, plan: Plan, path: Path) -> Path:
    """Export the model with a plan and truncated weights."""
    converted = restructure(model, plan.recipes) if plan.converted else model
    return export_onnx(converted, path, input_shape=plan.input_shape).path


if __name__ == "__main__":
    main()
