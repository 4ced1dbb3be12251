"""The glyphs: made with matplotlib's own fonts, read and trained on."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch

from groupify.data.images import ImageArrays
from groupify.data.splits import load_data
from groupify.errors import DataError
from groupify.models.specs import ModelSpec
from scripts.glyphs import CLASSES, SIDE, glyph_resnet18
from scripts.make_glyphs import (
    SIZES,
    TEST,
    TRAIN,
    choose,
    drawn,
    in_all_fonts,
    kanji_of_level_1,
    opened,
    render,
    write,
)

FOLDER = Path(mpl.get_data_path()) / "fonts" / "ttf"
SANS, SERIF = FOLDER / "DejaVuSans.ttf", FOLDER / "DejaVuSerif.ttf"
LETTERS = list("AΩЖg漢")


def test_no_maker_is_in_both_parts() -> None:
    makers = [{Path(name).parent.name.split("-")[0] for name in names} for names in (TRAIN, TEST)]
    assert not makers[0] & makers[1]
    assert len(TRAIN) == len(set(TRAIN))


def test_the_kanji_of_level_1() -> None:
    kanji = kanji_of_level_1()
    assert len(kanji) == len(set(kanji)) == 2965  # JIS X 0208 says so
    assert (kanji[0], kanji[-1]) == ("亜", "腕")


def test_classes_are_what_all_fonts_have_drawn() -> None:
    known = in_all_fonts([*LETTERS, " "], [SANS, SERIF])
    assert known == ["A", "Ω", "Ж", "g"]
    chosen = choose(known, 2, seed=3)
    assert chosen == choose(known, 2, seed=3)
    assert [one for one in known if one in chosen] == chosen
    assert len({tuple(choose(known, 2, seed=seed)) for seed in range(20)}) > 1


def test_images_are_those_of_their_seed_and_differ() -> None:
    letters = LETTERS[:4]
    made = render(letters, [SANS, SERIF], 30, seed=(0, 1))
    assert made.images.shape == (120, SIDE, SIDE)
    assert made.labels.tolist() == [label for label in range(4) for _ in range(30)]
    again = render(letters, [SANS, SERIF], 30, seed=(0, 1))
    assert (made.images == again.images).all()
    assert (made.images != render(letters, [SANS, SERIF], 30, seed=(0, 2)).images).any(axis=(1, 2)).all()
    assert len(np.unique(made.images, axis=0)) == 120
    # Dark on light and light on dark, and always to be seen.
    corners = made.images[:, 0, 0].astype(int)
    assert corners.min() < 60
    assert corners.max() > 195


def test_a_character_is_put_anywhere_and_whole() -> None:
    font = opened(SANS, SIZES[0])
    inks = [drawn("g", font, np.array(place)) for place in ((0, 0), (1, 0), (0.5, 1))]
    rows, columns = (np.array([np.flatnonzero(ink.any(axis)) for ink in inks]) for axis in (1, 0))
    height, width = rows.shape[1], columns.shape[1]
    # A pixel at the edge may be too pale to be seen.
    assert rows[:, 0].tolist() == pytest.approx([0, 0, SIDE - height], abs=1)
    assert columns[:, 0].tolist() == pytest.approx([0, SIDE - width, (SIDE - width) / 2], abs=1)


def test_what_was_written_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = LETTERS[:3]
    parts = {
        "train": render(letters, [SANS], 8, seed=(0, 1)),
        "test": render(letters, [SERIF], 4, seed=(0, 2)),
    }
    write(tmp_path / "glyphs.npz", letters, parts)
    spec = ModelSpec("glyphs", {}, (1, SIDE, SIDE), None)
    monkeypatch.chdir(tmp_path)
    splits = load_data("scripts.glyphs:load", spec)
    assert isinstance(splits.train, ImageArrays)
    assert splits.num_classes == 3
    assert splits.augment is not None
    images, labels = splits.train.batch(torch.arange(24))
    assert images.shape == (24, 1, SIDE, SIDE)
    assert float(images.mean()) == pytest.approx(0, abs=1e-4)
    assert float(images.std()) == pytest.approx(1, abs=1e-3)
    assert labels.tolist() == parts["train"].labels.tolist()
    # Moved by a pixel or two, but not mirrored: the same pixels in the same order along a row.
    moved = splits.augment(images, torch.Generator().manual_seed(0))
    assert any(torch.equal(moved[0, :, 4:28, 4:28], images[0, :, 4 + y : 28 + y, 4 + x : 28 + x])
               for y in range(-2, 3) for x in range(-2, 3))  # fmt: skip
    assert glyph_resnet18(3)(images).shape == (24, 3)
    assert glyph_resnet18().get_parameter("fc.weight").shape[0] == CLASSES
    monkeypatch.setenv("GLYPHS", str(tmp_path / "elsewhere.npz"))
    with pytest.raises(DataError, match=r"no glyphs in .*elsewhere.npz: write them with"):
        load_data("scripts.glyphs:load", spec)
