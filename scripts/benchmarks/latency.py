"""Latency in ONNX Runtime, dense against grouped, one thread, batch 1, 3×224×224.

For every row the dense and the grouped model are exported, checked against PyTorch, and timed interleaved in
one run. Weights are random (latency does not depend on them); batch norms see one random batch first, so that
activations neither vanish nor blow up. Group widths are clamped to the blocked kernel of this CPU.

Efficiency is the speed-up divided by the MAC ratio: 1 means that every multiply-accumulate that was saved
saved its time. Rows below 0.8 are explained by a profile of both sessions.

    python -m scripts.benchmarks.latency                     # everything: about 10 minutes
    python -m scripts.benchmarks.latency --quick             # two rows, a minute
    python -m scripts.benchmarks.latency --only 'resnet50*' --again
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from groupify.conversion.surgery import restructure
from groupify.measure.benchmarks import Latency, benchmark_onnx, speed_up
from groupify.measure.profiling import profile_onnx
from groupify.models.sources import load_model
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from groupify.onnx.runtime import count_blocked_convs
from groupify.planning.rules import Rules
from groupify.planning.uniform import plan
from groupify.scores import measure_cost
from scripts.benchmarks.harness import Parser, Results

INPUT_SHAPE = (3, 224, 224)
EXPLAIN_BELOW = 0.8
STEADY = 1.1  # 90th over 10th percentile of a run that nothing disturbed


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    groups: int
    shuffle: str = "none"
    part: str = ""  # submodule to measure apart; "" = the whole model
    target: float | None = None  # efficiency to reach

    @property
    def name(self) -> str:
        """Model, part, groups and shuffle in one word."""
        part = f".{self.part}" if self.part else ""
        return f"{self.model}{part} g={self.groups}" + (
            f" shuffle={self.shuffle}" if self.shuffle != "none" else ""
        )


CASES = (
    Case("resnet18", 4, target=0.95),
    Case("resnet50", 4, target=0.95),
    Case("wide_resnet50_2", 4, target=0.95),
    Case("vgg16_bn", 4, part="features", target=0.95),
    Case("vgg16_bn", 4),
    Case("resnet18", 8, target=0.93),
    Case("resnet50", 8, target=0.93),
    Case("resnet50", 4, shuffle="all", target=0.88),
    *(
        Case(model, groups)
        for model in (
            "densenet121",
            "regnet_y_1_6gf",
            "efficientnet_v2_s",
            "inception_v3",
            "deeplabv3_resnet50",
        )
        for groups in (2, 4)
    ),
)
QUICK_CASES = (Case("resnet18", 4, target=0.95), Case("resnet18", 4, shuffle="all"))


@dataclass(frozen=True)
class Row:
    """What was measured for one case.

    Attributes:
        latency_ms: of ``dense`` and ``grouped``: median, p10, p90, and the number of runs.
        efficiency: speed-up divided by MAC ratio.
        blocked_convs: of ``dense`` and ``grouped``: convs in the blocked kernel, and all.
        shuffles: of the net; those left are the ones that fold into no weights.
        profile_ms: of ``dense`` and ``grouped``: milliseconds by operator, where the efficiency is low.
    """

    name: str
    model: str
    groups: int
    shuffle: str
    part: str
    target: float | None
    latency_ms: Mapping[str, Mapping[str, float]]
    speed_up: float
    mac_ratio: float
    efficiency: float
    blocked_convs: Mapping[str, Mapping[str, int]]
    shuffles: int
    shuffles_left: int
    max_rel_diff: float
    profile_ms: Mapping[str, Mapping[str, float]]

    def __str__(self) -> str:
        times = " → ".join(
            f"{one['median']:.2f} ({one['p10']:.2f}–{one['p90']:.2f}) ms" for one in self.latency_ms.values()
        )
        reached = ""
        if self.target is not None:
            reached = f" of {self.target:.2f} {'reached' if self.efficiency >= self.target else 'MISSED'}"
        shuffles = f", {self.shuffles_left} of {self.shuffles} shuffles left" if self.shuffles else ""
        before, after = self.profile_ms["dense"], self.profile_ms["grouped"]
        profile = "".join(
            f"\n    {name} {before.get(name, 0):.2f} → {after[name]:.2f} ms" for name in list(after)[:6]
        )
        return (
            f"{self.name:32s} {times}: {self.speed_up:.2f}×, MACs ÷{self.mac_ratio:.2f}, "
            f"efficiency {self.efficiency:.3f}{reached}{shuffles}{profile}"
        )


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "latency", "two rows, one second each")
    parser.add_argument("--seconds", type=float, default=12.0, help="timing per row (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=3, help="runs of a row, until one is steady")
    arguments = parser.parse()
    if arguments.quick:
        arguments.seconds, arguments.attempts = 1.0, 1
    cases = {case.name: case for case in (QUICK_CASES if arguments.quick else CASES)}
    setting = {"setting": {"threads": 1, "batch_size": 1, "input_shape": list(INPUT_SHAPE)}}
    results = Results(
        Row,
        ("name",),
        arguments.json,
        setting,
        lambda row: list(cases).index(row.name),
        again=arguments.again,
    )
    for name in parser.chosen(cases, arguments.only):
        if results.known(name) is None:
            results.put(row := measure(cases[name], arguments.seconds, arguments.attempts))
            print(row, flush=True)
    results.show("latency")


def measure(case: Case, seconds: float, attempts: int) -> Row:
    """Build, export, check and time the two models of a row."""
    source = load_model(case.model, weights="none", input_shape=INPUT_SHAPE)
    dense = source.model.get_submodule(case.part) if case.part else source.model
    chosen = plan(dense, INPUT_SHAPE, groups=case.groups, rules=Rules(shuffle=case.shuffle))
    models = {"dense": dense, "grouped": restructure(dense, chosen.recipes)}
    example = torch.zeros(1, *INPUT_SHAPE)
    mac_ratio = measure_cost(dense, example).macs / measure_cost(models["grouped"], example).macs
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, model in models.items():
            settle_batch_norms(model)
            files[name] = export_onnx(model, Path(folder) / f"{name}.onnx", input_shape=INPUT_SHAPE)
        paths = {name: exported.path for name, exported in files.items()}
        parity = check_parity(models["grouped"], paths["grouped"], input_shape=INPUT_SHAPE, batch_sizes=(1,))
        timed = time_quietly(paths, seconds, attempts)
        ratio = speed_up(*timed)
        explain = ratio / mac_ratio < EXPLAIN_BELOW
        return Row(
            name=case.name,
            **asdict(case),
            latency_ms={name: in_ms(one) for name, one in zip(paths, timed, strict=True)},
            speed_up=ratio,
            mac_ratio=mac_ratio,
            efficiency=ratio / mac_ratio,
            blocked_convs={name: asdict(count_blocked_convs(path)) for name, path in paths.items()},
            shuffles=files["grouped"].shuffles,
            shuffles_left=files["grouped"].shuffles_left,
            max_rel_diff=parity.max_rel_diff,
            profile_ms={name: profile(path) if explain else {} for name, path in paths.items()},
        )


def in_ms(latency: Latency) -> dict[str, float]:
    """Median and spread in milliseconds, and the number of runs."""
    runs = len(latency.timing.runs_ms)
    return {"median": latency.median_ms, "p10": latency.p10_ms, "p90": latency.p90_ms, "runs": runs}


def profile(path: Path) -> dict[str, float]:
    """Milliseconds by operator."""
    return {one.operator: one.milliseconds for one in profile_onnx(path, input_shape=INPUT_SHAPE)}


def time_quietly(paths: dict[str, Path], seconds: float, attempts: int) -> tuple[Latency, Latency]:
    """Time the two files; where another process disturbed that, try again and keep the steadiest attempt."""
    tried: list[tuple[float, tuple[Latency, Latency]]] = []
    for _ in range(attempts):
        slow, fast = benchmark_onnx(paths, input_shape=INPUT_SHAPE, seconds=seconds)
        spread = max(slow.p90_ms / slow.p10_ms, fast.p90_ms / fast.p10_ms)
        tried.append((spread, (slow, fast)))
        if spread < STEADY:
            break
        print(f"  not steady: 90th percentile {spread:.2f} times the 10th", file=sys.stderr, flush=True)
    return min(tried, key=lambda attempt: attempt[0])[1]


def settle_batch_norms(model: nn.Module) -> None:
    """Let every batch norm take its statistics from one random batch, in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(torch.randn(4, *INPUT_SHAPE, generator=torch.Generator().manual_seed(1)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


if __name__ == "__main__":
    main()
