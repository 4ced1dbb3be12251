"""The helpers of the cases do what the cases rely on."""

from __future__ import annotations

import torch
from torch import nn

from tests.cases.nets import (
    Straight,
    assert_exact,
    converted,
    converted_names,
    grouped_already,
    lively,
    planned,
    relative_error,
    reorder_between,
    with_statistics,
)


def test_a_net_that_is_grouped_already_converts_exactly_however_its_channels_are_ordered() -> None:
    plain, net = grouped_already(Straight()), grouped_already(Straight())
    for first, second in ((net.stem, net.c1), (net.c1, net.rest[0])):
        assert isinstance(second, nn.Conv2d)
        reorder_between(first, second)
    assert relative_error(net, plain) < 1e-6
    conversion = converted(net)
    assert converted_names(planned(net)) == ["c1", "rest.0"]
    assert_exact(conversion.model, net)


def test_a_net_that_is_not_grouped_does_not_convert_exactly() -> None:
    net = lively(Straight())
    assert relative_error(converted(net).model, net) > 0.01


def test_statistics_are_those_of_the_inputs() -> None:
    net = with_statistics(nn.Sequential(nn.BatchNorm2d(3)))
    outputs = net(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    norm = net[0]
    assert isinstance(norm, nn.BatchNorm2d)
    torch.testing.assert_close(outputs.mean((0, 2, 3)), norm.bias, atol=0.02, rtol=0.02)
