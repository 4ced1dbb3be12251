"""Without images, the statistics that the convs change are followed through arithmetic of every spelling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.nets import grouped_already, lively, noise, relative_error, with_statistics
from tests.cases.small import (
    CHANNELS,
    PAIRS,
    TINY,
    Function,
    convert_from_weights,
    right_from_weights,
    together,
)


class Normed(nn.Module):
    """Convs with batch norms, and arithmetic behind the first."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.c1, self.n1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.c2, self.n2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.head, self.function = nn.Linear(CHANNELS, 5), function

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.n1(self.c1(torch.relu(self.n0(self.stem(x))))))
        result: Tensor = self.head(torch.relu(self.n2(self.c2(x))).mean((2, 3)))
        return result


def gate(x: Tensor) -> Tensor:
    g = torch.sigmoid(x)
    return g * x + (1 - g) * torch.relu(x)


def doubled_in_place(x: Tensor) -> Tensor:
    x += x
    return x


ARITHMETIC: dict[str, Function] = {
    "x * 2": lambda x: x * 2,
    "2 * x": lambda x: 2 * x,
    "1 - x": lambda x: 1 - x,
    "x * x": lambda x: x * x,
    "2 ** x": lambda x: 2**x,
    "add": lambda x: torch.add(x, x),
    "rsub": lambda x: torch.rsub(x, 1),
    "x += x": doubled_in_place,
    "gate": gate,
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "mean subtracted": lambda x: x - x.mean((2, 3), keepdim=True),
    "concatenation along the height": lambda x: torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], 2),
    "stack": lambda x: torch.stack([x, 1 - x]).mean(0),
    "complex": lambda x: torch.fft.ifft2(torch.fft.fft2(x) * 2).real,
    "constant": lambda x: torch.linspace(0.5, 2, CHANNELS).reshape(-1, 1, 1) * x,
}


def test_arithmetic_behind_a_batch_norm_is_followed() -> None:
    def net(function: Function) -> nn.Module:
        return with_statistics(grouped_already(Normed(function), PAIRS), TINY)

    together({name: net(function) for name, function in ARITHMETIC.items()}, right_from_weights)


def test_a_dense_net_is_corrected_behind_arithmetic() -> None:
    def check(net: nn.Module) -> None:
        assert 1e-3 < relative_error(convert_from_weights(net).model, net, noise(8, TINY, 9)) < 1.5

    names = ("2 * x", "x * x", "concatenation along the height")
    together({name: with_statistics(lively(Normed(ARITHMETIC[name])), TINY) for name in names}, check)
