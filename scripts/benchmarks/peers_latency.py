"""How fast the nets of groupify and its peers are on larger images, where the arithmetic takes the time.

    python -m scripts.benchmarks.peers_latency --checkpoint FILE [--model MODEL] [--side 112]

The nets are those of peers.py, untrained: made from the same images of 28×28, at the same MACs. Those are so
small that their time goes into reading the weights; here they run on images of 112×112. Since ResNet-18's
stem has stride 1 in that benchmark, each layer then sees what torchvision's resnet18 sees of 224×224. Each
file is timed in ONNX Runtime side by side with the dense one.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from groupify.planning.rules import AUTO
from scripts.benchmarks.contest import MODEL, Net
from scripts.benchmarks.harness import Latencies, Parser, Results, Timing, describe_latency
from scripts.benchmarks.methods import PEERS, make
from scripts.benchmarks.peers import add_timing, folder

KEYS = ("model", "side", "method", "groups")
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
    latency: Latencies

    @property
    def name(self) -> str:
        """What ``--only`` selects."""
        return f"{self.method} g={self.groups}"

    def __str__(self) -> str:
        return (
            f"{self.name:40s} {self.side}×{self.side} top-1 {self.top1:6.2f}  MACs ÷{self.macs_ratio:.2f}"
            f"  params ÷{self.params_ratio:.2f}{describe_latency(self.latency)}"
        )


def order(row: Row) -> tuple[str, int, int, int]:
    """By model and MACs, then as the methods are listed."""
    return row.model, row.side, row.groups, list(PEERS).index(row.method)


@dataclass(frozen=True)
class Bench:
    """Measures the rows of one net."""

    model: str
    net: Net
    timing: Timing
    results: Results[Row]

    def measure(self, name: str, groups: int) -> None:
        """Make a file and a row of it, and time the file, as far as that has not been done."""
        side, setting = self.timing.shape[-1], self.net.settings[0]
        row = self.results.known(self.model, side, name, groups)
        if row is not None and (row.latency or not self.timing.threads):
            return
        made = functools.cache(lambda: make(PEERS[name], setting, groups))
        if row is None:
            ratios, top1 = self.net.ratios(made(), self.timing.shape), self.net.top1(made())
            row = Row(self.model, side, name, groups, self.net.dense_top1, top1, *ratios, latency={})
        own = self.timing.file(name, groups, made)
        row = replace(row, latency=self.timing.against_dense(own))
        self.results.put(row)
        print(row, flush=True)


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "peers_latency", "300 images, 4 groups, 1000 test images")
    parser.add_net(MODEL)
    parser.add_argument("--side", type=int, default=SIDE, help="of the images (default: %(default)s)")
    parser.add_numbers("--groups", "2,4,8", "whose MACs to meet")
    add_timing(parser)
    arguments = parser.parse()
    torch.manual_seed(0)
    net = Net.load(arguments, 1, AUTO)
    shared = {"calibration_images": net.images}
    results = Results(Row, KEYS, arguments.json, shared, order, again=arguments.again)
    names = [(name, groups) for groups in ([4] if arguments.quick else arguments.groups) for name in PEERS]
    chosen = parser.chosen([f"{name} g={groups}" for name, groups in names], arguments.only)
    with ExitStack() as stack:
        shape = (3, arguments.side, arguments.side)
        timing = Timing(net.dense, shape, arguments.threads, folder(arguments.onnx, stack))
        bench = Bench(arguments.model, net, timing, results)
        for name, groups in names:
            if f"{name} g={groups}" in chosen:
                bench.measure(name, groups)
    results.show("peers_latency")


if __name__ == "__main__":
    main()
