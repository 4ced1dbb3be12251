"""Latency in ONNX Runtime, dense against grouped, one thread, batch 1, 3×224×224.

For every row the dense and the grouped model are exported, checked against PyTorch, and timed interleaved in
one run. Weights are random (latency does not depend on them); batch norms see one random batch first, so that
activations neither vanish nor blow up. Group widths are clamped to the blocked kernel of this CPU.

Efficiency is the speed-up divided by the MAC ratio: 1 means that every multiply-accumulate that was saved
saved its time. Rows below 0.8 are explained by a profile of both sessions.

    python -m scripts.benchmarks.latency                     # everything: about 10 minutes
    python -m scripts.benchmarks.latency --quick             # two rows, a minute
    python -m scripts.benchmarks.latency --only 'resnet50*' --json benchmarks/latency.json
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from groupify.conversion.surgery import restructure
from groupify.machine import describe_machine
from groupify.measure.benchmarks import Latency, benchmark_onnx, speed_up
from groupify.measure.profiling import OperatorTime, profile_onnx
from groupify.models import load_model
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from groupify.onnx.runtime import BlockedConvs, count_blocked_convs
from groupify.planning.rules import Rules
from groupify.planning.uniform import plan
from groupify.scores.cost import measure_cost
from scripts.benchmarks.harness import write_results

INPUT_SHAPE = (3, 224, 224)
EXPLAIN_BELOW = 0.8
STEADY = 1.1  # 90th over 10th percentile of a run that nothing disturbed


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured for one case."""

    case: Case
    mac_ratio: float
    dense: Latency
    grouped: Latency
    speed_up: float
    blocked_dense: BlockedConvs
    blocked_grouped: BlockedConvs
    shuffles: int
    shuffles_left: int
    max_rel_diff: float
    profile_dense: tuple[OperatorTime, ...] = ()
    profile_grouped: tuple[OperatorTime, ...] = ()

    @property
    def efficiency(self) -> float:
        """Speed-up divided by MAC ratio."""
        return self.speed_up / self.mac_ratio


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two rows, one second each")
    parser.add_argument(
        "--only", metavar="PATTERN", default="*", help="rows by name, for example 'resnet50*'"
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="timing per row (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=3, help="runs of a row, until one is steady")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there as well")
    arguments = parser.parse_args()
    cases = [
        case
        for case in (QUICK_CASES if arguments.quick else CASES)
        if fnmatch.fnmatch(case.name, arguments.only)
    ]
    if not cases:
        parser.error(
            f"no row is called {arguments.only!r}: there are {', '.join(case.name for case in CASES)}"
        )
    rows = []
    for case in cases:
        print(case.name, file=sys.stderr, flush=True)
        seconds, attempts = (1.0, 1) if arguments.quick else (arguments.seconds, arguments.attempts)
        rows.append(measure(case, seconds, attempts))
    print_table(rows)
    if arguments.json is not None:
        write_results(arguments.json, as_json(rows))


def measure(case: Case, seconds: float, attempts: int) -> Row:
    """Build, export, check and time the two models of a row."""
    source = load_model(case.model, weights="none", input_shape=INPUT_SHAPE)
    dense = source.model.get_submodule(case.part) if case.part else source.model
    chosen = plan(dense, INPUT_SHAPE, groups=case.groups, rules=Rules(shuffle=case.shuffle))
    grouped = restructure(dense, chosen.recipes)
    example = torch.zeros(1, *INPUT_SHAPE)
    mac_ratio = measure_cost(dense, example).macs / measure_cost(grouped, example).macs
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, model in (("dense", dense), ("grouped", grouped)):
            settle_batch_norms(model)
            files[name] = export_onnx(model, Path(folder) / f"{name}.onnx", input_shape=INPUT_SHAPE)
        parity = check_parity(grouped, files["grouped"].path, input_shape=INPUT_SHAPE, batch_sizes=(1,))
        paths = {name: exported.path for name, exported in files.items()}
        slow, fast = time_quietly(paths, seconds, attempts)
        ratio = speed_up(slow, fast)
        explain = ratio / mac_ratio < EXPLAIN_BELOW
        return Row(
            case,
            mac_ratio,
            slow,
            fast,
            ratio,
            count_blocked_convs(paths["dense"]),
            count_blocked_convs(paths["grouped"]),
            files["grouped"].shuffles,
            files["grouped"].shuffles_left,
            parity.max_rel_diff,
            profile_onnx(paths["dense"], input_shape=INPUT_SHAPE) if explain else (),
            profile_onnx(paths["grouped"], input_shape=INPUT_SHAPE) if explain else (),
        )


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


def print_table(rows: list[Row]) -> None:
    """Print machine, table and explanations."""
    console = Console(width=160)
    console.print(str(describe_machine()))
    table = Table(title="ONNX Runtime, 1 thread, batch 1, 3×224×224")
    for heading in (
        "model",
        "dense ms (10–90%)",
        "grouped ms (10–90%)",
        "speed-up",
        "MAC ratio",
        "efficiency",
        "target",
        "blocked convs",
        "shuffles left",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        reached = row.case.target is not None and row.efficiency >= row.case.target
        target = (
            "" if row.case.target is None else f"{row.case.target:.2f} {'reached' if reached else 'MISSED'}"
        )
        table.add_row(
            row.case.name,
            latency(row.dense),
            latency(row.grouped),
            f"{row.speed_up:.2f}×",
            f"{row.mac_ratio:.2f}×",
            f"{row.efficiency:.3f}",
            target,
            f"{row.blocked_grouped.blocked}/{row.blocked_grouped.total}",
            f"{row.shuffles_left}/{row.shuffles}" if row.shuffles else "",
        )
    console.print(table)
    for row in rows:
        if row.profile_dense:
            console.print(f"{row.case.name}: {explanation(row)}")


def latency(row: Latency) -> str:
    """Return median and spread."""
    return f"{row.median_ms:.2f} ({row.p10_ms:.2f}–{row.p90_ms:.2f})"


def explanation(row: Row) -> str:
    """Say where the grouped session's time goes next to the dense one's."""
    before = {entry.operator: entry for entry in row.profile_dense}
    parts = []
    for entry in row.profile_grouped[:6]:
        dense = before.get(entry.operator)
        parts.append(
            f"{entry.operator} {dense.milliseconds if dense else 0:.2f} → {entry.milliseconds:.2f} ms"
            f" ({entry.nodes} nodes)"
        )
    return ", ".join(parts)


def as_json(rows: list[Row]) -> dict[str, Any]:
    """Return the whole result, without the single runs."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "setting": {"threads": 1, "batch_size": 1, "input_shape": list(INPUT_SHAPE)},
        "rows": [
            {
                "name": row.case.name,
                **dataclasses.asdict(row.case),
                "latency_ms": {
                    name: {
                        "median": timed.median_ms,
                        "p10": timed.p10_ms,
                        "p90": timed.p90_ms,
                        "runs": len(timed.timing.runs_ms),
                    }
                    for name, timed in (("dense", row.dense), ("grouped", row.grouped))
                },
                "speed_up": row.speed_up,
                "mac_ratio": row.mac_ratio,
                "efficiency": row.efficiency,
                "blocked_convs": {
                    "dense": dataclasses.asdict(row.blocked_dense),
                    "grouped": dataclasses.asdict(row.blocked_grouped),
                },
                "shuffles": row.shuffles,
                "shuffles_left": row.shuffles_left,
                "max_rel_diff": row.max_rel_diff,
                "profile_ms": {
                    name: {entry.operator: entry.milliseconds for entry in profile}
                    for name, profile in (("dense", row.profile_dense), ("grouped", row.profile_grouped))
                },
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    main()
