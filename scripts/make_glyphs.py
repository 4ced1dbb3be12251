"""Render kanji from Debian's fonts as small grey images, for ``scripts.glyphs``.

    apt-get install --no-install-recommends fonts-aoyagi-soseki fonts-arphic-ukai fonts-arphic-uming \
        fonts-cns11643-kai fonts-cns11643-sung fonts-dejima-mincho fonts-hanazono fonts-horai-umefont \
        fonts-ipaexfont-gothic fonts-ipaexfont-mincho fonts-kiloji fonts-klee fonts-kouzan-mouhitsu \
        fonts-morisawa-bizud-gothic fonts-morisawa-bizud-mincho fonts-motoya-l-cedar fonts-motoya-l-maruberi \
        fonts-mplus fonts-noto-cjk fonts-oradano-mincho-gsrr fonts-seto fonts-wqy-microhei fonts-wqy-zenhei \
        fonts-yozvox-yozfont-antique
    python -m scripts.make_glyphs --output glyphs.npz

The classes are kanji of JIS X 0208's first level that all these fonts have, drawn by a seed. Each image has
a font, a size, a place, an ink, and a background with a slope and noise of its own. The test images are in
fonts of other makers than those of the training images. The same fonts, versions and seed give the same.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from scripts.glyphs import CLASSES, SIDE

FONTS = Path("/usr/share/fonts")
# By maker, so that no test image has the strokes of a training image; of a .ttc the first font is meant.
TRAIN = (
    "truetype/aoyagi-soseki/aoyagi-soseki.ttf",
    "truetype/arphic/ukai.ttc",
    "truetype/arphic/uming.ttc",
    "truetype/bizud-gothic/BIZUDGothic-Bold.ttf",
    "truetype/bizud-gothic/BIZUDGothic-Regular.ttf",
    "truetype/bizud-mincho/BIZUDMincho-Regular.ttf",
    "truetype/cns11643/TW-Kai-98_1.ttf",
    "truetype/cns11643/TW-Sung-98_1.ttf",
    "truetype/hanazono/HanaMinA.ttf",
    "truetype/horai-umefont/ume-tgc4.ttf",
    "truetype/horai-umefont/ume-tgo5.ttf",
    "truetype/horai-umefont/ume-tmo3.ttf",
    "truetype/kiloji/kiloji.ttf",
    "truetype/kiloji/kiloji_b.ttf",
    "truetype/kouzan-mouhitsu/kouzan-mouhitsu.ttf",
    "opentype/mplus/Mplus1-Black.otf",
    "opentype/mplus/Mplus1-Regular.otf",
    "opentype/mplus/Mplus1-Thin.otf",
    "opentype/noto/NotoSansCJK-Bold.ttc",
    "opentype/noto/NotoSansCJK-Regular.ttc",
    "opentype/noto/NotoSerifCJK-Bold.ttc",
    "opentype/noto/NotoSerifCJK-Regular.ttc",
    "truetype/oradano-mincho/OradanoGSRR.ttf",
    "truetype/seto/setofont.ttf",
    "truetype/wqy/wqy-microhei.ttc",
    "truetype/wqy/wqy-zenhei.ttc",
    "truetype/yozvox-yozfont/YOzBA_.ttf",
    "truetype/yozvox-yozfont/YOzRA_.ttf",
)
TEST = (
    "truetype/dejima-mincho/dejima-mincho-r227.ttf",
    "opentype/ipaexfont-gothic/ipaexg.ttf",
    "opentype/ipaexfont-mincho/ipaexm.ttf",
    "truetype/klee/KleeOne-Regular.ttf",
    "truetype/klee/KleeOne-SemiBold.ttf",
    "truetype/motoya-l-cedar/MTLc3m.ttf",
    "truetype/motoya-l-maruberi/MTLmr3m.ttf",
)
ROWS_OF_LEVEL_1 = range(16, 48)  # of JIS X 0208
SIZES = (15, 29)  # pixels an em
SLOPE, NOISE = 0.3, 0.15  # of a background, in the range of the grey levels: at most
CONTRAST = 0.2  # between ink and background: at least
_NOWHERE = "\U0010ffff"  # no character, so no font has it
_CHUNK = 4096

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Samples:
    """Images (n, side, side) and labels (n,)."""

    images: Images
    labels: NDArray[np.uint16]


def main() -> None:
    """Parse, render, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument(
        "--fonts", type=Path, default=FONTS, help="folder of the fonts (default: %(default)s)"
    )
    parser.add_argument("--classes", type=int, default=CLASSES, help="default: %(default)s")
    parser.add_argument("--train", type=int, default=84, help="images of a class (default: %(default)s)")
    parser.add_argument("--test", type=int, default=20, help="images of a class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    train, test = ([arguments.fonts / name for name in names] for names in (TRAIN, TEST))
    if missing := [str(path) for path in (*train, *test) if not path.is_file()]:
        sys.exit(f"missing fonts: {', '.join(missing)}; install the packages that --help lists")
    known = in_all_fonts(kanji_of_level_1(), [*train, *test])
    if len(known) < arguments.classes:
        parser.error(f"--classes {arguments.classes}: the fonts have {len(known)} characters in common")
    characters = choose(known, arguments.classes, arguments.seed)
    parts = {
        "train": render(characters, train, arguments.train, seed=(arguments.seed, 1)),
        "test": render(characters, test, arguments.test, seed=(arguments.seed, 2)),
    }
    write(arguments.output, characters, parts)
    for name, part in parts.items():
        print(f"{name}: {len(part.labels)} images of {len(characters)} classes")
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


def kanji_of_level_1() -> list[str]:
    """Return the kanji of JIS X 0208's rows 16 to 47, in their order."""
    found = []
    for row in ROWS_OF_LEVEL_1:
        for cell in range(1, 95):
            character = bytes([row + 0xA0, cell + 0xA0]).decode("euc_jp", errors="ignore")
            found += [character] if character else []
    return found


def in_all_fonts(characters: Sequence[str], fonts: Sequence[Path]) -> list[str]:
    """Return the characters that each font has a drawing of."""
    known = list(characters)
    for path in fonts:
        font = opened(path, SIZES[1])
        # What a font lacks looks like this, or is empty.
        missing = bytes(font.getmask(_NOWHERE))
        drawings = {one: font.getmask(one) for one in known}
        known = [
            one for one, mask in drawings.items() if mask.getbbox() is not None and bytes(mask) != missing
        ]
    return known


def choose(characters: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw some characters; they come back in their order."""
    chosen = np.random.default_rng(seed).permutation(len(characters))[:count]
    return [characters[index] for index in sorted(chosen)]


def render(characters: Sequence[str], fonts: Sequence[Path], count: int, *, seed: Sequence[int]) -> Samples:
    """Render ``count`` images of each character, with the fonts in turns."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(characters), dtype=np.uint16), count)
    font_of = np.tile(np.arange(count) % len(fonts), len(characters))
    sizes = generator.integers(SIZES[0], SIZES[1] + 1, len(labels))
    places = generator.random((len(labels), 2))
    inks = np.empty((len(labels), SIDE, SIDE), np.uint8)
    for index in np.lexsort((sizes, font_of)):  # fonts are opened one after the other
        font = opened(fonts[font_of[index]], int(sizes[index]))
        inks[index] = drawn(characters[labels[index]], font, places[index])
    images = np.concatenate([_coloured(chunk, generator) for chunk in _chunks(inks)])
    return Samples(images, labels)


@functools.lru_cache(maxsize=4)
def opened(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Return a font at a size in pixels."""
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def drawn(character: str, font: ImageFont.FreeTypeFont, place: NDArray[np.float64]) -> Images:
    """How much ink is where, 0 to 255: the character somewhere between the edges."""
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (SIDE, SIDE))
    free = (max(SIDE - (right - left), 0), max(SIDE - (bottom - top), 0))
    corner = (free[0] * place[0] - left, free[1] * place[1] - top)
    ImageDraw.Draw(image).text((round(corner[0]), round(corner[1])), character, fill=255, font=font)
    return np.asarray(image)


def _coloured(inks: Images, generator: np.random.Generator) -> Images:
    """Put ink of some grey on backgrounds of another, with a slope and with noise."""
    count = len(inks)

    def draw(low: float, high: float) -> NDArray[np.float64]:
        return generator.uniform(low, high, (count, 1, 1))

    level = draw(0, 1)
    # As far from the background as it must be, and up to the end of the range that has more room.
    room = np.where(level < 0.5, 1 - level, -level)
    ink = level + np.sign(room) * (CONTRAST + draw(0, 1) * (np.abs(room) - CONTRAST))
    slopes = np.linspace(-0.5, 0.5, SIDE)
    background = level + draw(-SLOPE, SLOPE) * slopes[None, :, None] + draw(-SLOPE, SLOPE) * slopes
    covered = inks / 255
    values = background * (1 - covered) + ink * covered
    values += draw(0, NOISE) * generator.standard_normal(values.shape)
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _chunks(inks: Images) -> Iterator[Images]:
    for start in range(0, len(inks), _CHUNK):
        yield inks[start : start + _CHUNK]


def write(path: Path, characters: Sequence[str], parts: dict[str, Samples]) -> None:
    """Write images, labels and what the labels mean."""
    arrays = {f"{name}_images": part.images for name, part in parts.items()}
    arrays |= {f"{name}_labels": part.labels for name, part in parts.items()}  # type: ignore[misc]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, characters=np.array(characters), **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
