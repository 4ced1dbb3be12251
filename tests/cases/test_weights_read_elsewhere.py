"""Weights that are read elsewhere, too: by a function, as a number, under another name, by another layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupify.errors import GroupifyError
from tests.cases.nets import assert_exact, grouped_already, noise, planned, reason_of
from tests.cases.small import (
    CHANNELS,
    PAIRS,
    TINY,
    Between,
    assert_converts,
    convert_small,
    free_convs,
    situations,
)

Build = Callable[[], nn.Module]


class Reading(Between):
    """Does something with the weights of a conv beside calling it."""

    def __init__(self, read: Callable[[Between, Tensor], Tensor], last: bool = False) -> None:
        super().__init__(lambda x: x)
        self.read, self.last = read, last

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c1(torch.relu(self.stem(x))))
        result: Tensor = self.head(torch.relu(self.c2(self.read(self, x))).mean((2, 3)))
        return result


# Of the first conv, whose weight a grouped one does not have.
READ: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "conv2d": lambda net, x: F.conv2d(x, net.c1.weight, net.c1.bias, padding=1),
    "conv2d with a changed weight": lambda net, x: F.conv2d(x, net.c1.weight * 2, padding=1),
    "transposed": lambda net, x: F.conv_transpose2d(x, net.c1.weight, padding=1),
    "norm": lambda net, x: x * net.c1.weight.norm(),
    "norm of each filter": lambda net, x: x * net.c1.weight.flatten(1).norm(dim=1).reshape(-1, 1, 1),
    "view": lambda net, x: x * net.c1.weight.view(CHANNELS, -1).mean(1)[:, None, None],
    "slice": lambda net, x: F.conv2d(x, net.c1.weight[:, :, 1:2, 1:2]),
    "data": lambda net, x: x + net.c1.weight.data.mean(),
    "einsum": lambda net, x: x + torch.einsum("nchw,dc->ndhw", x, net.c1.weight[:, :, 1, 1]),
    "matmul": lambda net, x: (x.transpose(1, 3) @ net.c1.weight[:, :, 0, 0].t()).transpose(1, 3),
    "shape": lambda net, x: x * (net.c1.weight.shape[1] / 8),
    "own forward": lambda net, x: net.c1._conv_forward(x, net.c1.weight, net.c1.bias),
    "twice": lambda net, x: net.c1(x),
}  # fmt: skip
FREE = ("shape", "twice")


@pytest.mark.parametrize("name", situations({name: name for name in READ}, graph=("view",)))
def test_a_conv_whose_weight_is_read_elsewhere_stays_as_it_is(name: str) -> None:
    net = grouped_already(Reading(READ[name]), PAIRS)
    plan = planned(net, TINY, PAIRS)
    if name != "data":  # which torch.export cannot see through
        free_convs(net)  # whatever may move is safe to move
    assert "c2" in {site.name for site in plan.converted}
    if name not in FREE:
        assert "c1" not in {site.name for site in plan.converted}
        assert "weight" in (reason_of(plan, "c1") or "")
    assert_converts(net)


@pytest.mark.parametrize("read", situations({
    "bias": lambda net, x: x + net.c1.bias[:, None, None],
    "bias of all": lambda net, x: x + net.c1.bias.sum(),
}))  # fmt: skip
def test_a_bias_that_is_read_elsewhere_goes_with_its_channels_or_stays(
    read: Callable[[Between, Tensor], Tensor],
) -> None:
    net = grouped_already(Reading(read), PAIRS)
    free_convs(net)
    assert_converts(net)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, tie: Callable[[Tied], None]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.c1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.c2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.point = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.linear = nn.Linear(CHANNELS, CHANNELS)
        self.head = nn.Linear(CHANNELS, CHANNELS)
        self.tie = tie
        tie(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c2(torch.relu(self.c1(torch.relu(self.stem(x))))))
        x = torch.relu(self.point(x)).mean((2, 3))
        result: Tensor = self.head(torch.relu(self.linear(x)))
        return result


def two_convs(net: Tied) -> None:
    net.c2.weight = net.c1.weight


def two_biases(net: Tied) -> None:
    net.c2.bias = net.c1.bias


def two_linears(net: Tied) -> None:
    net.head.weight = net.linear.weight


def conv_and_linear(net: Tied) -> None:
    net.linear.weight = nn.Parameter(net.point.weight.data.view(CHANNELS, CHANNELS))  # one storage


def one_module(net: Tied) -> None:
    net.c2 = net.c1


def alias(net: Tied) -> None:
    net.another = net.c1.weight


TIES: dict[str, Callable[[Tied], None]] = {
    "two convs": two_convs,
    "two biases": two_biases,
    "two linear layers": two_linears,
    "conv and linear layer": conv_and_linear,
    "one module, two names": one_module,
    "another name": alias,
}


@pytest.mark.parametrize("tie", situations(TIES, graph=("two linear layers",)))
def test_tied_weights_stay_tied_and_right(tie: Callable[[Tied], None]) -> None:
    net = grouped_already(Tied(tie), PAIRS)
    free_convs(net)
    before = {name: id(value) for name, value in net.named_parameters(remove_duplicate=False)}
    model = convert_small(net).model
    assert_exact(model, net, noise(8, TINY, 9))
    assert {n: id(v) for n, v in net.named_parameters(remove_duplicate=False)} == before
    if tie in (two_convs, two_linears, one_module):
        kept = dict(model.named_parameters(remove_duplicate=False))
        assert len(kept) > len(dict(model.named_parameters()))


def test_a_net_of_which_every_conv_is_read_elsewhere_is_refused_with_that_reason() -> None:
    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = F.conv2d(x, self.conv.weight, padding=1) + self.conv(x)
            return result

    with pytest.raises(GroupifyError, match="weight"):
        planned(All(), (CHANNELS, 8, 8), PAIRS)
