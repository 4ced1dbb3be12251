"""CPU time of planning and converting, of this checkout against another one: one thread, in turns.

Three models: the demo with 1,000 of its images; ResNet-50 and DenseNet-121 with random weights and 48 images
of noise, 112×112. Each gets 4 groups, and each run is a process of its own; CPU time varies less than the
duration does where other processes run beside it.

    git worktree add --detach ../before COMMIT
    python -m scripts.benchmarks.conversion_speed ../before
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

GROUPS, SIZE = 4, 112
IMAGES = {"demo": 1000, "resnet50": 48, "densenet121": 48}
HERE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Times:
    """CPU seconds of one run.

    Attributes:
        plan: of ``groupify.plan``.
        convert: of ``groupify.convert``.
        steps: duration of the steps of the conversion.
    """

    plan: float
    convert: float
    steps: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Of both."""
        return self.plan + self.convert

    def __str__(self) -> str:
        return f"{self.plan:.1f} + {self.convert:.1f} = {self.total:.1f} s"


def main() -> None:
    """Run both checkouts in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="folder of the other checkout")
    parser.add_argument("--models", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--measure", choices=IMAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(asdict(measure(options.measure))))
        return
    if options.before is None:
        parser.error("give the folder of the other checkout")
    for model in options.models:
        pairs = [(run_fresh(model, options.before), run_fresh(model, HERE)) for _ in range(options.rounds)]
        for before, now in pairs:
            print(f"{model}: {before} → {now}, ×{now.total / before.total:.2f}", flush=True)
        ratio = statistics.median(now.total / before.total for before, now in pairs)
        print(f"{model}: ×{ratio:.2f}, the median of {options.rounds}", flush=True)


def run_fresh(model: str, checkout: Path) -> Times:
    """Measure a checkout in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", model]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Times(**json.loads(finished.stdout.splitlines()[-1]))


def measure(name: str) -> Times:
    """Plan and convert one model with the checkout that Python finds."""
    import groupify  # of either checkout

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, images = model_and_images(name)
    started = time.process_time()
    plan = groupify.plan(model, tuple(images.shape[1:]), groups=GROUPS)
    planned = time.process_time()
    conversion = groupify.convert(model, plan, images)
    return Times(planned - started, time.process_time() - planned, dict(conversion.seconds))


def model_and_images(name: str) -> tuple[nn.Module, Tensor]:
    """Return what is converted, and the images for it."""
    import groupify

    if name == "demo":
        source = groupify.load_model(name)
        data = groupify.load_data(name, source.spec)
        return source.model, groupify.calibration_images(data.for_calibration, IMAGES[name], seed=0)
    images = torch.randn(IMAGES[name], 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return groupify.load_model(name, weights="none").model, images


if __name__ == "__main__":
    main()
