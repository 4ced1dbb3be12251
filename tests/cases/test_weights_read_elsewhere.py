"""Weights that are read elsewhere, too: by a function, as a number, under another name, by another layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupify.errors import GroupifyError
from tests.cases.nets import grouped_already, planned, reason_of
from tests.cases.small import CHANNELS, PAIRS, TINY, Between, Several, assert_converts, free_convs, together

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
    "einsum": lambda net, x: x + torch.einsum("nchw,dc->ndhw", x, net.c1.weight[:, :, 1, 1]),
    "matmul": lambda net, x: (x.transpose(1, 3) @ net.c1.weight[:, :, 0, 0].t()).transpose(1, 3),
    "shape": lambda net, x: x * (net.c1.weight.shape[1] / 8),
    "own forward": lambda net, x: net.c1._conv_forward(x, net.c1.weight, net.c1.bias),
    "twice": lambda net, x: net.c1(x),
}  # fmt: skip
FREE = ("shape", "twice")


def test_a_conv_whose_weight_is_read_elsewhere_stays_as_it_is() -> None:
    nets = {name: grouped_already(Reading(read), PAIRS) for name, read in READ.items()}
    together(nets, assert_converts)
    plan = planned(Several(nets), TINY, PAIRS)
    converted = {site.name for site in plan.converted}
    for number, name in enumerate(nets):
        assert f"nets.{number}.c2" in converted
        if name not in FREE:
            assert f"nets.{number}.c1" not in converted, name
            assert "weight" in (reason_of(plan, f"nets.{number}.c1") or ""), name


def test_a_weight_that_is_read_past_torch_export_is_right() -> None:
    assert_converts(grouped_already(Reading(lambda net, x: x + net.c1.weight.data.mean()), PAIRS))


def test_a_bias_that_is_read_elsewhere_goes_with_its_channels_or_stays() -> None:
    reads: dict[str, Callable[[Between, Tensor], Tensor]] = {
        "for each channel": lambda net, x: x + cast(Tensor, net.c1.bias)[:, None, None],
        "of all": lambda net, x: x + cast(Tensor, net.c1.bias).sum(),
    }
    together({name: grouped_already(Reading(read), PAIRS) for name, read in reads.items()}, assert_converts)


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


def test_tied_weights_stay_tied_and_right() -> None:
    def check(net: nn.Module) -> None:
        free_convs(net)
        model = assert_converts(net).model
        for ours, theirs in zip(model.modules(), net.modules(), strict=True):
            if isinstance(theirs, Tied) and theirs.tie in (two_convs, two_linears, one_module):
                kept = dict(ours.named_parameters(remove_duplicate=False))
                assert len(kept) > len(dict(ours.named_parameters())), theirs.tie

    together({name: grouped_already(Tied(tie), PAIRS) for name, tie in TIES.items()}, check)


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
