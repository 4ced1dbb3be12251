"""A task that is hard enough to tell methods apart: 500 kanji in fonts that no training image uses.

    python -m scripts.make_glyphs --output glyphs.npz
    python -m scripts.train_dense --model glyphs --data scripts.glyphs:load --epochs 5 \
        --output glyphs.safetensors
    python -m scripts.benchmarks.rivals --model scripts.glyphs:glyph_resnet18 --data scripts.glyphs:load \
        --checkpoint glyphs.safetensors

The environment variable ``GLYPHS`` names the file where it is another one. Neither the images nor the net are
part of the package.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models import resnet18

from groupify.data.images import FlipAndShift, ImageArrays
from groupify.data.splits import DataSplits
from groupify.errors import DataError
from groupify.models.preprocessing import Preprocessing

SIDE = 32  # pixels
CLASSES = 500
SHIFT = 2  # pixels


def load() -> DataSplits:
    """Return the images that ``scripts.make_glyphs`` wrote.

    Raises:
        DataError: there is no such file.
    """
    path = Path(os.environ.get("GLYPHS", "glyphs.npz"))
    if not path.is_file():
        raise DataError(
            f"no glyphs in {path.absolute()}: write them with python -m scripts.make_glyphs --output {path}, "
            "or name the file in the environment variable GLYPHS"
        )
    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    train = torch.from_numpy(found["train_images"])
    mean, std = float(train.float().mean() / 255), float(train.float().std() / 255)
    preprocessing = Preprocessing((SIDE, SIDE), None, "none", (mean,), (std,), "bilinear")
    parts = {
        part: ImageArrays(
            torch.from_numpy(found[f"{part}_images"])[:, None],
            torch.from_numpy(found[f"{part}_labels"].astype(np.int64)),
            preprocessing,
        )
        for part in ("train", "test")
    }
    augment = FlipAndShift(SHIFT, flip=False)  # a kanji in the mirror is none
    classes = len(found["characters"])
    return DataSplits("glyphs", parts["train"], parts["test"], classes, augment, True, preprocessing)


def glyph_resnet18(classes: int = CLASSES) -> nn.Module:
    """Return torchvision's resnet18 for one grey channel of 32×32 pixels, with a stride-1 3×3 stem."""
    model: nn.Module = resnet18(weights=None, num_classes=classes)
    model.conv1 = nn.Conv2d(1, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model
