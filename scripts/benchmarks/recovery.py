"""Accuracy after a little training: converted ResNet-18 on Fashion-MNIST against its rivals.

    python -m scripts.benchmarks.recovery --checkpoint FILE --twin FILE [--only GLOB] [--seeds N]

Setting and dense net are those of accuracy.py. Every method gets the same images (54,000 to train on, 6,000
held out to choose the best weights), the same budget and the same distillation from the dense net; its
learning rate is the best of --learning-rates for it (see training.py), so that no rival has to make do with
groupify's. Accuracy is measured on all 10,000 test images, in float32. Several runs may share the rows by
--only.
"""

from __future__ import annotations

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
from scripts.benchmarks.harness import Parser, Results
from scripts.benchmarks.methods import (
    from_random,
    grouped_pointwise,
    groupify_default,
    torch_pruning,
    truncation,
)
from scripts.benchmarks.training import Trainer, add_training

CONTESTANTS = {
    "groupify": Contestant(groupify_default),
    "groupify, gradual": Contestant(groupify_default, tuned_as="groupify", gradual=True),
    "groupify, no labels": Contestant(groupify_default, tuned_as="groupify", labels=False),
    "groupify, grouped-pointwise": Contestant(grouped_pointwise, tuned_as="groupify"),
    "Torch-Pruning, equal MACs": Contestant(torch_pruning),
    "truncation": Contestant(truncation),
    "random weights": Contestant(from_random),
}


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "recovery", QUICK)
    parser.add_net(MODEL)
    add_training(parser)
    parser.add_numbers("--groups", "4,8", "whose MACs to meet")
    parser.add_numbers("--epochs", "0,0.1,1", "of training", float)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse()
    net = Net.load(arguments, arguments.seeds)
    shared = {**net.shared, "training": training_setting("labels")}
    results = Results(Row, KEYS, arguments.json, shared, order_of(CONTESTANTS), again=arguments.again)
    trainer = Trainer.load(arguments, net.dense, net.data, results, net.images)
    contest = Contest(net, results, CONTESTANTS, trainer)
    contest.run([4] if arguments.quick else arguments.groups, arguments.epochs, arguments.only)
    results.show("recovery")


if __name__ == "__main__":
    main()
