"""The rivals on ImageNet, for whoever has its images: torchvision's nets with their weights, untrained.

    python -m scripts.benchmarks.imagenet --images FOLDER [--only 'resnet18 groupify ÷*']
    python -m scripts.benchmarks.imagenet --quick

FOLDER has ``val`` with one folder per class, named as in ImageNet, so that their order is torchvision's, and
perhaps ``train``; without one, the images for the conversion are taken out of ``val``, and the rest is
measured. Methods, sizes, seeds and rows are those of ``scripts.benchmarks.rivals``. Below them the table has
what others published for such nets without any training after the compression: the results to beat. Their
drops are from the accuracies that their authors measured, on all 50,000 images. ``--quick`` needs nothing: a
few made images, random weights.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset

from groupify.data.batches import Data, calibration_images
from groupify.data.images import ImageFolder
from groupify.data.splits import load_data
from groupify.models.preprocessing import PreprocessingOptions
from groupify.models.sources import load_model
from groupify.models.specs import Source
from scripts.benchmarks.contest import IMAGES
from scripts.benchmarks.harness import Parser, Results
from scripts.benchmarks.low_rank import STRUCTURES
from scripts.benchmarks.methods import Setting, rules_for
from scripts.benchmarks.rivals import KEYS, OURS, Rivals, Row, scores_on
from scripts.benchmarks.rivals import order as order_of_rows

NETS = ("resnet18", "resnet50", "vgg16_bn")
MAIN = "|".join(f"* {name} ÷*" for name in (OURS, *STRUCTURES))
SIZES = "1.72,1.82,2.44,3.7"  # the first three save what the published results do: 42, 45 and 59%
QUICK = "resnet18 with random weights, a few made images and convs, one size"
QUICK_SIDE, QUICK_CLASSES, QUICK_IMAGES = 48, 2, 24
QUICK_CONVS, QUICK_SIZE = ("layer1.0.conv?",), 1.1
_BYTE = 8


@dataclass(frozen=True)
class Published:
    """A result of others, without training after the compression.

    Attributes:
        saved: of the MACs (the papers say FLOPs), percent.
        drop: of top-1, points.
        source: where it is written.
    """

    net: str
    method: str
    saved: float
    drop: float
    source: str


# The table of SVD-NAS holds the first three; its authors measured the rivals again.
_SVD_NAS = "Yu and Bouganis, WACV 2023, arXiv:2208.10404"
PUBLISHED = (
    Published("resnet18", "groups by SVD (Peng et al., ECCV 2018)", 42, 69.3, f"measured by {_SVD_NAS}"),
    Published("resnet18", "ALDS (Liebenwein et al., NeurIPS 2021)", 42, 18.7, f"measured by {_SVD_NAS}"),
    Published("resnet18", "SVD-NAS", 59, 13.4, _SVD_NAS),
    Published("resnext101", "BALF", 45, 1.0, "González Martínez, 2025, arXiv:2509.25136v1, abstract"),
)  # fmt: skip


def main() -> None:
    """Parse and measure."""
    arguments = _parse()
    until = None if arguments.stop_after is None else time.monotonic() + arguments.stop_after
    setting = {
        "calibration_images": QUICK_IMAGES if arguments.quick else IMAGES,
        "published": [asdict(one) for one in PUBLISHED],
    }
    results = Results(Row, KEYS, arguments.json, setting, order_of_rows, again=arguments.again)
    with ExitStack() as stack:
        images = arguments.images
        if arguments.quick:
            images = make_images(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        for net in NETS[:1] if arguments.quick else arguments.nets:
            _measure(net, images, arguments, results, until)
    results.show("imagenet")


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__, "imagenet", QUICK)
    parser.set_defaults(only=MAIN)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="with val, and perhaps train")
    parser.add_argument("--nets", type=lambda text: text.split(","), default=list(NETS), metavar="NET,NET…")
    parser.add_numbers("--sizes", SIZES, "MACs of the dense net ÷ those of a row", float)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no row later")
    arguments = parser.parse()
    if arguments.images is None and not arguments.quick:
        parser.error("--images is missing: a folder with val, of one folder per class; or --quick")
    return arguments


def _measure(
    net: str, images: Path, arguments: argparse.Namespace, results: Results[Row], until: float | None
) -> None:
    """Measure the rows of one net."""
    quick = arguments.quick
    source = _source(net, quick=quick)
    count, seeds = (QUICK_IMAGES, 1) if quick else (IMAGES, arguments.seeds)
    fit, test = split(source, images, count * seeds)
    rules = rules_for(source.model, include=QUICK_CONVS if quick else ())
    settings = [
        Setting(source.model, calibration_images(fit, count, seed=seed), seed, rules) for seed in range(seeds)
    ]
    sizes = [QUICK_SIZE] if quick else arguments.sizes
    scores = functools.partial(scores_on, test, None)
    Rivals(net, settings, scores, results, until).run(sizes, arguments.only)


def _source(net: str, *, quick: bool) -> Source:
    if not quick:
        return load_model(net, weights="DEFAULT")
    return load_model(net, weights="none", input_shape=(3, QUICK_SIDE, QUICK_SIDE))


def split(source: Source, images: Path, count: int) -> tuple[Data, Data]:
    """Return images to convert with, and images to measure on; none is in both.

    Args:
        source: the net, which says how images become its inputs.
        images: the folder.
        count: images to convert with, where there is no training part.
    """
    said = PreprocessingOptions()
    if source.spec.preprocessing is None:
        said = PreprocessingOptions(mean=(0.5,), std=(0.25,), resize=0, crop="center")
    data = load_data(f"imagefolder:{images}", source.spec, preprocessing=said)
    test = data.test
    assert isinstance(test, ImageFolder)
    if data.train is not None:
        return data.train, _whole_bytes(test, range(len(test)))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist()
    return _part(test, order[:count]), _whole_bytes(test, sorted(order[count:]))


def _whole_bytes(data: Data, indices: Sequence[int]) -> Data:
    """These images, but for the last few: which ones were right is kept in whole bytes."""
    return _part(data, indices[: len(indices) // _BYTE * _BYTE])


def _part(data: Data, indices: Sequence[int]) -> Data:
    return Subset(data, list(indices))  # type: ignore[arg-type]


def make_images(folder: Path) -> Path:
    """Write noise as PNG files, in a folder per class; return the folder."""
    generator = np.random.default_rng(0)
    for number in range(QUICK_CLASSES):
        own = folder / "val" / f"n{number:08d}"
        own.mkdir(parents=True)
        for index in range(QUICK_IMAGES):
            pixels = generator.integers(0, 256, (QUICK_SIDE, QUICK_SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(own / f"{index}.png")
    return folder


if __name__ == "__main__":
    main()
