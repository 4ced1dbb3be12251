"""Structures: one spelling of each, what they cost, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from groupify.errors import PlanError
from groupify.structures import ConvShape, Structure

SQUARE = ConvShape(16, 24, (3, 3))
POINTWISE = ConvShape(16, 24, (1, 1))
OWN_GROUPS = ConvShape(16, 24, (3,), groups=2)

CANONICAL = [
    (SQUARE, (None, 1, None), (None, 1, None)),
    (SQUARE, (16, 1, 8), (None, 1, 8)),
    (SQUARE, (8, 1, 24), (8, 1, None)),
    (SQUARE, (20, 1, 30), (None, 1, None)),
    (SQUARE, (16, 4, 24), (16, 4, 24)),  # a basis of full size still chooses what a group reads
    (SQUARE, (8, 8, 8), (8, 8, 8)),
    (POINTWISE, (None, 1, 8), (8, 1, None)),
    (POINTWISE, (8, 1, 4), (4, 1, None)),
    (POINTWISE, (8, 4, 4), (4, 1, None)),
    (POINTWISE, (None, 4, 8), (None, 4, 8)),
    (POINTWISE, (8, 4, None), (8, 4, None)),
    (POINTWISE, (20, 1, None), (None, 1, None)),
    (OWN_GROUPS, (8, 2, 24), (8, 2, None)),
    (OWN_GROUPS, (16, 4, 24), (16, 4, 24)),
]


@pytest.mark.parametrize(("conv", "given", "expected"), CANONICAL, ids=str)
def test_each_structure_has_one_spelling(
    conv: ConvShape, given: tuple[int | None, int, int | None], expected: tuple[int | None, int, int | None]
) -> None:
    structure, canonical = Structure(*given), Structure(*expected)
    assert structure.canonical(conv) == canonical
    canonical.check(conv)
    if structure == canonical:
        return
    assert canonical.macs(conv, 4, 4) <= structure.macs(conv, 4, 4)
    with pytest.raises(PlanError, match="needless convs; write it so"):
        structure.check(conv)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 1, None), "reduce is 0; expected 1 or more, or None"),
        ((None, 0, None), "groups is 0; expected 1 or more$"),
        ((32, 0, 64), "groups is 0; expected 1 or more$"),
        ((32, -4, None), "groups is -4; expected 1 or more$"),
        ((None, 1, -2), "expand is -2; expected 1 or more"),
        ((9, 2, None), "reduce is 9, which 2 groups do not divide; take a multiple of 2"),
        ((8, 4, 10), "expand is 10, which 4 groups do not divide"),
    ],
)
def test_impossible_numbers_are_refused(given: tuple[int | None, int, int | None], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Structure(*given)


@pytest.mark.parametrize(
    ("conv", "given", "message"),
    [
        (
            OWN_GROUPS,
            (9, 3, 9),
            "has 3 groups for a 3 conv 16 → 24 in 2 groups; take a multiple of 2",
        ),
        (SQUARE, (None, 3, None), "3 groups do not divide 16 and 24 channels"),
        (SQUARE, (None, 16, None), "16 groups do not divide 16 and 24 channels"),
    ],
)
def test_what_does_not_suit_a_conv_is_refused(
    conv: ConvShape, given: tuple[int | None, int, int | None], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        Structure(*given).check(conv)


@pytest.mark.parametrize("given", [(8, 4, 12), (None, 4, 12), (8, 4, None), (None, 8, None), (6, 2, 4)])
@pytest.mark.parametrize("own", [1, 2])
def test_costs_are_those_of_the_modules(given: tuple[int | None, int, int | None], own: int) -> None:
    conv, structure = ConvShape(16, 24, (3, 3), own), Structure(*given)
    reads, writes = structure.reduce or 16, structure.expand or 24
    convs = []
    if structure.reduce:
        convs.append(nn.Conv2d(16, reads, 1, groups=own, bias=False))
    convs.append(nn.Conv2d(reads, writes, 3, 2, 1, groups=structure.groups, bias=structure.expand is None))
    if structure.expand:
        convs.append(nn.Conv2d(writes, 24, 1, groups=own))
    assert structure.parameters(conv, bias=True) == sum(p.numel() for c in convs for p in c.parameters())
    value, macs = torch.zeros(1, 16, 8, 8), 0
    for module in convs:
        value = module(value)
        macs += module.weight.numel() * value.shape[2] * value.shape[3]
    assert structure.macs(conv, 64, 16) == macs


def test_the_reduce_of_a_pointwise_conv_takes_the_stride() -> None:
    assert Structure(8, 1, None).macs(POINTWISE, 64, 16) == 16 * (8 * 16 + 24 * 8)


def test_reads_like_the_design() -> None:
    assert str(Structure(8, 4, None)) == "(8, 4, –)"
