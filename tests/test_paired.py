from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from groupify.paired import Answers, Paired, images_for
from groupify.scores import Judge, evaluate

Z = NormalDist().inv_cdf(0.95)


def _chance(lost: int, gained: int, images: int, p_lost: float, p_gained: float) -> float:
    """Of one outcome, trinomial."""
    same = images - lost - gained
    counts = math.lgamma(images + 1) - sum(math.lgamma(n + 1) for n in (lost, gained, same))
    shares = zip((lost, gained, same), (p_lost, p_gained, 1 - p_lost - p_gained), strict=True)
    return math.exp(counts + sum(n * math.log(p) for n, p in shares))


@pytest.mark.parametrize(
    ("images", "p_lost", "p_gained"),
    [(100, 0.02, 0.01), (250, 0.015, 0.005), (250, 0.03, 0.02), (600, 0.007, 0.002)],
)
def test_the_bound_holds_as_often_as_it_says(images: int, p_lost: float, p_gained: float) -> None:
    """Counted over all outcomes, not drawn."""
    drop = 100 * (p_lost - p_gained)
    held = sum(
        _chance(lost, gained, images, p_lost, p_gained)
        for lost in range(41)
        for gained in range(41)
        if Paired(lost, gained, images).at_most() >= drop
    )
    assert 0.943 < held < 0.985


def test_where_nothing_changes_it_is_the_score_bound_of_a_share() -> None:
    """(0 - n d) / sqrt(n d (1 - d)) = -z has the solution z² / (n + z²)."""
    assert Paired(0, 0, 256).at_most() == pytest.approx(100 * Z * Z / (256 + Z * Z))
    low, high = Paired(0, 0, 256).interval()
    assert low == pytest.approx(-high)
    assert Paired(0, 0, 256).error == pytest.approx(high)


def test_many_images_have_the_error_of_a_normal_distribution() -> None:
    changed = Paired(3000, 2000, 200_000)
    assert changed.drop == 0.5
    spread = 100 * math.sqrt(5000 / 200_000 - 0.005**2) / math.sqrt(200_000)
    assert changed.at_most() == pytest.approx(0.5 + Z * spread, rel=2e-3)
    assert changed.error == pytest.approx(1.96 * spread, rel=2e-3)


def test_images_that_are_few_tell_no_drop() -> None:
    assert images_for(0.5) == math.ceil(Z * Z * 199)
    assert images_for(100) == 1


@given(st.integers(0, 30), st.integers(0, 30), st.integers(60, 5000))
def test_a_bound_is_above_the_drop_and_grows_with_confidence(lost: int, gained: int, images: int) -> None:
    changed = Paired(lost, gained, images)
    low, high = changed.interval()
    assert -100 <= low <= changed.drop <= changed.at_most() <= changed.at_most(0.99) <= 100
    assert changed.drop <= changed.at_most() <= high
    assert Paired(gained, lost, images).interval() == pytest.approx((-high, -low))


def test_answers_are_compared_image_by_image() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1])
    before = Answers(torch.tensor([True, True, False, False, True]), labels)
    after = Answers(torch.tensor([True, False, True, False, False]), labels)
    assert before.against(after) == Paired(lost=2, gained=1, images=5)
    other = Answers(after.right, labels.flip(0))
    assert before.against(other) is None


def test_a_shuffled_loader_pairs_nothing() -> None:
    data = TensorDataset(torch.eye(4).repeat(50, 1)[:, :, None, None], torch.arange(4).repeat(50))
    in_order, shuffled = DataLoader(data, 16), DataLoader(data, 16, shuffle=True)
    first, again, other = (evaluate(nn.Flatten(), one) for one in (in_order, in_order, shuffled))
    assert first.answers is not None
    assert again.answers is not None
    assert other.answers is not None
    assert first.answers.against(again.answers) == Paired(0, 0, 200)
    assert first.answers.against(other.answers) is None


@pytest.mark.parametrize("labelled", [True, False])
def test_a_judgement_knows_its_error(labelled: bool) -> None:
    """The dense model has three of four right; the other one swaps the first two classes."""
    images, swap = torch.eye(4).repeat(10, 1), nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        swap.weight.copy_(torch.eye(4)[[1, 0, 2, 3]])
    labels = torch.tensor([1, 1, 2, 3]).repeat(10)
    judge = Judge(nn.Identity(), images, labels if labelled else None)
    found = judge.judge(swap)
    # Labelled: one of the four is lost, one gained; unlabelled: two have another class.
    assert found.changed == (Paired(10, 10, 40) if labelled else Paired(20, 0, 40))
    assert found.drop == (0 if labelled else 50)
    assert found.loses_at_most() == found.changed.at_most()
    assert judge.images_for(20) is None
    assert judge.images_for(1) == images_for(1)
