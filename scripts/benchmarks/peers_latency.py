"""How fast the nets of groupify and its peers are on larger images, where the arithmetic takes the time.

    python -m scripts.benchmarks.peers_latency --checkpoint FILE [--model MODEL] [--side 112]

The nets are those of scripts/benchmarks/peers.py, untrained: made from the same images of 28×28, at the same
MACs. Those are so small that their time goes into reading the weights; here they run on images of 112×112.
Since ResNet-18's stem has stride 1 in that benchmark, each layer then sees what torchvision's resnet18 sees
of 224×224. Each file is timed in ONNX Runtime side by side with the dense one. Rows go into
benchmarks/peers_latency.json one by one; what is there already is not measured again. With ``--onnx FOLDER
--no-timing`` the files are only made, to be timed by a later run on a quiet machine.
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groupify.data.batches import calibration_images
from groupify.data.splits import load_data
from groupify.machine import blocked_width, describe_machine
from groupify.models import load_model
from groupify.onnx.exporting import export_onnx
from groupify.scores.accuracy import evaluate
from groupify.scores.cost import measure_cost
from scripts.benchmarks.accuracy import IMAGES, MODEL, Setting
from scripts.benchmarks.harness import BENCHMARKS, ResultFile, check_quick
from scripts.benchmarks.peers import METHODS, file_of, make, numbers, time_against

OUTPUT = BENCHMARKS / "peers_latency.json"
SIDE = 112


@dataclass(frozen=True)
class Row:
    """One method at the MACs of one number of groups.

    ``top1`` and ``dense_top1`` are without training, in percent, of images of 28×28; the MAC ratio is that of
    images of ``side``. ``latency`` maps threads to dense and own milliseconds and their ratio.
    """

    model: str
    side: int
    method: str
    groups: int
    dense_top1: float
    top1: float
    macs_ratio: float
    params_ratio: float
    latency: dict[str, dict[str, float]]


def in_order(row: dict[str, Any]) -> tuple[str, int, int, int]:
    """By model and MACs, then as the methods are listed."""
    return row["model"], row["side"], row["groups"], list(METHODS).index(row["method"])


@dataclass(frozen=True)
class Bench:
    """What every row shares; ``threads`` empty = only make the files."""

    model: str
    setting: Setting
    test: Any
    limit: int | None
    side: int
    threads: Sequence[int]
    files: Path
    results: ResultFile

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one large image."""
        return 3, self.side, self.side

    @cached_property
    def dense_top1(self) -> float:
        """Percent of the test images."""
        return self.top1(self.setting.dense)

    def top1(self, model: nn.Module) -> float:
        """Percent of the test images."""
        return 100 * evaluate(model, self.test, limit=self.limit, batch_size=500).top1

    def export_dense(self) -> Path:
        """Export the dense net, which each of the others is timed against."""
        return export_onnx(self.setting.dense, self.files / "dense.onnx", input_shape=self.shape).path

    def measure(self, name: str, groups: int, dense: Path) -> None:
        """Make a file and a row of it, and time the file, as far as that has not been done."""
        known = self.results.rows.get((self.model, self.side, name, groups))
        row = None if known is None else Row(**known)
        if row is not None and (row.latency or not self.threads):
            return
        own = file_of(name, groups, self.files)
        if row is None or not own.exists():
            row = self._made(name, groups, own)
        if self.threads:
            row = replace(row, latency=time_against(dense, own, self.shape, self.threads))
        self.results.merge(asdict(row), order=in_order)
        print(describe(row), flush=True)

    def _made(self, name: str, groups: int, own: Path) -> Row:
        model = make(name, self.setting, groups)
        export_onnx(model, own, input_shape=self.shape)
        example = torch.zeros(1, *self.shape)
        before, after = measure_cost(self.setting.dense, example), measure_cost(model, example)
        return Row(
            self.model,
            self.side,
            name,
            groups,
            self.dense_top1,
            self.top1(model),
            before.macs / after.macs,
            before.params / after.params,
            {},
        )


def describe(row: Row) -> str:
    """One line on a row."""
    times = "".join(
        f"  {count} thread{'s' if count != '1' else ''} {one['dense_ms']:.2f} → {one['ms']:.2f} ms"
        f" {one['speed_up']:.2f}×"
        for count, one in row.latency.items()
    )
    return (
        f"{row.method:34s} g={row.groups} {row.side}×{row.side} top-1 {row.top1:6.2f}"
        f"  MACs ÷{row.macs_ratio:.2f}  params ÷{row.params_ratio:.2f}{times}"
    )


def main() -> None:
    """Parse, measure, merge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="default: %(default)s")
    parser.add_argument("--checkpoint", type=Path, required=True, help="dense weights, from train_dense.py")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--side", type=int, default=SIDE, help="of the images (default: %(default)s)")
    parser.add_argument("--groups", default="2,4,8", help="whose MACs to meet (default: %(default)s)")
    parser.add_argument("--threads", default="1,2", help="default: %(default)s")
    parser.add_argument("--methods", default="*", metavar="GLOB")
    parser.add_argument("--onnx", type=Path, metavar="FOLDER", help="keep the exported files there")
    parser.add_argument("--no-timing", action="store_true", help="make the files, time them later")
    parser.add_argument("--json", type=Path, default=OUTPUT)
    parser.add_argument("--quick", action="store_true", help="300 images, 4 groups, 1000 test images")
    arguments = parser.parse_args()
    check_quick(parser, arguments, OUTPUT)
    if arguments.no_timing and arguments.onnx is None:
        parser.error("--no-timing needs --onnx FOLDER, where a later run finds the files")
    torch.manual_seed(0)
    count, limit = (300, 1000) if arguments.quick else (IMAGES, None)
    source = load_model(arguments.model, checkpoint=arguments.checkpoint)
    data = load_data(arguments.data, source.spec)
    assert data.train is not None
    setting = Setting(source.model, calibration_images(data.train, count, seed=0), 0, blocked_width())
    results = ResultFile(
        arguments.json, {"calibration_images": count}, keys=("model", "side", "method", "groups")
    )
    threads = [] if arguments.no_timing else numbers(arguments.threads, int)
    print(describe_machine())
    with ExitStack() as stack:
        files = arguments.onnx
        if files is None:
            files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="groupify-")))
        files.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments.model, setting, data.test, limit, arguments.side, threads, files, results)
        dense = bench.export_dense()
        for groups in [4] if arguments.quick else numbers(arguments.groups, int):
            for name in METHODS:
                if fnmatch.fnmatchcase(name, arguments.methods):
                    bench.measure(name, groups, dense)


if __name__ == "__main__":
    main()
