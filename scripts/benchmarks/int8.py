"""Models planned for int8 against the dense model in int8: latency, accuracy, memory, file size.

    python -m scripts.benchmarks.int8 --checkpoint FILE             # all rows: about an hour
    python -m scripts.benchmarks.int8 --only 'resnet18 *'           # those of random weights need no FILE

ResNet-18 on Fashion-MNIST is fitted on 1,000 unlabelled images and judged on all test images; both int8 files
take their ranges from 256 of the images. ResNet-18 and ResNet-50 at 3×224×224 have random weights: latency
does not depend on them, and their accuracy means nothing. Plans are made for a latency, in int8 against the
dense model in int8, and where the row says so for MACs as well. Times are medians over three fresh processes
of one interleaved run each (``groupify bench --onnx``), batch 1; memory is the peak of a process that runs
the file once. The load of the machine in front of the timing is kept with each row. A budget that cannot be
held is told, and a slower one tried.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.surgery import restructure
from groupify.data.batches import Data, calibration_images
from groupify.data.splits import load_data
from groupify.errors import PlanError
from groupify.files import cache_folder
from groupify.graph.call import example_input
from groupify.measure.memory import peak_memory
from groupify.models.sources import load_model
from groupify.models.specs import Source
from groupify.onnx.exporting import export_onnx
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.onnx.runtime import OnnxModule
from groupify.planning.rules import Rules
from groupify.planning.search import Images, SearchOptions, plan_for_budget
from groupify.scores import evaluate, measure_cost
from groupify.structures import INT8, Plan
from scripts.benchmarks.harness import PROCESSES, Parser, Results, time_in_processes

TRAINED = "groupify.models.demo:fashion_resnet18"
RANGES = 256  # images that set the ranges
DENSE_FLOAT32, DENSE, OWN = "dense float32", "dense int8", "planned int8"


@dataclass(frozen=True)
class Case:
    """What one row is measured on.

    Attributes:
        model: its name.
        side: of the images, pixels.
        budgets: what is asked of the plan; the first that can be held.
        structures: families to choose from; None = all.
    """

    model: str
    side: int
    budgets: tuple[str, ...]
    structures: tuple[str, ...] | None = None


def at_macs(share: str, *gains: float) -> tuple[str, ...]:
    """Return budgets of a share of the MACs and a gain in latency."""
    return tuple(f"macs={share},latency={gain:g}x" for gain in gains)


CASES = {
    "ResNet-18 at 28×28, 2×": Case(TRAINED, 28, ("latency=2.1x", "latency=2x")),
    "ResNet-18 at 28×28, 2.8×": Case(TRAINED, 28, ("latency=2.8x", "latency=2.5x", "latency=2.3x")),
    "resnet18 at 224×224, MACs ÷5": Case("resnet18", 224, at_macs("20%", 2.7, 2.5, 2.2)),
    "resnet18 at 224×224, MACs ÷7": Case("resnet18", 224, at_macs("14.3%", 3, 2.8, 2.6)),
    "resnet50 at 224×224, MACs ÷4": Case("resnet50", 224, at_macs("25%", 1.9, 1.8, 1.7)),
}
QUICK = {"demo, MACs ÷1.2": Case("demo", 28, ("macs=83%",), ("grouped",))}


@dataclass(frozen=True)
class Row:
    """One plan for int8.

    Attributes:
        name: of the case.
        budget: what was asked for.
        mac_ratio: dense ÷ planned.
        latency: by threads: median milliseconds of each file, and the speed-up over dense int8.
        top1: of each file on the test images, fractions; None where the weights are random.
        peak_memory_bytes, file_bytes: of each file.
        load: of the machine in front of the timing, its average over a minute.
        plan: conv → structure.
    """

    name: str
    budget: str
    mac_ratio: float
    latency: Mapping[str, Mapping[str, float]]
    top1: Mapping[str, float] | None
    peak_memory_bytes: Mapping[str, int]
    file_bytes: Mapping[str, int]
    load: float
    plan: Mapping[str, str]

    def __str__(self) -> str:
        gains = ", ".join(f"{one['speed_up']:.2f}× ({threads} thr.)" for threads, one in self.latency.items())
        tops = "" if self.top1 is None else f", top-1 {self.top1[DENSE]:.4f} → {self.top1[OWN]:.4f}"
        return f"{self.name}: {gains} over dense int8 at MACs ÷{self.mac_ratio:.2f}{tops}"


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "int8", "the demo net, grouped for MACs, a moment of timing in one process")
    parser.add_argument("--checkpoint", type=Path, help="dense weights of the trained ResNet-18")
    parser.add_argument("--data", default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=1000, help="to fit on (default: %(default)s)")
    parser.add_numbers("--threads", "1,2", "threads of ONNX Runtime")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a timing (default: %(default)s)")
    arguments = parser.parse()
    if arguments.quick:
        arguments.seconds, arguments.data, arguments.threads = 0.2, "demo", arguments.threads[:1]
        arguments.images = 64
    results = Results(Row, ("name",), arguments.json, order=lambda row: list(CASES).index(row.name)
                      if row.name in CASES else -1, again=arguments.again)  # fmt: skip
    cases = QUICK if arguments.quick else CASES
    for name in parser.chosen(cases, arguments.only):
        if results.known(name) is not None:
            continue
        if cases[name].model == TRAINED and arguments.checkpoint is None:
            parser.error(f"{name}: it needs --checkpoint, or leave it out with --only")
        row = measure_first(name, cases[name], arguments)
        if row is not None:
            results.put(row)
            print(row, flush=True)
    results.show("int8")


def measure_first(name: str, case: Case, arguments: argparse.Namespace) -> Row | None:
    """Measure a case under the first of its budgets that can be held; None where none can."""
    for budget in case.budgets:
        try:
            return measure(name, case, budget, arguments)
        except PlanError as problem:
            print(f"{name}: {problem}", flush=True)
    return None


def measure(name: str, case: Case, budget: str, arguments: argparse.Namespace) -> Row:
    """Plan, convert, quantise, time and judge one case under a budget."""
    trained = case.model in (TRAINED, "demo")
    shape: tuple[int, ...] = (3, case.side, case.side)
    source = load_model(
        case.model,
        weights="auto" if trained else "none",
        checkpoint=arguments.checkpoint if case.model == TRAINED else None,
        input_shape=None if trained else shape,
    )
    shape = tuple(source.spec.input_shape)
    images, test = load_images(source, arguments.data, arguments.images) if trained else (None, None)
    plan, model = planned(source.model, shape, budget, case.structures, images)
    example = example_input(shape, like=source.model)
    macs = [measure_cost(one, example).macs for one in (source.model, model)]
    ranges = torch.randn(4, *shape) if images is None else images.fit[:RANGES]
    with tempfile.TemporaryDirectory(prefix="groupify-") as folder:
        files = written(source.model, model, shape, ranges, Path(folder))
        load = os.getloadavg()[0]
        latency = time_in_processes(
            files, OWN, arguments.threads, arguments.seconds, 1 if arguments.quick else PROCESSES
        )
        return Row(
            name, budget, macs[0] / macs[1], latency,
            top1=None if test is None else {key: top1_of(path, test) for key, path in files.items()},
            peak_memory_bytes={
                key: peak_memory(path, input_shape=shape, batch_size=1, threads=1).peak_bytes
                for key, path in files.items()
            },
            file_bytes={key: path.stat().st_size for key, path in files.items()},
            load=load,
            plan={site.name: str(site.structure) for site in plan.recipes},
        )  # fmt: skip


def load_images(source: Source, spec: str, count: int) -> tuple[Images, Data]:
    """Return images to fit on and half as many to compare plans on, and the test part."""
    data = load_data(spec, source.spec)
    assert data.train is not None
    assert data.test is not None
    drawn = calibration_images(data.train, count + count // 2, seed=0)
    return Images(drawn[:count], drawn[count:]), data.test


def planned(
    model: nn.Module,
    shape: tuple[int, ...],
    budget: str,
    structures: tuple[str, ...] | None,
    images: Images | None,
) -> tuple[Plan, nn.Module]:
    """Return the plan for a budget in int8, and the model converted; without images with cut weights."""
    converted: dict[Any, nn.Module] = {}

    def convert_plan(plan: Plan) -> nn.Module:
        if plan.recipes not in converted:
            assert images is not None
            converted[plan.recipes] = convert(model, plan, Calibration(images.fit), seed=0).model
        return converted[plan.recipes]

    found = plan_for_budget(
        model, shape, budget, images, rules=Rules(precision=INT8, structures=structures),
        options=SearchOptions(cache=cache_folder(), progress=True), convert_plan=convert_plan,
    )  # fmt: skip
    if images is None:
        return found.plan, restructure(model, found.plan.recipes)
    return found.plan, convert_plan(found.plan)


def written(
    dense: nn.Module, own: nn.Module, shape: tuple[int, ...], ranges: Tensor, folder: Path
) -> dict[str, Path]:
    """Export both models and quantise them; the first is the one to compare with."""
    paths = {DENSE: folder / "dense.int8.onnx", OWN: folder / "own.int8.onnx"}
    float32 = {DENSE: folder / "dense.onnx", OWN: folder / "own.onnx"}
    for name, model in ((DENSE, dense), (OWN, own)):
        export_onnx(model, float32[name], input_shape=shape)
        quantize_onnx(float32[name], paths[name], images=ranges)
    return {**paths, DENSE_FLOAT32: float32[DENSE]}


def top1_of(path: Path, test: Data) -> float:
    """Accuracy of a file as it runs."""
    return evaluate(OnnxModule(path), test).top1


if __name__ == "__main__":
    main()
