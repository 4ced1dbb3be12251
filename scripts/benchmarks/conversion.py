"""Time and memory of a conversion: ResNet-50 at 224×224, 256 calibration images, 4 groups.

The conversion, clustering included, is compared with one forward pass of the dense model over the
same images in the same process, timed just before and just after; peak memory is that of a fresh
process that does nothing else.

    python -m scripts.benchmarks.conversion --json benchmarks/conversion.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupify.conversion.by_part import refresh_batch_norms
from groupify.conversion.conversion import Calibration, convert
from groupify.machine import describe_machine
from groupify.models import load_model
from groupify.planning.rules import Rules
from groupify.planning.uniform import plan
from scripts.benchmarks.harness import write_results

GROUPS = 4
MIN_GROUP_WIDTH = 16
GIBIBYTE = 2**30


def main() -> None:
    """Measure in fresh processes, print a table, store it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="torchvision name (default: %(default)s)")
    parser.add_argument("--images", type=int, default=256, help="calibration images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of ResNet-18, 32 images at 64×64")
    parser.add_argument("--json", type=Path, help="store the results in this file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.model, options.images, options.size, options.rounds = "resnet18", 32, 64, 1
    if options.measure:
        print(json.dumps(measure(options.model, options.images, options.size)))
        return
    rounds = [run_fresh(options) for _ in range(options.rounds)]
    result = {
        "threads": torch.get_num_threads(),
        "model": options.model,
        "images": options.images,
        "size": options.size,
        "groups": GROUPS,
        "min_group_width": MIN_GROUP_WIDTH,
        "rounds": sorted(rounds, key=lambda entry: entry["ratio"]),
    }
    print(table(result))
    if options.json:
        write_results(options.json, result)


def run_fresh(options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [
        sys.executable, "-m", "scripts.benchmarks.conversion", "--measure", "--model", options.model,
        "--images", str(options.images), "--size", str(options.size),
    ]  # fmt: skip
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def measure(name: str, count: int, size: int) -> dict[str, Any]:
    """Convert one model; durations in seconds, memory in bytes."""
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
    forward = (before + after) / 2
    return {
        "ratio": seconds / forward,
        "conversion_seconds": seconds,
        "forward_seconds": [before, after],
        "breakdown_seconds": dict(conversion.seconds),
        "peak_memory_bytes": peak_memory_bytes(),
        "sites": len(conversion.sites),
        "kept_before": conversion.kept_before,
        "kept": conversion.kept,
        "mean_fitted_error": sum(fit.error for fit in conversion.fits) / len(conversion.fits),
    }


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
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


def table(result: dict[str, Any]) -> str:
    """Format the median round and the range over the rounds."""
    rounds: Sequence[dict[str, Any]] = result["rounds"]
    middle = rounds[len(rounds) // 2]
    ratios = [entry["ratio"] for entry in rounds]
    peak = max(entry["peak_memory_bytes"] for entry in rounds)
    lines = [
        f"{result['model']}, {result['images']} images of {result['size']}×{result['size']}, "
        f"{result['groups']} groups, {middle['sites']} convs converted; {result['threads']} threads",
        str(describe_machine()),
        "",
        f"conversion ÷ dense forward pass   {middle['ratio']:.2f}  ({min(ratios):.2f} to {max(ratios):.2f})",
        f"peak resident memory              {peak / GIBIBYTE:.2f} GiB",
        "",
        "                          seconds   × forward",
    ]
    forward = sum(middle["forward_seconds"]) / 2
    rows = {
        "dense forward pass": forward,
        "conversion": middle["conversion_seconds"],
        **{f"  {name}": seconds for name, seconds in middle["breakdown_seconds"].items()},
    }
    lines += [f"{name:24s} {seconds:8.2f} {seconds / forward:11.2f}" for name, seconds in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
