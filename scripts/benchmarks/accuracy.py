"""Accuracy of a converted ResNet-18 on Fashion-MNIST without any training, part by part.

    python -m scripts.benchmarks.accuracy --checkpoint FILE [--only '*clustering*'] [--quick]

The dense net is ``groupify.models.demo:fashion_resnet18`` (stride-1 stem, 28×28), from a checkpoint of
scripts/train_dense.py. All 3×3 convs but the first are converted; 1,000 unlabelled training images;
accuracy on all 10,000 test images; mean and spread (largest minus smallest) over the seeds.
"""

from __future__ import annotations

from dataclasses import replace

from groupify.conversion.site_fit import FitOptions
from scripts.benchmarks.contest import KEYS, MODEL, QUICK, Contest, Contestant, Net, Row
from scripts.benchmarks.harness import Parser, Results
from scripts.benchmarks.methods import (
    PLAIN,
    STEPS,
    default,
    fitted,
    grouped_pointwise,
    groupify_default,
    norm_refresh,
    random_grouping,
    torch_pruning,
    truncation,
    truncation_refresh,
    weights_only,
)

REFRESH = replace(PLAIN, refresh_batch_norm=True)
COMPENSATE = replace(REFRESH, compensate_residual=True)
RELU = replace(COMPENSATE, relu_iterations=FitOptions().relu_iterations)
REFIT = replace(RELU, refit_dense=True)
BIAS = replace(PLAIN, ridge=1e6, keep_prior=True)  # the ridge leaves nothing of the fit but the bias
CONTESTANTS = {
    "truncation": Contestant(truncation, seeded=False),
    "weights only (--calibrate none)": Contestant(weights_only, seeded=False),
    "truncation + bias": Contestant(fitted(BIAS)),
    "truncation + refresh": Contestant(truncation_refresh),
    "truncation + clustering by norm + refresh": Contestant(norm_refresh),
    "least squares, not in order": Contestant(fitted(replace(PLAIN, in_order=False))),
    "least squares, in order": Contestant(fitted(PLAIN)),
    "  + refresh": Contestant(fitted(REFRESH)),
    "  + residual compensation": Contestant(fitted(COMPENSATE)),
    "  + ReLU-aware targets": Contestant(fitted(RELU)),
    "  + refit of the dense layers": Contestant(fitted(REFIT)),
    "  + clustering by norm": Contestant(fitted(REFIT, "norm")),
    "groupify (clustering by data)": Contestant(groupify_default),
    "groupify on a random grouping": Contestant(random_grouping),
    "groupify, shuffle all": Contestant(default("all")),
    "groupify, grouped-pointwise, equal MACs": Contestant(grouped_pointwise),
    "Torch-Pruning + refresh, equal MACs": Contestant(torch_pruning),
    "groupify, reconstruction": Contestant(default(steps=STEPS)),
    "groupify, shuffle all, reconstruction": Contestant(default("all", STEPS)),
}


def order(row: Row) -> tuple[int, int]:
    """As the methods are listed."""
    return list(CONTESTANTS).index(row.method), row.groups


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "accuracy", QUICK)
    parser.add_net(MODEL)
    parser.add_numbers("--groups", "2,4,8", "whose MACs to meet")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse()
    net = Net.load(arguments, arguments.seeds)
    results = Results(Row, KEYS, arguments.json, net.shared, order, again=arguments.again)
    contest = Contest(net, results, CONTESTANTS)
    contest.run([4] if arguments.quick else arguments.groups, only=arguments.only)
    results.show("accuracy")


if __name__ == "__main__":
    main()
