"""Time and memory of a conversion: ResNet-50 at 224×224, 256 calibration images, 4 groups.

The conversion, clustering included, is compared with one forward pass of the dense model over the
same images in the same process, timed just before and just after; peak memory is that of a fresh
process that does nothing else.

    python -m scripts.benchmarks.conversion
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupify.conversion.by_part import refresh_batch_norms
from groupify.conversion.conversion import Calibration, convert
from groupify.models.sources import load_model
from groupify.planning.rules import Rules
from groupify.planning.uniform import plan
from scripts.benchmarks.harness import Parser, Results

GROUPS = 4
MIN_GROUP_WIDTH = 16


@dataclass(frozen=True)
class Round:
    """One conversion in a fresh process: durations in seconds, memory in bytes.

    ``ratio`` is that of the conversion to one dense forward pass over the same images.
    """

    ratio: float
    conversion_seconds: float
    forward_seconds: Sequence[float]
    breakdown_seconds: Mapping[str, float]
    peak_memory_bytes: int
    sites: int
    kept_before: float | None
    kept: float | None
    mean_fitted_error: float
    number: int = 0

    def __str__(self) -> str:
        return (
            f"conversion ÷ dense forward pass {self.ratio:.2f}, {self.conversion_seconds:.1f} s, "
            f"peak resident memory {self.peak_memory_bytes / 2**30:.2f} GiB"
        )


def main() -> None:
    """Measure in fresh processes."""
    parser = Parser(__doc__, "conversion", "one round of ResNet-18, 32 images at 64×64")
    parser.add_argument("--model", default="resnet50", help="torchvision name (default: %(default)s)")
    parser.add_argument("--images", type=int, default=256, help="calibration images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes (default: %(default)s)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse()
    if options.quick:
        options.model, options.images, options.size, options.rounds = "resnet18", 32, 64, 1
    if options.measure:
        print(json.dumps(asdict(measure(options.model, options.images, options.size))))
        return
    setting = {
        "threads": torch.get_num_threads(),
        "model": options.model,
        "images": options.images,
        "size": options.size,
        "groups": GROUPS,
        "min_group_width": MIN_GROUP_WIDTH,
    }
    results = Results(Round, ("number",), options.json, setting, under="rounds", again=options.again)
    for number in range(options.rounds):
        if results.known(number) is None:
            results.put(measured := replace(run_fresh(options), number=number))
            print(measured, flush=True)
    results.show("conversion")


def run_fresh(options: argparse.Namespace) -> Round:
    """Measure in a process of its own."""
    command = [
        sys.executable, "-m", "scripts.benchmarks.conversion", "--measure", "--model", options.model,
        "--images", str(options.images), "--size", str(options.size),
    ]  # fmt: skip
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Round(**json.loads(finished.stdout.splitlines()[-1]))


def measure(name: str, count: int, size: int) -> Round:
    """Convert one model."""
    images = structured_noise(count, size, seed=0)
    model = load_model(name, weights="none").model
    # Random weights with untouched batch norms would let activations grow from block to block.
    refresh_batch_norms(model, images[:64].split(16))
    layers = plan(model, (3, size, size), groups=GROUPS, rules=Rules(min_group_width=MIN_GROUP_WIDTH))
    batch_size = Calibration(images).batch_size
    before = forward_seconds(model, images, batch_size)
    start = time.perf_counter()
    conversion = convert(model, layers, images)
    seconds = time.perf_counter() - start
    after = forward_seconds(model, images, batch_size)
    return Round(
        ratio=2 * seconds / (before + after),
        conversion_seconds=seconds,
        forward_seconds=[before, after],
        breakdown_seconds=dict(conversion.seconds),
        peak_memory_bytes=peak_memory_bytes(),
        sites=len(conversion.sites),
        kept_before=conversion.kept_before,
        kept=conversion.kept,
        mean_fitted_error=sum(fit.error for fit in conversion.fits) / len(conversion.fits),
    )


@torch.no_grad()
def forward_seconds(model: nn.Module, images: Tensor, batch_size: int) -> float:
    """Time one pass over all images, in the memory format that oneDNN is fastest with."""
    model.to(memory_format=torch.channels_last)
    batches = [b.contiguous(memory_format=torch.channels_last) for b in images.split(batch_size)]
    model(batches[0])
    start = time.perf_counter()
    for batch in batches:
        model(batch)
    return time.perf_counter() - start


def structured_noise(count: int, size: int, *, seed: int) -> Tensor:
    """Return noise with the falling spectrum of photographs, shape (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, size, size)
    scale = 4
    while scale <= size:
        noise = torch.randn(count, 3, scale, scale, generator=generator)
        images += F.interpolate(noise, size=(size, size), mode="bilinear") * (4 / scale) ** 0.5
        scale *= 2
    return images / images.std()


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process."""
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        import resource  # not on Windows

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


if __name__ == "__main__":
    main()
