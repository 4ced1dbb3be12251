"""Constants for each channel that ``forward`` makes anew with every call, and that so cannot be reordered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.nets import grouped_already
from tests.cases.small import (
    CHANNELS,
    PAIRS,
    Between,
    Function,
    Several,
    assert_free,
    assert_same,
    convert_from_weights,
    convert_small,
    free_convs,
    hidden,
    together,
)

NUMBERS = [0.5 + index / 7 for index in range(CHANNELS)]


def maps(numbers: list[float] = NUMBERS) -> Tensor:
    return torch.tensor(numbers).reshape(1, -1, 1, 1)


ARRAY = maps().numpy()


class Behind(nn.Module):
    """A layer that reads the channels times constants."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x * maps())
        return result


class Twice(Behind):
    """A layer that reads them with the constants, and without."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + self.layer(x * maps())
        return result


def hide_behind_factors(net: Between, factors: list[float] = NUMBERS) -> Between:
    """Reorder what is in front of ``c2`` although the factors stay: its weight makes up for them."""
    hidden(net, second=False)
    order = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(2))
    constants = torch.tensor(factors)
    with torch.no_grad():
        net.c1.weight.copy_(net.c1.weight[order])
        assert net.c1.bias is not None
        net.c1.bias.copy_(net.c1.bias[order])
        made_up_for = (constants[order] / constants).reshape(-1, 1, 1)
        net.c2.weight.copy_(net.c2.weight[:, order] * made_up_for)
    return net


FOLLOWED: dict[str, Function] = {
    "times a tensor": lambda x: x * maps(),
    "a tensor times": lambda x: maps() * x,
    "of an array": lambda x: x * torch.from_numpy(ARRAY),
    "without a batch dimension": lambda x: x * maps()[0],
    "twice": lambda x: x * maps().sqrt() * maps().sqrt(),
    "in place": lambda x: x.mul_(maps()),
    "activation behind": lambda x: F.leaky_relu(x * maps(), 0.1),
    "pooled and upsampled": lambda x: F.interpolate(F.max_pool2d(x * maps(), 2), scale_factor=2.0),
    "times a number": lambda x: -0.5 * (x * maps()) / 0.5,
    "rolled over the image": lambda x: torch.roll(x * maps(), 1, -1),
}


def test_a_constant_factor_is_made_up_for_in_the_conv_that_reads_it() -> None:
    def check(net: nn.Module) -> None:
        assert_free(net, "c1")
        assert_same(convert_small(net).model, net)

    together({name: hide_behind_factors(Between(function)) for name, function in FOLLOWED.items()}, check)


def test_a_constant_divisor_is_made_up_for() -> None:
    net = hide_behind_factors(Between(lambda x: x / maps()), [1 / number for number in NUMBERS])
    assert "c1" in free_convs(net)
    assert_same(convert_small(net).model, net)
    assert_same(convert_from_weights(net).model, net)


def test_a_constant_factor_of_features_is_made_up_for_in_the_linear_layer() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, CHANNELS, 3), nn.Linear(CHANNELS, 5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.conv(x).mean((2, 3)) * torch.tensor(NUMBERS))
            return result

    assert free_convs(grouped_already(Features(), PAIRS)) == {"conv"}


# What the weights behind could not make up for, so that the channels keep their order.
STAYING: dict[str, Function | nn.Module] = {
    "negative": lambda x: x * maps([-1.0, *NUMBERS[1:]]),
    "zero": lambda x: x * maps([0.0, *NUMBERS[1:]]),
    "added": lambda x: x + maps(),
    "bounded behind": lambda x: (x * maps()).clamp(max=1),
    "shifted behind": lambda x: x * maps() + 1,
    "beside the channels themselves": lambda x: x + x * maps(),
    "times itself": lambda x: x * maps() * (x * maps()),
    "rounded": lambda x: (x * maps()).round(),
    "a number divided by it": lambda x: 1 / (x * maps() + 0.5),
    "padded": lambda x: F.pad((x * maps())[..., 1:], (0, 1), value=0.5),
    "batch norm": Behind(nn.BatchNorm2d(CHANNELS).eval()),
    "depthwise conv": Behind(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)),
    "grouped conv": Behind(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=PAIRS)),
    "shared conv": Twice(nn.Conv2d(CHANNELS, CHANNELS, 1)),
}


def test_channels_stay_where_nothing_could_make_up_for_their_constants() -> None:
    nets = Several({name: Between(function) for name, function in STAYING.items()}).eval()
    free = free_convs(nets)
    assert not [name for number, name in enumerate(nets.names) if f"nets.{number}.c1" in free]


def test_channels_follow_where_the_constants_are_of_another_dimension() -> None:
    assert "c1" in free_convs(hidden(Between(lambda x: x * torch.tensor(NUMBERS))))
