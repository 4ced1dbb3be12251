"""How fast the training is: a step of the grouped net against the dense one, and what a second process adds.

    python -m scripts.benchmarks.training_speed --checkpoint FILE

The net has 4 groups in every 3×3 conv but the first; the training is that of the other benchmarks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from groupify.data.ranks import process_group
from groupify.training.finetuning import finetune
from groupify.training.settings import FinetuneSettings
from scripts.benchmarks.contest import KEYS, MODEL, Net, Row
from scripts.benchmarks.harness import Parser, Results
from scripts.benchmarks.methods import truncation
from scripts.benchmarks.tables import ROOT
from scripts.benchmarks.training import FAST

STEPS, QUICK_STEPS = 12, 2
NORMS = {"frozen": True, "of the whole batch": False}


def main() -> None:
    """Parse and measure; torchrun starts this again as a worker."""
    parser = Parser(__doc__, "training_speed", "2 steps")
    parser.add_net(MODEL)
    parser.add_argument("--worker", choices=list(NORMS), help=argparse.SUPPRESS)
    arguments = parser.parse()
    torch.set_num_threads(1)
    net = Net.load(arguments, 1)
    steps = QUICK_STEPS if arguments.quick else STEPS
    if arguments.worker:
        work(net, steps, NORMS[arguments.worker])
        return
    speed = {"threads": 1, "steps": steps, **step_speeds(net, steps), **process_speeds(arguments)}
    results = Results(Row, KEYS, arguments.json)
    with results.changing() as document:
        document["speed"] = speed


def step_speeds(net: Net, steps: int) -> dict[str, Any]:
    """Milliseconds of a step of the dense and the grouped net, in float32 and as the benchmarks train."""
    images = net.settings[0].images[: FAST.batch_size]
    speed: dict[str, Any] = {"batch_size": len(images)}
    fast = f"{FAST.amp or 'float32'}, channels last"
    for name, settings in (("float32", FinetuneSettings()), (fast, FAST)):
        models = {"dense": net.dense, "grouped": truncation(net.settings[0], 4)}
        seconds = step_seconds(models, settings, images, steps)
        speed[name] = {f"{model}_ms": 1e3 * value for model, value in seconds.items()}
        speed[name]["ratio"] = seconds["dense"] / seconds["grouped"]
        print(f"training step, {name}: {speed[name]}", flush=True)
    return speed


def step_seconds(
    models: dict[str, nn.Module], settings: FinetuneSettings, images: Tensor, steps: int
) -> dict[str, float]:
    """Median seconds of a training step of each model, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in models}
    runs = {name: training_step(model, settings, images) for name, model in models.items()}
    for number in range(steps + 2):
        for name, step in runs.items():
            start = time.perf_counter()
            step()
            if number > 1:  # the first two warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def training_step(model: nn.Module, settings: FinetuneSettings, images: Tensor) -> Callable[[], None]:
    """Return a function that trains the model, which is changed, by one step."""
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    inputs = images.contiguous(memory_format=layout)
    model = model.train().to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.amp is not None):
            loss = model(inputs).float().square().mean()
        loss.backward()
        optimizer.step()

    return step


def process_speeds(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of the fine-tune: one and two processes with a thread each, and one with two.

    By what the batch norms do: where little was lost they keep their statistics, which is the default then;
    otherwise the processes normalise by the whole batch, and talk to each other twice for each norm.
    """
    return {"fine_tune": {norms: _process_speeds(arguments, norms) for norms in NORMS}}


def _process_speeds(arguments: argparse.Namespace, norms: str) -> dict[str, float]:
    rates = {
        name: _images_per_second(arguments, norms, processes, threads)
        for name, processes, threads in (("1", 1, 1), ("2", 2, 1), ("1, 2 threads", 1, 2))
    }
    print(f"norms {norms}, images per second by processes: {rates}", flush=True)
    return {**rates, "two_processes_ratio": rates["2"] / rates["1"]}


def _images_per_second(arguments: argparse.Namespace, norms: str, processes: int, threads: int) -> float:
    of_net = ["--checkpoint", str(arguments.checkpoint), "--data", arguments.data, "--model", arguments.model]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "-m", "scripts.benchmarks.training_speed", "--worker", norms, *of_net,
        *(["--quick"] if arguments.quick else []),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def work(net: Net, steps: int, frozen: bool) -> None:
    """One of the processes whose images per second are measured; the teacher works as well."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    setting, train = net.settings[0], net.data.train
    assert train is not None
    held_out = [(setting.images[:100], torch.zeros(100, dtype=torch.int64))]
    epochs = 2 * steps * FAST.batch_size / len(train)  # type: ignore[arg-type]
    # A validation in the middle: what is before it warms up.
    settings = replace(
        FAST, epochs=epochs, freeze_batch_norms=frozen, validations_per_epoch=max(2, round(2 / epochs))
    )
    with process_group() as ranks, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = finetune(
            truncation(setting, 4), net.data, teacher=net.dense, settings=settings, validation=held_out,
            distributed=True,
        )  # fmt: skip
        if ranks.first:
            print(result.history[-1].images_per_second)


if __name__ == "__main__":
    main()
