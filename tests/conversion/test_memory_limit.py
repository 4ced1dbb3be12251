"""Activations that wait stay under a limit, whatever the number of images, and the result is the same."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.conversion import conversion, fit
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.errors import ConversionError, SpecError
from groupify.kept import Shelf
from groupify.stats.samples import SampleBudget
from tests.conversion.nets import Residual, images, plan_of, randomise

SITES = ("conv1", "conv2", "conv3")
BUDGET = SampleBudget(minimum=256, patches_minimum=64, per_input=1, patches_per_input=1)
LIMIT = 40_000


class Wandering(Residual):
    """A path that depends on values, which no graph can show."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.mean()) > -100 else -x)


@pytest.fixture
def shelves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Shelf]:
    """The shelves of all conversions to come; temporary files in the test's folder."""
    made: list[Shelf] = []

    class Seen(Shelf):
        def __init__(self, limit: int | None = None) -> None:
            super().__init__(limit)
            made.append(self)

    monkeypatch.setattr(conversion, "Shelf", Seen)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return made


def converted(
    memory: int | str | None, count: int = 48, net: nn.Module | None = None, steps: int = 0
) -> dict[str, Tensor]:
    net = randomise(Residual() if net is None else net).eval()
    calibration = groupify.Calibration(
        images(count),
        memory=memory,
        budget=BUDGET,
        reconstruction=ReconstructionOptions(steps, batch_size=16),
        batch_size=16,
    )
    return groupify.convert(net, plan_of(net, *SITES), calibration).model.state_dict()


@pytest.mark.parametrize("kind", [Residual, Wandering])
@pytest.mark.parametrize("memory", [0, LIMIT])
def test_the_result_is_the_same_and_what_waits_stays_under_the_limit(
    kind: type[Residual], memory: int, shelves: list[Shelf], tmp_path: Path
) -> None:
    expected, found = converted(None, net=kind(), steps=3), converted(memory, net=kind(), steps=3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    free, limited = shelves
    assert free.spilled == 0
    assert free.most > 2 * LIMIT
    assert limited.most <= memory
    assert limited.spilled > 0
    assert list(tmp_path.iterdir()) == []


def test_more_images_take_no_more_memory(shelves: list[Shelf]) -> None:
    for count in (48, 192):
        converted("100kB", count)
    assert [shelf.most <= 100_000 for shelf in shelves] == [True, True]
    assert shelves[1].spilled > 2 * shelves[0].spilled


def test_nothing_stays_on_disk_when_the_conversion_fails(
    shelves: list[Shelf], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert any(path.is_file() for path in tmp_path.rglob("*"))
        raise ConversionError("no fit")

    monkeypatch.setattr(fit, "fit_site", fail)
    with pytest.raises(ConversionError, match="no fit"):
        converted(0)
    assert shelves[0].spilled > 0
    assert list(tmp_path.iterdir()) == []


def test_what_will_wait_is_told_before(shelves: list[Shelf], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "groupify"):
        converted("100kB")
        converted(None)
    spilling, fitting = (record.getMessage() for record in caplog.records)
    told = float(spilling.split("take about ")[1].split(" KiB")[0]) * 1024
    assert told == pytest.approx(shelves[1].most, rel=0.3)
    assert "beyond 97.7 KiB they wait in" in spilling
    assert "wait in" not in fitting


def test_an_amount_that_is_none_is_refused() -> None:
    with pytest.raises(SpecError, match="no amount of memory"):
        groupify.Calibration(images(2), memory="much")
    with pytest.raises(ConversionError, match="memory is -1"):
        groupify.Calibration(images(2), memory=-1)
