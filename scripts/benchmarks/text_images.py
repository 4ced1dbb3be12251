"""Images of words on photographs, for a text detector.

The photographs come from a folder; calibration and test share none, and files of one wallpaper (its sizes,
its variants by day and night) count as one photograph. The fonts are those that matplotlib carries.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageStat
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
)
WORDS = (
    "the", "quick", "open", "market", "street", "hotel", "coffee", "exit", "north", "platform", "water",
    "please", "private", "garden", "museum", "ticket", "office", "library", "school", "doctor", "bread",
    "fresh", "sale", "today", "only", "entrance", "closed", "road", "work", "ahead", "danger", "high",
    "voltage", "parking", "station", "airport", "train", "number", "seven", "bridge", "river", "house",
    "central", "bank", "world", "news", "radio", "city",
)  # fmt: skip
# Of ImageNet, as the detector wants them.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MOST_WORDS, _TRIES = 8, 12
_LEAST_SIDE = 128  # of a photograph, pixels


@dataclass(frozen=True)
class TextImages:
    """Preprocessed images, shape (N, 3, side, side) each.

    Attributes:
        calibration: to plan and to fit on.
        test: of other photographs.
    """

    calibration: Tensor
    test: Tensor


def text_images(folder: Path, *, calibration: int, test: int, side: int = 256, seed: int = 0) -> TextImages:
    """Draw words on the photographs of a folder.

    Args:
        folder: with photographs, also in folders below it.
        calibration, test: how many images of each.
        side: of an image, pixels.
        seed: of the split of the photographs and of all that is drawn.

    Raises:
        ValueError: fewer than two photographs.
    """
    chance = random.Random(seed)
    photographs = find_photographs(folder)
    if len(photographs) < 2:
        raise ValueError(
            f"{folder} holds {len(photographs)} photographs ({', '.join(SUFFIXES)}); expected two or more"
        )
    names = sorted(photographs)
    chance.shuffle(names)
    half = len(names) // 2
    parts = [
        _images([photographs[name] for name in chosen], count, side, random.Random(f"{seed} {part}"))
        for part, chosen, count in (("calibration", names[:half], calibration), ("test", names[half:], test))
    ]
    return TextImages(*parts)


def find_photographs(folder: Path) -> dict[str, Path]:
    """Return the largest file of every photograph, by a name that its variants share."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.stem == "screenshot":
            continue
        with Image.open(path) as image:
            if min(image.size) < _LEAST_SIDE:
                continue
        name = _name(path)
        if name not in found or path.stat().st_size > found[name].stat().st_size:
            found[name] = path
    return found


def _name(path: Path) -> str:
    # KDE's wallpapers are NAME/contents/images/WIDTHxHEIGHT.png; GNOME's NAME-l and NAME-d.
    if "contents" in path.parts:
        return path.parts[path.parts.index("contents") - 1]
    return re.sub(r"(-[dl]|_\d+x\d+)$", "", path.stem)


def _images(paths: Sequence[Path], count: int, side: int, chance: random.Random) -> Tensor:
    """Images in turns from all photographs, each opened once."""
    images: dict[int, Tensor] = {}
    for number, path in enumerate(paths[:count]):
        with Image.open(path) as opened:
            photograph = opened.convert("RGB")
        for index in range(number, count, len(paths)):
            images[index] = preprocessed(draw_words(_crop(photograph, side, chance), chance))
    return torch.stack([images[index] for index in range(count)])


def _crop(photograph: Image.Image, side: int, chance: random.Random) -> Image.Image:
    """A square of it, anything from a fifth to all of its height."""
    most = min(photograph.size)
    size = round(most * chance.uniform(0.2, 1.0))
    left, top = (chance.randint(0, length - size) for length in photograph.size)
    return photograph.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + size, top + size))


def draw_words(image: Image.Image, chance: random.Random) -> Image.Image:
    """Return a copy with words on it, of many sizes, turned a little, where no other word is."""
    image = image.copy()
    taken: list[tuple[int, int, int, int]] = []
    for _ in range(chance.randint(2, _MOST_WORDS)):
        word = _word(chance, image.width)
        for _ in range(_TRIES):
            left = chance.randint(0, max(0, image.width - word.width))
            top = chance.randint(0, max(0, image.height - word.height))
            box = (left, top, left + word.width, top + word.height)
            if not any(_overlap(box, other) for other in taken):
                image.paste(_colour(image.crop(box), chance), box, word)
                taken.append(box)
                break
    return image


def _word(chance: random.Random, side: int) -> Image.Image:
    """The mask of one word, tightly cut."""
    text = chance.choice(WORDS)
    text = chance.choice([text, text.upper(), text.capitalize(), str(chance.randint(0, 9999))])
    size = round(math.exp(chance.uniform(math.log(side / 22), math.log(side / 5))))
    font = ImageFont.truetype(str(_font(chance.choice(FONTS))), size)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    mask = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=font)
    turned = mask.rotate(chance.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    return turned.crop(turned.getbbox())


def _font(name: str) -> Path:
    import matplotlib as mpl

    return Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def _colour(under: Image.Image, chance: random.Random) -> tuple[int, int, int]:
    """A colour that can be told from what is under the word."""
    below = ImageStat.Stat(under).mean
    while True:
        colour = (chance.randint(0, 255), chance.randint(0, 255), chance.randint(0, 255))
        if sum(abs(own - other) for own, other in zip(colour, below, strict=True)) > 240:
            return colour


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def preprocessed(image: Image.Image) -> Tensor:
    """Return an image as the detector wants it, shape (3, H, W)."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    values = values.reshape(image.height, image.width, 3).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(_MEAN).reshape(3, 1, 1)) / torch.tensor(_DEVIATION).reshape(3, 1, 1)
