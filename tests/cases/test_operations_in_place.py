"""Operations in place change what others read, as they do in the model, and nothing of the caller's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.onnx.parity import check_parity
from tests.cases.nets import assert_exact, grouped_already, noise
from tests.cases.small import (
    CHANNELS,
    PAIRS,
    TINY,
    Between,
    Function,
    assert_converts,
    convert_from_weights,
    convert_small,
    hidden,
    right_from_weights,
    stays,
    together,
)


class Branch(nn.Module):
    """Two convs beside a skip connection, which carries what the head of the branch makes of its input."""

    def __init__(self, head: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.head = head
        self.a = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.b = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(self.head(x))))
        return y + x


def add_one(x: Tensor) -> Tensor:
    x += 1
    return x


def scale_half(x: Tensor) -> Tensor:
    x[:, :, ::2] *= 2
    return x


def clear_border(x: Tensor) -> Tensor:
    x[..., 0] = 0
    return x


def through_a_view(x: Tensor) -> Tensor:
    x.view(x.shape[0], x.shape[1], -1)[..., :5].mul_(0.5)
    return x


def through_two_views(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 3)
    first.relu_()
    second.copy_(first)
    return x


def into_the_input(x: Tensor) -> Tensor:
    return torch.clamp(x, -0.5, 0.5, out=x)


HEADS: dict[str, Callable[[], Callable[[Tensor], Tensor] | nn.Module]] = {
    "ReLU": lambda: nn.ReLU(inplace=True),
    "Hardswish": lambda: nn.Hardswish(inplace=True),
    "add": lambda: add_one,
    "mul_": lambda: lambda x: x.mul_(2).add_(1),
    "clamp_": lambda: lambda x: x.clamp_(min=-0.1),
    "copy_": lambda: lambda x: x.copy_(x.abs()),
    "masked_fill_": lambda: lambda x: x.masked_fill_(x > 1, 1.0),
    "rows": lambda: scale_half,
    "border": lambda: clear_border,
    "view": lambda: through_a_view,
    "halves": lambda: through_two_views,
    "out": lambda: into_the_input,
}


class Branches(nn.Module):
    """A residual net whose branches begin in place."""

    def __init__(self, head: Callable[[], Callable[[Tensor], Tensor] | nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.one, self.two = Branch(head()), Branch(head())
        self.end = nn.Conv2d(CHANNELS, CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.end(self.two(self.one(self.stem(x)))).mean((2, 3))
        return result


def test_a_skip_connection_carries_what_the_branch_changes() -> None:
    together({name: grouped_already(Branches(head), PAIRS) for name, head in HEADS.items()}, assert_converts)


def test_branches_changed_in_place_are_right_without_images() -> None:
    names = ("ReLU", "add", "view")
    together({name: grouped_already(Branches(HEADS[name]), PAIRS) for name in names}, right_from_weights)


def first_half_relu(x: Tensor) -> Tensor:
    x[:, : CHANNELS // 2].relu_()
    return x


def one_channel_cleared(x: Tensor) -> Tensor:
    x[:, 3] = 0
    return x


def channels_swapped(x: Tensor) -> Tensor:
    x[:, [0, 1]] = x[:, [1, 0]].clone()
    return x


def channel_sums(x: Tensor) -> Tensor:
    x[:, 0].add_(x[:, 1])
    return x


UNEQUAL: dict[str, Function] = {
    "half": first_half_relu,
    "one cleared": one_channel_cleared,
    "two swapped": channels_swapped,
    "one added to another": channel_sums,
}


def test_channels_that_are_changed_apart_do_not_change_places() -> None:
    together({name: hidden(Between(change), second=False) for name, change in UNEQUAL.items()}, stays)


class Normalised(nn.Module):
    """Normalises its images in place, as some preprocessing does."""

    def __init__(self, channels: int, normalise: Function) -> None:
        super().__init__()
        self.body = Between(torch.relu)
        self.body.stem = nn.Conv2d(channels, CHANNELS, 3, padding=1)
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(self.normalise(x))
        return result


def first_channel_cleared(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def through_detach(x: Tensor) -> Tensor:
    x.detach().add_(1)
    return x


INPUTS: dict[str, Function] = {
    "sub_ and div_": lambda x: x.sub_(0.5).div_(0.25),
    "add_ and mul_": lambda x: x.add_(1).mul_(0.5),
    "clamp_": lambda x: x.clamp_(0, 1),
    "copy_": lambda x: x.copy_(x.flip(-1)),
    "assignment": first_channel_cleared,
    "view": lambda x: x.view(x.shape[0], -1).mul_(2).view_as(x),
    "detached": through_detach,
}


CHANNELS_OF = {"sub_ and div_": 1, "clamp_": 1, "assignment": 1, "detached": 1}  # the others: 3


@pytest.mark.parametrize("name", INPUTS)
def test_the_callers_images_are_used_once_and_stay_as_they_are(name: str) -> None:
    normalise, channels = INPUTS[name], CHANNELS_OF.get(name, 3)
    net = grouped_already(Normalised(channels, normalise), PAIRS)
    images = noise(32, (channels, 8, 8))
    before, example = images.clone(), noise(8, (channels, 8, 8), 9)
    conversion = convert_small(net, images)
    assert torch.equal(images, before)
    assert_exact(conversion.model, net, example)


def test_a_file_computes_the_same_of_images_that_are_normalised_in_place(tmp_path: Path) -> None:
    net = grouped_already(Normalised(1, INPUTS["sub_ and div_"]), PAIRS)
    images = noise(4, (1, 8, 8))
    before = images.clone()
    groupify.export(net, tmp_path / "m.onnx", input_shape=(1, 8, 8))
    check_parity(net, tmp_path / "m.onnx", input_shape=(1, 8, 8), images=images)
    assert torch.equal(images, before)


def test_accuracy_is_measured_on_images_that_stay_as_they_are() -> None:
    net = grouped_already(Normalised(3, INPUTS["sub_ and div_"]), PAIRS)
    images = noise(8, TINY)
    data = torch.utils.data.TensorDataset(images.clone(), torch.zeros(8, dtype=torch.long))
    first, second = (groupify.evaluate(net, data) for _ in range(2))
    assert first == second
    assert torch.equal(data.tensors[0], images)


def test_the_callers_model_stays_as_it_is() -> None:
    net = grouped_already(Branches(HEADS["ReLU"]), PAIRS)
    before = copy.deepcopy(net.state_dict())
    convert_small(net)
    convert_from_weights(net)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
