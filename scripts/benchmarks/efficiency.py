"""How much of the MACs saved shows in the latency: speed-up ÷ MAC ratio of planned models at 3×224×224.

    python -m scripts.benchmarks.efficiency                # ResNet-18 and -50 at MACs ÷4 and ÷8: half an hour

1 would be a latency that falls like the MACs do. Each size is planned twice: for the MACs alone, and for a
latency beside them that has this efficiency, which the planner holds by structures whose kernels are fast; a
budget that cannot be held is told and leaves no row. Weights are random, since latency does not depend on
them, so the plans come from weights alone. Times are those of ONNX Runtime in float32, batch 1, medians over
three fresh processes of one interleaved run each; beside them the kernels' shares by ONNX Runtime's profiler.
Needs a quiet machine: its load in front of the timing is kept with each row.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from groupify.conversion.surgery import restructure
from groupify.errors import PlanError
from groupify.files import cache_folder
from groupify.graph.call import example_input
from groupify.measure.profiling import profile_onnx
from groupify.measure.timed_files import export_for_timing
from groupify.models.sources import load_model
from groupify.planning.rules import Rules
from groupify.planning.search import SearchOptions, plan_for_budget
from groupify.scores import measure_cost
from groupify.structures import Plan
from scripts.benchmarks.harness import PROCESSES, Parser, Results, matches, time_in_processes

MODELS, SIZES = ("resnet18", "resnet50"), (4, 8)
ASKED = 0.92
DENSE, OWN = "dense", "planned"
KEYS = ("model", "budget")
QUICK, QUICK_RULES = ("squeezenet1_1", "macs=95%"), Rules(include=("features.7.expand3x3",))


@dataclass(frozen=True)
class Row:
    """One plan.

    Attributes:
        budget: what was asked for.
        mac_ratio: dense ÷ planned.
        latency: by threads: median milliseconds of both files, and the speed-up.
        kernels: share of each operator in the time of the planned one's kernels, the largest first.
        load: of the machine in front of the timing, its average over a minute.
        plan: conv → structure.
    """

    model: str
    budget: str
    mac_ratio: float
    latency: Mapping[str, Mapping[str, float]]
    kernels: Mapping[str, float]
    load: float
    plan: Mapping[str, str]

    def efficiency(self, threads: str) -> float:
        """Speed-up ÷ MAC ratio."""
        return self.latency[threads]["speed_up"] / self.mac_ratio

    def __str__(self) -> str:
        gains = ", ".join(
            f"{one['speed_up']:.2f}× = {self.efficiency(threads):.2f} ({threads} thr.)"
            for threads, one in self.latency.items()
        )
        return f"{self.model}, {self.budget}: MACs ÷{self.mac_ratio:.2f}, {gains}"


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "efficiency", "a conv of squeezenet1_1 at 64×64, a moment of timing")
    parser.add_numbers("--threads", "1,2", "threads of ONNX Runtime")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a timing (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default: %(default)s)")
    arguments = parser.parse()
    cases = [(model, budget) for model in MODELS for size in SIZES for budget in budgets(size)]
    processes, rules = PROCESSES, Rules()
    if arguments.quick:
        cases, processes, rules = [QUICK], 1, QUICK_RULES
        arguments.seconds, arguments.threads, arguments.size = 0.2, arguments.threads[:1], 64
    results = Results(Row, KEYS, arguments.json, order=lambda row: row.model, again=arguments.again)
    for model, budget in cases:
        if not matches(f"{model} {budget}", arguments.only) or results.known(model, budget) is not None:
            continue
        shape = (3, arguments.size, arguments.size)
        try:
            row = measure(model, shape, budget, arguments.threads, arguments.seconds, processes, rules)
        except PlanError as problem:
            print(f"{model}, {budget}: {problem}", flush=True)
        else:
            results.put(row)
            print(row, flush=True)
    results.show("efficiency")


def budgets(size: int) -> tuple[str, str]:
    """Return both budgets of a size: the MACs, and a latency beside them."""
    macs = f"macs={100 / size:g}%"
    return macs, f"{macs},latency={ASKED * size:.3g}x"


def measure(
    model_name: str,
    shape: tuple[int, ...],
    budget: str,
    threads: Sequence[int],
    seconds: float,
    processes: int,
    rules: Rules,
) -> Row:
    """Plan, cut the weights accordingly, time."""
    model = load_model(model_name, weights="none", input_shape=shape).model
    plan = plan_for_budget(
        model, shape, budget, rules=rules, options=SearchOptions(cache=cache_folder(), progress=True)
    ).plan
    planned = restructure(model, plan.recipes)
    macs = [measure_cost(one, example_input(shape, like=model)).macs for one in (model, planned)]
    with tempfile.TemporaryDirectory(prefix="groupify-") as folder:
        files = written(model, planned, plan, Path(folder))
        load = os.getloadavg()[0]
        latency = time_in_processes(files, OWN, threads, seconds, processes)
        kernels = profile_onnx(files[OWN], input_shape=shape)
    total = sum(kernel.milliseconds for kernel in kernels)
    return Row(
        model_name, budget, macs[0] / macs[1], latency,
        {kernel.operator: kernel.milliseconds / total for kernel in kernels}, load,
        {site.name: str(site.structure) for site in plan.recipes},
    )  # fmt: skip


def written(dense: nn.Module, planned: nn.Module, plan: Plan, folder: Path) -> dict[str, Path]:
    """Export both models; the first is the one to compare with."""
    models = {DENSE: dense, OWN: planned}
    return {
        name: export_for_timing(model, folder / f"{name}.onnx", plan.input_shape, plan.precision)
        for name, model in models.items()
    }


if __name__ == "__main__":
    main()
