"""Make the demo's images: a seeded, class-balanced subset of Fashion-MNIST.

Training images come from the official training split, test images from the official test split;
they are stored in the original format (gzipped idx), in their original order. The same arguments
give the same images:

    python -m scripts.make_demo_data --output groupify/data/fashion-mnist
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from groupify.data.files import find_fashion_mnist, read_fashion_mnist, write_idx

CLASSES = 10


def main() -> None:
    """Parse the command line, choose the images, write the four files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="folder of the full data set (default: the usual places)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--train", type=int, default=6000, help="training images (default: %(default)s)")
    parser.add_argument("--test", type=int, default=2000, help="test images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    folder = find_fashion_mnist(arguments.root)
    arguments.output.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    for split, prefix, count in (("train", "train", arguments.train), ("test", "t10k", arguments.test)):
        images, labels = read_fashion_mnist(folder, split)
        chosen = balanced_subset(labels, count // CLASSES, generator)
        write_idx(arguments.output / f"{prefix}-images-idx3-ubyte.gz", images[chosen].squeeze(1))
        write_idx(arguments.output / f"{prefix}-labels-idx1-ubyte.gz", labels[chosen])
        print(f"{split}: {len(chosen)} of {len(labels)} images")
    size = sum(file.stat().st_size for file in arguments.output.glob("*.gz"))
    print(f"{arguments.output}: {size / 1e6:.2f} MB")


def balanced_subset(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Return the sorted indices of ``per_class`` random items of every class, without replacement."""
    chosen = []
    for label in range(CLASSES):
        members = (labels == label).nonzero().flatten()
        if len(members) < per_class:
            raise SystemExit(f"class {label} has {len(members)} images: expected at least {per_class}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(chosen).sort().values


if __name__ == "__main__":
    main()
