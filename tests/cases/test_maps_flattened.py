"""Views of maps work in the memory format that the model's author saw, whatever the working copy is in."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.nets import grouped_already, noise
from tests.cases.small import CHANNELS, PAIRS, Between, assert_converts, right_from_weights, together

SIZE = 4
Flatten = Callable[[nn.Module, Tensor], Tensor]


class Flattened(nn.Module):
    """Two convs and a classifier of the whole map."""

    def __init__(self, flatten: Flatten) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.c1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.position = nn.Parameter(torch.linspace(-1, 1, CHANNELS * SIZE * SIZE).reshape(1, -1, SIZE, SIZE))
        self.flatten, self.head = flatten, nn.Linear(CHANNELS * SIZE * SIZE, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.c1(torch.relu(self.stem(x)))), 2)
        result: Tensor = self.head(self.flatten(self, x))
        return result


def strided(net: nn.Module, x: Tensor) -> Tensor:
    length = CHANNELS * SIZE * SIZE
    return torch.as_strided(x, (x.shape[0], length), (length, 1))


def by_parts_of_its_layout(net: nn.Module, x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1) if x.is_contiguous() else x.flatten(1) * 0


def learned(net: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(net.position, Tensor)
    return x.flatten(1) + net.position.view(1, -1)


FLATTENED: dict[str, Flatten] = {
    "flatten": lambda net, x: x.flatten(1),
    "view(N, -1)": lambda net, x: x.view(x.size(0), -1),
    "view(-1, C)": lambda net, x: x.view(-1, CHANNELS * SIZE * SIZE),
    "view(N, C, -1)": lambda net, x: x.view(x.shape[0], CHANNELS, -1).transpose(1, 2).reshape(x.shape[0], -1),
    "view of two halves": lambda net, x: x.view(x.size(0), 2, -1, SIZE, SIZE).sum(2, True).expand(
        -1, -1, CHANNELS // 2, -1, -1
    ).reshape(x.shape[0], -1),
    "view_as": lambda net, x: x.view_as(torch.empty(x.shape[0], CHANNELS, SIZE * SIZE)).flatten(1),
    "squeezed view": lambda net, x: x.view(1, *x.shape).squeeze(0).view(x.shape[0], -1),
    "reshape of the transposed": lambda net, x: x.transpose(2, 3).reshape(x.shape[0], -1),
    "contiguous": lambda net, x: x.permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1),
    "as_strided": strided,
    "asked for its layout": by_parts_of_its_layout,
    "learned map": learned,
}  # fmt: skip


def flattened(names: Iterable[str] = FLATTENED) -> dict[str, nn.Module]:
    return {name: grouped_already(Flattened(FLATTENED[name]), PAIRS) for name in names}


def test_a_map_is_flattened_as_in_the_model() -> None:
    together(flattened(), assert_converts)


def test_a_map_is_flattened_by_the_length_of_its_batch() -> None:
    """For which torch exports that length only."""
    assert_converts(grouped_already(Flattened(lambda net, x: x.reshape(len(x), -1)), PAIRS))


def test_a_map_is_flattened_without_images() -> None:
    together(flattened(("flatten", "view(N, -1)", "learned map")), right_from_weights)


def test_a_view_that_only_a_model_in_channels_last_allows() -> None:
    def there_and_back(x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).view(-1, CHANNELS) * 2
        return rows.reshape(-1, 8, 8, CHANNELS).permute(0, 3, 1, 2)

    net = grouped_already(Between(there_and_back), PAIRS).to(memory_format=torch.channels_last)
    assert_converts(net)


@pytest.mark.parametrize("dims", [1, 3])
def test_a_view_of_other_dimensions(dims: int) -> None:
    conv: type[nn.Conv1d] | type[nn.Conv3d] = nn.Conv1d if dims == 1 else nn.Conv3d

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.c1 = (conv(c, CHANNELS, 3, padding=1) for c in (3, CHANNELS))
            self.head = nn.Linear(CHANNELS * 4**dims, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.c1(torch.relu(self.stem(x))))
            result: Tensor = self.head(x.view(x.size(0), -1))
            return result

    assert_converts(grouped_already(Net(), PAIRS), noise(64, (3, *[4] * dims)))
