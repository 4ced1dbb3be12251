"""CPU time of planning for a budget and of converting, in dense forward passes; peak memory of both.

Random weights and smooth random images; by default ResNet-50, 256 images of 224×224, a quarter of the MACs.
A dense forward pass is one over all images in batches of 32, measured in the same process with the same
threads; CPU time varies less than the duration does where other processes run beside it.

    python -m scripts.benchmarks.planning_speed

Planning and converting are processes of their own, so that each has its own peak memory.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import groupify
from groupify.planning.plan_file import PlanFile
from groupify.planning.search import Images, SearchOptions, plan_for_budget
from scripts.benchmarks.conversion import peak_memory_bytes

BATCH = 32
QUICK = ("squeezenet1_1", 8, 64, "macs=95%", "features.7.expand3x3")


def main() -> None:
    """Plan, then convert, each in a process of its own."""
    options = parsed()
    if options.part:
        warnings.simplefilter("ignore")
        (plan if options.part == "plan" else convert)(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = options.plan or Path(folder, "plan.json")
        names = ("model", "images", "size", "budget", "include", "profile")
        given = [f"--{name}={getattr(options, name)}" for name in names]
        for part in ("convert",) if file.exists() else ("plan", "convert"):
            command = [sys.executable, "-m", "scripts.benchmarks.planning_speed", *given]
            subprocess.run([*command, f"--plan={file}", f"--part={part}"], check=True)


def parsed() -> argparse.Namespace:
    """Return the options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="resnet50", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--budget", default="macs=25%", help="default: a quarter of the MACs")
    parser.add_argument("--include", default="", metavar="GLOB", help="convs to replace (default: all)")
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="the plan; if it is there, only convert by it"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one conv of a small model; proves that it works"
    )
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="also the N dearest functions")
    parser.add_argument("--part", choices=("plan", "convert"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.model, options.images, options.size, options.budget, options.include = QUICK
    return options


def plan(options: argparse.Namespace) -> None:
    """Plan for the budget and write the plan."""
    model, images = model_and_images(options)
    forward = dense_forward(model, images)
    rules = groupify.Rules(cpu="avx512", include=(options.include,) if options.include else ())
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    found = plan_for_budget(
        model, tuple(images.shape[1:]), options.budget, Images(images, images[:1]),
        rules=rules, options=SearchOptions(verify=False),
    )  # fmt: skip
    profile.disable()
    PlanFile.of(options.model, found.plan).write(options.plan)
    seconds = functions(profile)
    tell("dense forward", forward, forward)
    tell("ladder", seconds["ladders"], forward)
    tell("planning", seconds["plan_for_budget"], forward)
    print(f"peak memory, planning: {peak_memory_bytes() / 2**30:.2f} GiB", flush=True)
    show(profile, options.profile)


def convert(options: argparse.Namespace) -> None:
    """Convert by the plan."""
    model, images = model_and_images(options)
    made = PlanFile.read(options.plan).apply(model, tuple(images.shape[1:]))
    forward = dense_forward(model, images)
    profile = cProfile.Profile(time.process_time)
    if options.profile:
        profile.enable()
    started = time.process_time()
    conversion = groupify.convert(model, made, images)
    seconds = time.process_time() - started
    profile.disable()
    tell("dense forward", forward, forward)
    tell("conversion", seconds, forward)
    print(f"peak memory, conversion: {peak_memory_bytes() / 2**30:.2f} GiB", flush=True)
    errors = [fit.error for fit in conversion.fits]
    print(f"mean relative error of {len(errors)} fits: {sum(errors) / len(errors):.4f}", flush=True)
    if options.profile:
        print({name: round(time, 1) for name, time in conversion.seconds.items()}, flush=True)
        show(profile, options.profile)


def model_and_images(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Return the model with random weights, and smooth random images."""
    torch.manual_seed(0)
    model = groupify.load_model(options.model, weights="none").model.eval()
    coarse = torch.randn(options.images, 3, options.size // 16, options.size // 16)
    return model, nn.functional.interpolate(coarse, size=options.size, mode="bicubic")


def dense_forward(model: nn.Module, images: Tensor) -> float:
    """CPU seconds of one pass over all images."""
    with torch.inference_mode():
        model(images[:BATCH])
        started = time.process_time()
        for batch in images.split(BATCH):
            model(batch)
    return time.process_time() - started


def functions(profile: cProfile.Profile) -> dict[str, float]:
    """CPU seconds of each function with all that it calls, by its name."""
    found = pstats.Stats(profile).get_stats_profile().func_profiles
    return {name: function.cumtime for name, function in found.items()}


def show(profile: cProfile.Profile, count: int) -> None:
    """Print the dearest functions."""
    if count:
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(count)
        pstats.Stats(profile).strip_dirs().sort_stats("cumtime").print_stats(2 * count)


def tell(what: str, seconds: float, forward: float) -> None:
    """Print one duration."""
    print(f"{what}: {seconds:.1f} s, {seconds / forward:.2f} dense forwards", flush=True)


if __name__ == "__main__":
    main()
