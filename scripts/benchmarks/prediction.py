"""Predicted against measured latency of whole models in ONNX Runtime, one thread, batch 1, 3×224×224.

In float32, or in int8: both the dense model and the plans.

    python -m scripts.benchmarks.prediction                 # four models: about 20 minutes
    python -m scripts.benchmarks.prediction --only resnet18 --precision int8

The prediction is that of the planner: the dense model as measured when the table was made, less its convs
there, plus what the table says of their replacements. For every model the latency table is made anew; the
uniform models are timed in front of it and behind it, interleaved with the dense one, and the median is that
of all runs: the table takes minutes, in which the speed of a machine may change. Weights are random: latency
does not depend on them. Besides uniform groups there is a mixed plan, for half of the dense latency, which
can only be timed behind. Where the dense model's two times differ by more than 5%, all is measured again, at
most twice. Needs a quiet machine. How far the speed-up over the dense model was off, which a
change of the machine's speed leaves as it is, is told beside the error in milliseconds.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from groupify.conversion.surgery import restructure
from groupify.graph.call import example_input
from groupify.measure.benchmarks import Timing, benchmark_onnx
from groupify.measure.latency_table import look_up, measure_table
from groupify.measure.timed_files import export_for_timing
from groupify.models.sources import load_model
from groupify.planning.budget import LATENCY
from groupify.planning.candidates import candidates
from groupify.planning.costing import Costing
from groupify.planning.rules import Rules
from groupify.planning.sensitivity import weight_sensitivity
from groupify.scores import measure_cost
from groupify.structures import FLOAT32, PRECISIONS, Plan, Precision, Uniform
from scripts.benchmarks.harness import Parser, Results

MODELS = ("resnet18", "resnet50", "vgg16_bn", "densenet121")
KEYS = ("model", "plan", "precision")
ALLOWED = 0.10
STEADY = 0.05  # how much the dense model's time in front of the table and behind it may differ
MIXED = "planned for half of the latency"
UNIFORM = (
    Uniform("grouped", 2),
    Uniform("grouped", 4),
    Uniform("grouped", 8),
    Uniform("grouped-pointwise", 8),
)


@dataclass(frozen=True)
class Row:
    """One model with one plan; milliseconds, and relative errors of the prediction and of its speed-up."""

    model: str
    plan: str
    predicted: float
    measured: float
    p10: float
    p90: float
    dense_predicted: float
    dense_measured: float
    error: float = 0.0
    speed_up_error: float = 0.0
    precision: Precision = FLOAT32

    def __post_init__(self) -> None:
        object.__setattr__(self, "error", self.predicted / self.measured - 1)
        predicted, measured = self.dense_predicted / self.predicted, self.dense_measured / self.measured
        object.__setattr__(self, "speed_up_error", predicted / measured - 1)

    def __str__(self) -> str:
        return (
            f"{self.model:12s} {self.precision:7s} {self.plan:34s} predicted {self.predicted:7.2f} ms, "
            f"measured {self.measured:7.2f} ms ({self.p10:.2f}–{self.p90:.2f}): {100 * self.error:+.1f}%, "
            f"speed-up {100 * self.speed_up_error:+.1f}%"
        )


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "prediction", "resnet18 on images of 64×64, a second of timing")
    parser.add_argument("--seconds", type=float, default=10.0, help="timing per model (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default=FLOAT32, help="default: %(default)s")
    arguments = parser.parse()
    if arguments.quick:
        arguments.size, arguments.seconds = 64, 1.0
    results = Results(
        Row,
        KEYS,
        arguments.json,
        order=lambda row: (PRECISIONS.index(row.precision), MODELS.index(row.model)),
        again=arguments.again,
    )
    for name in parser.chosen(MODELS[:1] if arguments.quick else MODELS, arguments.only):
        if results.known(name, "dense", arguments.precision) is None:
            shape = (3, arguments.size, arguments.size)
            for row in measure(name, shape, arguments.seconds, arguments.precision):
                results.put(row)
    results.show("prediction")
    for quantity in ("error", "speed_up_error"):
        within = [abs(getattr(row, quantity)) <= ALLOWED for row in results.rows.values()]
        print(f"{quantity.replace('_', ' ')}: {sum(within)} of {len(within)} within {ALLOWED:.0%}")


def measure(
    name: str, shape: tuple[int, ...], seconds: float, precision: Precision, attempts: int = 3
) -> list[Row]:
    """Predict, export and time the plans of one model; once more if the machine's speed changed meanwhile."""
    model = load_model(name, weights="none", input_shape=shape).model
    choices = candidates(model, shape, Rules(precision=precision))
    chosen = {"dense": (0,) * len(choices.sites)}
    chosen |= {str(key): choices.uniform[key] for key in UNIFORM if key in choices.uniform}
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
        return measure(name, shape, seconds, precision, attempts - 1)
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
            precision=precision,
        )
        print(row, flush=True)
        rows.append(row)
    return rows


def pool(one: Timing, other: Timing) -> Timing:
    """Return all runs of two timings as one."""
    return Timing(one.runs_ms + other.runs_ms, one.rounds_ms + other.rounds_ms)


def export(model: nn.Module, plan: Plan, path: Path) -> Path:
    """Export the model with a plan and truncated weights."""
    converted = restructure(model, plan.recipes) if plan.converted else model
    return export_for_timing(converted, path, plan.input_shape, plan.precision)


if __name__ == "__main__":
    main()
