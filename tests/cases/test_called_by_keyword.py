"""A conv that is called by keyword, ``self.conv(input=x)``, like any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from groupify.conversion.surgery import restructure
from groupify.structures import SiteRecipe, Structure
from tests.cases.nets import Straight, assert_exact, converted, converted_names, grouped_already, planned


class ByKeyword(Straight):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c1(input=torch.relu(self.stem(input=x))))
        result: Tensor = self.head(torch.relu(self.rest[0](x)).mean((2, 3)))
        return result


class Guarded(ByKeyword):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e12:
            x = x * 0
        return super().forward(x)


@pytest.mark.parametrize("make", [ByKeyword, Guarded])
def test_it_converts(make: type[nn.Module]) -> None:
    net = grouped_already(make())
    assert_exact(converted(net).model, net)


def test_it_is_planned() -> None:
    assert converted_names(planned(ByKeyword())) == ["c1", "rest.0"]


@pytest.mark.parametrize(
    ("structure", "shuffle"),
    [(Structure(groups=4), False), (Structure(groups=4), True), (Structure(None, 4, 16), False),
     (Structure(8, 4, 12), False)],
)  # fmt: skip
def test_a_replacement_takes_the_keyword(structure: Structure, shuffle: bool) -> None:
    net = grouped_already(ByKeyword())
    again = restructure(net, [SiteRecipe("c1", structure, shuffle)])
    assert again(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
