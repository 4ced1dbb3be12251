"""Train a dense network on Fashion-MNIST and store it as half-precision safetensors.

The defaults are the recipe of the project's benchmark checkpoint: 12 epochs, batch 128, SGD with
Nesterov momentum 0.9, one-cycle learning rate up to 0.1, weight decay 5e-4, random flip and 2-pixel
shift, bf16 autocast on CPUs that are fast in it. With seed 0 and one thread of an AMD EPYC core with
AVX-512 that took 70 minutes, beside other work, and gave 93.86% top-1. The demo's model is made by

    python -m scripts.train_dense --model demo --epochs 16 --small-epochs 12 --without-demo-images \
        --output first.safetensors
    python -m scripts.train_dense --model demo --epochs 5 --rate 0.03 --start first.safetensors \
        --without-demo-images --output groupify/models/demo.safetensors

without the training images that the demo embeds: 93.15%, then 93.68%. The benchmarks choose learning rates
on those images: on images that a net knows by heart, the weights that change the least look best. In the
first epochs the images are small, which takes half the time (Tan and Le, "EfficientNetV2", 2021, call it
progressive learning).

Top-1 accuracy on the test images, in float32 and after rounding to half precision, is printed and
stored in the file's metadata. The same seed, versions and number of threads give the same weights.

    python -m scripts.train_dense --model resnet26 --epochs 8 --output resnet26.safetensors

trains the bottleneck ResNet of the benchmarks, and

    python -m scripts.train_dense --model glyphs --data scripts.glyphs:load --epochs 5 \
        --output glyphs.safetensors

one for 500 kanji. After each epoch the state of the training is kept beside the
output, in FILE.safetensors.training: the same command, started again, goes on from there to the same weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from groupify.data.files import read_fashion_mnist
from groupify.data.images import FlipAndShift, ImageArrays
from groupify.data.splits import load_data
from groupify.files import read_tensors
from groupify.machine import bfloat16_is_slow
from groupify.models.demo import (
    DATA_FOLDER,
    INPUT_SHAPE,
    demo_model,
    fashion_resnet18,
    fashion_resnet26,
    fashion_vgg11_bn,
)
from groupify.models.specs import ModelSpec
from groupify.scores import evaluate
from scripts.glyphs import glyph_resnet18

MODELS: dict[str, Callable[[], nn.Module]] = {
    "demo": demo_model,
    "glyphs": glyph_resnet18,
    "resnet18": fashion_resnet18,
    "resnet26": fashion_resnet26,
    "vgg11_bn": fashion_vgg11_bn,
}
BATCH_SIZE = 128
SMALL_SIDE = 20  # pixels of an image in the first epochs, where these are to be small


def main() -> None:
    """Parse the command line, train, measure, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet18", help="default: %(default)s")
    parser.add_argument("--data", default="fashion-mnist", help="data spec (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--without-demo-images", action="store_true", help="leave out the images that the demo embeds"
    )
    parser.add_argument(
        "--small-epochs", type=int, default=0, metavar="N",
        help=f"first epochs, on images of {SMALL_SIDE}×{SMALL_SIDE} pixels (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--rate", type=float, default=0.1, help="the highest (default: %(default)s)")
    parser.add_argument("--start", type=Path, metavar="FILE", help="weights of this script to go on from")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs}: expected at least 1")
    if not 0 <= arguments.small_epochs < arguments.epochs:
        parser.error(f"--small-epochs {arguments.small_epochs}: expected 0 or more, and fewer than --epochs")

    torch.manual_seed(arguments.seed)
    model = MODELS[arguments.model]()
    splits = load_data(arguments.data, ModelSpec(arguments.model, {}, INPUT_SHAPE, None))
    images, test = splits.train, splits.test
    if not isinstance(images, ImageArrays) or test is None or not isinstance(splits.augment, FlipAndShift):
        parser.error(
            f"--data {arguments.data}: expected demo, fashion-mnist[:ROOT], cifar10:ROOT or "
            "scripts.glyphs:load"
        )

    if arguments.without_demo_images:
        images = without(images, read_fashion_mnist(DATA_FOLDER, "train")[0])

    start = "none"
    if arguments.start is not None:
        tensors, made = read_tensors(arguments.start)
        model.load_state_dict(tensors)
        start = str(made)
    setting = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
    kept = Kept(arguments.output.with_name(arguments.output.name + ".training"), setting)
    minutes = train(
        model, images, splits.augment, epochs=arguments.epochs, small_epochs=arguments.small_epochs,
        rate=arguments.rate, seed=arguments.seed, kept=kept,
    )  # fmt: skip
    accuracy = evaluate(model, test)

    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(weights)
    metadata = {
        "model": arguments.model,
        "data": arguments.data,
        "epochs": str(arguments.epochs),
        "small_epochs": str(arguments.small_epochs),
        "rate": str(arguments.rate),
        "start": start,
        "without_demo_images": str(arguments.without_demo_images),
        "training_images": str(len(images)),
        "seed": str(arguments.seed),
        "test_images": str(accuracy.images),
        "test_top1_float32": f"{accuracy.top1:.4f}",
        "test_top1_half": f"{evaluate(model, test).top1:.4f}",
        "training_minutes": f"{minutes:.1f}",
        "torch": torch.__version__,
    }
    store(weights, arguments.output, metadata)
    kept.path.unlink(missing_ok=True)
    print("\n".join(f"{name}: {value}" for name, value in metadata.items()))


def without(images: ImageArrays, left_out: Tensor) -> ImageArrays:
    """Return the images that are none of ``left_out``, uint8 of shape (n, C, H, W), byte by byte."""
    known = {image.numpy().tobytes() for image in left_out}
    others = torch.tensor([image.numpy().tobytes() not in known for image in images.images])
    return ImageArrays(images.images[others], images.labels[others], images.preprocessing)


@dataclass(frozen=True)
class Kept:
    """The state of a training behind its last whole epoch, in a file.

    Attributes:
        path: of the file.
        setting: what must be the same for a training to go on.
    """

    path: Path
    setting: dict[str, Any]

    def save(self, epoch: int, seconds: float, generator: torch.Generator, *parts: Any) -> None:
        """Write the states of ``parts`` and of the random generators aside, then rename."""
        state = {
            "setting": self.setting,
            "epoch": epoch,
            "seconds": seconds,
            "generators": [generator.get_state(), torch.get_rng_state()],
            "parts": [part.state_dict() for part in parts],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(self.path.name + ".partial")
        torch.save(state, aside)
        os.replace(aside, self.path)

    def load(self, generator: torch.Generator, *parts: Any) -> tuple[int, float]:
        """Put the states back; return the epochs that are done and the seconds they took, 0 without a file.

        Exits if the file is of another training.
        """
        if not self.path.exists():
            return 0, 0.0
        state = torch.load(self.path, weights_only=True)
        if state["setting"] != self.setting:
            sys.exit(
                f"{self.path} is of a training with {state['setting']}, this one is with {self.setting}; "
                "remove it or give another --output"
            )
        for part, values in zip(parts, state["parts"], strict=True):
            part.load_state_dict(values)
        generator.set_state(state["generators"][0])
        torch.set_rng_state(state["generators"][1])
        return state["epoch"], state["seconds"]


def train(
    model: nn.Module,
    images: ImageArrays,
    augment: FlipAndShift,
    *,
    epochs: int,
    seed: int,
    small_epochs: int = 0,
    rate: float = 0.1,
    kept: Kept | None = None,
) -> float:
    """Train ``model`` in place with the recipe described above, and return the minutes that took.

    Args:
        model: what to train.
        images: to train on.
        augment: what becomes of them.
        epochs: how many.
        seed: of the order and the augmentation.
        small_epochs: how many of the first epochs have small images.
        rate: the highest learning rate.
        kept: where the state is kept from epoch to epoch, and found by a training that was stopped.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = len(images) // BATCH_SIZE
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=epochs * steps, cycle_momentum=False
    )
    model.train().to(memory_format=torch.channels_last)
    state = generator, model, optimizer, schedule
    done, seconds = (0, 0.0) if kept is None else kept.load(*state)
    for epoch in range(done + 1, epochs + 1):
        started = time.monotonic()
        order = torch.randperm(len(images), generator=generator)[: steps * BATCH_SIZE]
        loss_sum = 0.0
        for indices in tqdm(order.view(steps, BATCH_SIZE), f"epoch {epoch}/{epochs}", mininterval=5):
            inputs, labels = images.batch(indices)
            inputs = augment(inputs, generator)
            if epoch <= small_epochs:
                inputs = F.interpolate(inputs, (SMALL_SIDE, SMALL_SIDE), mode="bilinear", antialias=True)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            loss_sum += _step(model, inputs, labels, optimizer)
            schedule.step()
        seconds += time.monotonic() - started
        if kept is not None:
            kept.save(epoch, seconds, *state)
        tqdm.write(f"epoch {epoch}/{epochs}: mean training loss {loss_sum / steps:.4f}")
    return seconds / 60


def _step(model: nn.Module, inputs: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=not bfloat16_is_slow()):
        loss = F.cross_entropy(model(inputs).float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def store(weights: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write the weights aside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    save_file({name: value.contiguous() for name, value in weights.items()}, aside, metadata)
    os.replace(aside, path)


if __name__ == "__main__":
    main()
