"""groupify against its peers: the same dense net, images, MACs and training; accuracy, size and latency.

    python -m scripts.benchmarks.peers --checkpoint FILE --twin FILE [--epochs 0,0.1,1] [--quick]
    python -m scripts.benchmarks.peers --model groupify.models.demo:fashion_vgg11_bn \\
        --checkpoint vgg11.safetensors --json benchmarks/peers_vgg11.json

The setting is that of accuracy.py, with groups no narrower than this CPU's kernel wants. Every method gets
the same 1,000 unlabelled images and is brought as near as it can be to the MACs of the net with 2, 4 or 8
groups (about 1.9×, 3.7× and 6.9× fewer). Training is ``groupify.finetune`` with distillation, for all alike
but for the learning rate, which is the best of --learning-rates for each at the MACs of 4 groups (see
training.py); another --model takes the rates of benchmarks/peers.json. Each file is timed in ONNX Runtime
side by side with the dense one.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from groupify.planning.rules import AUTO
from scripts.benchmarks.contest import (
    KEYS,
    MODEL,
    QUICK,
    Contest,
    Contestant,
    Net,
    Row,
    order_of,
    training_setting,
)
from scripts.benchmarks.harness import Parser, Results, Timing
from scripts.benchmarks.methods import PEERS
from scripts.benchmarks.training import Trainer, add_training

RATE_GROUPS = 4  # whose MACs the learning rates are chosen at


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "peers", QUICK)
    parser.add_net(MODEL)
    add_training(parser)
    parser.add_numbers("--groups", "2,4,8", "whose MACs to meet")
    parser.add_numbers("--epochs", "0,0.1,1", "of training", float)
    parser.add_argument("--seeds", type=int, default=1)
    add_timing(parser)
    arguments = parser.parse()
    if arguments.model != MODEL and arguments.json == parser.kept:
        parser.error("another --model needs a --json of its own")
    torch.manual_seed(0)
    net = Net.load(arguments, arguments.seeds, AUTO)
    shared = {**net.shared, "training": training_setting("amp")}
    results = Results(Row, KEYS, arguments.json, shared, order_of(PEERS), again=arguments.again)
    if arguments.model != MODEL:
        take_rates(results, json.loads(parser.kept.read_text("utf-8")))
    trainer = Trainer.load(arguments, net.dense, net.data, results, net.images)
    contestants = {name: Contestant(method) for name, method in PEERS.items()}
    with ExitStack() as stack:
        timing = Timing(net.dense, net.settings[0].shape, arguments.threads, folder(arguments.onnx, stack))
        contest = Contest(net, results, contestants, trainer, timing, RATE_GROUPS)
        contest.run([RATE_GROUPS] if arguments.quick else arguments.groups, arguments.epochs, arguments.only)
    results.show("peers")


def add_timing(parser: Parser) -> None:
    """Add the options of the timing."""
    parser.add_numbers("--threads", "1,2", "of the timing, '' = make the files, to be timed later")
    parser.add_argument(
        "--onnx", type=Path, metavar="FOLDER", help="keep the files there, and time those that are there: "
        "what one run makes, a later one on a quiet machine times",
    )  # fmt: skip


def folder(given: Path | None, stack: ExitStack) -> Path:
    """Return the folder for files, a temporary one where none is given."""
    return given or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="groupify-")))


def take_rates(results: Results[Row], others: dict[str, Any]) -> None:
    """Put in the losses that the learning rates of another net's rows were chosen by."""
    with results.changing() as document:
        document["learning_rates"] = {**others["learning_rates"], **document.get("learning_rates", {})}


if __name__ == "__main__":
    main()
