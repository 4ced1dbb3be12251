from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupify.errors import ConversionError
from groupify.kept import KeptTensors, Shelf

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.bool,
    torch.complex64,
)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=5),
    dtype=st.sampled_from(DTYPES),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 2),
)
def test_a_tensor_comes_back_from_its_file_as_it_was(
    shape: list[int], dtype: torch.dtype, order: st.DataObject, step: int
) -> None:
    values = torch.randint(0, 100, shape).to(dtype)
    dims = list(range(values.dim()))
    order.shuffle(dims)  # type: ignore[attr-defined]
    values = values.permute(dims)[..., ::step] if dims else values
    with Shelf(0) as shelf:
        back = shelf.keep(values).tensor()
        assert back.dtype == dtype
        assert torch.equal(back, values)
        assert shelf.most == 0
        assert shelf.spilled == values.numel() * values.element_size()
        del back


def test_a_file_keeps_the_memory_format(temporary: Path) -> None:
    values = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    with Shelf(0) as shelf:
        assert shelf.keep(values).tensor().is_contiguous(memory_format=torch.channels_last)


def test_what_is_held_stays_under_the_limit_and_makes_room_when_it_goes(temporary: Path) -> None:
    with Shelf(1000) as shelf:
        first = [shelf.keep(torch.ones(100)) for _ in range(4)]  # 400 bytes each: two in memory, two in files
        assert (shelf.held, shelf.spilled) == (800, 800)
        assert len(files(temporary)) == 2
        del first
        gc.collect()
        assert shelf.held == 0
        assert files(temporary) == []
        second = shelf.keep(torch.ones(200))
        assert (shelf.held, shelf.spilled) == (800, 800)
        del second
    assert shelf.most == 800


def test_without_a_limit_there_are_no_files(temporary: Path) -> None:
    with Shelf() as shelf:
        kept = shelf.keep(torch.ones(1000))
        assert list(temporary.iterdir()) == []
        assert kept.tensor().sum() == 1000


def test_nothing_stays_behind_when_something_goes_wrong(temporary: Path) -> None:
    kept: list[object] = []

    def work() -> None:
        with Shelf(0) as shelf:
            kept.append(shelf.keep(torch.ones(100)))
            assert len(files(temporary)) == 1
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        work()
    assert list(temporary.iterdir()) == []


def test_no_room_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ConversionError, match=r"no room for activations .*--memory"), Shelf(0) as shelf:
        shelf.keep(torch.ones(3))


@pytest.mark.parametrize("limit", [None, 0, 500])
def test_rows_are_those_of_all_tensors_in_a_row(limit: int | None, temporary: Path) -> None:
    parts = [torch.randn(count, 3) for count in (7, 1, 20, 12)]
    with Shelf(limit) as shelf:
        kept = KeptTensors(shelf)
        for part in parts:
            kept.append(part)
        numbers = torch.tensor([39, 0, 7, 8, 6, 27, 28, 0, 15])
        assert kept.row_count == 40
        assert torch.equal(kept.rows(numbers), torch.cat(parts)[numbers])
        doubled: list[Tensor] = list(kept.map(lambda part: 2 * part))
        assert torch.equal(torch.cat(doubled), 2 * torch.cat(parts))
