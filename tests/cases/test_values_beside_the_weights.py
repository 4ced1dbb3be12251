"""Values for each channel that live beside the weights follow a reordering of the channels, or forbid it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.models.specs import ModelSpec, WeightsOrigin
from tests.cases.nets import assert_exact, grouped_already, noise, relative_error
from tests.cases.small import (
    CHANNELS,
    PAIRS,
    TINY,
    Between,
    assert_converts,
    convert_small,
    follows,
    hidden,
    stays,
    together,
)

VALUES = [0.2 + 0.25 * index for index in range(CHANNELS)]


class Pair(NamedTuple):
    scale: Tensor
    shift: Tensor


@dataclass
class Constants:
    scale: Tensor


class Kept(nn.Module):
    """Scales each channel by what it keeps somewhere."""

    kept: Any
    values: Tensor  # the scales, of which ``kept`` is made

    def __init__(self, keep: Callable[[nn.Module, Tensor], None], read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        keep(self, torch.tensor(VALUES))
        self.read = read

    def scale(self) -> Tensor:
        return self.read(self.kept)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale().reshape(1, -1, 1, 1)


def attribute(make: Callable[[Tensor], Any], read: Callable[[Any], Tensor] = lambda kept: kept) -> Kept:
    return Kept(lambda module, values: setattr(module, "kept", make(values)), read)


def buffer(persistent: bool, make: Callable[[Tensor], Tensor] = lambda values: values) -> Kept:
    return Kept(
        lambda module, values: module.register_buffer("kept", make(values), persistent=persistent),
        lambda kept: kept,
    )


# Tensors of a module's own.
FOLLOWING: dict[str, Callable[[], Kept]] = {
    "parameter": lambda: attribute(nn.Parameter),
    "buffer": lambda: buffer(True),
    "non-persistent buffer": lambda: buffer(False),
    "non-persistent buffer of shape (1, C, 1, 1)": lambda: buffer(False, lambda v: v.reshape(1, -1, 1, 1)),
    "plain tensor": lambda: attribute(lambda values: values),
    "plain tensor of shape (C, 1, 1)": lambda: attribute(lambda values: values.reshape(-1, 1, 1)),
}
# Tensors further away.
ELSEWHERE: dict[str, Callable[[], Kept]] = {
    "list": lambda: attribute(lambda values: [values], lambda kept: kept[0]),
    "dictionary": lambda: attribute(lambda values: {"scale": values}, lambda kept: kept["scale"]),
    "named tuple": lambda: attribute(lambda values: Pair(values, values), lambda kept: kept.scale),
    "dataclass": lambda: attribute(Constants, lambda kept: kept.scale),
    "row of a table": lambda: attribute(lambda values: torch.stack([values, values]), lambda kept: kept[1]),
    "slice of a longer vector": lambda: attribute(
        lambda values: torch.cat([values, values]), lambda kept: kept[:CHANNELS]
    ),
    "every other of a longer vector": lambda: buffer(False, lambda v: v.repeat_interleave(2)[::2]),
    "expanded scalar": lambda: buffer(False, lambda values: values[:1].expand(CHANNELS)),
    "integers": lambda: buffer(False, lambda values: (values * 4).long()),
    "half precision": lambda: buffer(False, lambda values: values.half()),
    "array": lambda: attribute(lambda values: values.numpy(), torch.from_numpy),
    "numbers": lambda: attribute(lambda values: values.tolist(), torch.tensor),
    "function": lambda: attribute(lambda values: lambda: values * 2, lambda kept: kept()),
    "two of the same": lambda: attribute(lambda values: [values, values], lambda kept: kept[0] * kept[1]),
    "sum over channels": lambda: attribute(
        lambda values: values, lambda kept: (kept / kept.sum()).softmax(0)
    ),
}


def test_tensors_of_a_modules_own_follow() -> None:
    nets = {}
    for name, make in FOLLOWING.items():
        between = make()
        nets[name] = hidden(Between(between), [between.scale().detach()])
    before = copy.deepcopy(nets)
    together(nets, follows)
    for name, net in nets.items():  # and the caller's own are as they were
        assert relative_error(net, before[name], noise(8, TINY, 9)) == 0


def test_values_further_away_are_not_forgotten() -> None:
    together({name: hidden(Between(make()), second=False) for name, make in ELSEWHERE.items()}, stays)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_converted_model_is_loaded_with_the_order_of_its_buffers(tmp_path: Path, persistent: bool) -> None:
    between = buffer(persistent)
    net = hidden(Between(between), [between.scale()])
    conversion = convert_small(net)
    origin = WeightsOrigin("random", 0)
    recipe = groupify.Recipe(ModelSpec("nets:between", {}, TINY, None), origin, conversion.sites)
    groupify.save(tmp_path / "artefact", conversion.model, recipe)
    loaded = groupify.load(tmp_path / "artefact", model=net)
    assert_exact(loaded, conversion.model, noise(8, TINY, 9))


class Cached(nn.Module):
    """Adds an encoding of channels and positions, computed when the size of the maps is new."""

    def __init__(self, store: str) -> None:
        super().__init__()
        self.store = store
        self.cache: Any = {} if store == "dictionary" else None

    def encoding(self, x: Tensor) -> Tensor:
        channel = torch.arange(x.shape[1]).reshape(1, -1, 1, 1)
        return torch.sin(channel + torch.arange(x.shape[2] * x.shape[3]).reshape(1, 1, *x.shape[2:]) / 7)

    def forward(self, x: Tensor) -> Tensor:
        if self.store == "dictionary":
            if x.shape[2:] not in self.cache:
                self.cache[x.shape[2:]] = self.encoding(x)
            encoding: Tensor = self.cache[x.shape[2:]]
            return x + encoding
        if self.cache is None or self.cache.shape[2:] != x.shape[2:]:
            self.cache = self.encoding(x)
        result: Tensor = x + self.cache
        return result


@pytest.mark.parametrize("store", ["attribute", "dictionary"])
def test_a_cache_that_forward_fills_is_right_at_every_size(store: str) -> None:
    net = grouped_already(Between(Cached(store)), PAIRS)
    if store == "attribute":  # in the other the conversion finds it empty
        with torch.no_grad():
            net(noise(1, TINY))
    conversion = convert_small(net)
    for size in (8, 12):
        assert relative_error(conversion.model, net, noise(8, (3, size, size), 9)) < 1e-3


class Counting(nn.Module):
    """Counts its calls in a buffer, keeps a running mean in another, and a number of its own."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.number += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return x * 2


def test_buffers_that_forward_changes_are_the_callers_own() -> None:
    between = Counting()
    net = hidden(Between(between), second=False)
    before = copy.deepcopy(net.state_dict())
    model = convert_small(net).model
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert between.number == 0
    assert_exact(model, net, noise(8, TINY, 9))


class Chosen(nn.Module):
    """Scales by numbers that it takes out of its tensors with every call."""

    def __init__(self, number: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.weights, self.number = nn.Parameter(torch.tensor([0.5, 1.5])), number

    def forward(self, x: Tensor) -> Tensor:
        return x * self.number(self.weights)


NUMBERS: dict[str, Callable[[Tensor], float]] = {
    "item": lambda w: w[0].item(),
    "list": lambda w: w.tolist()[1],
    "float": lambda w: float(w.sum()),
    "array": lambda w: float(w.detach().numpy().max()),
}


@pytest.mark.parametrize("names", [("item", "list"), ("float", "array")])
def test_numbers_taken_out_of_parameters_are_not_frozen_wrongly(names: tuple[str, ...]) -> None:
    together(
        {name: grouped_already(Between(Chosen(NUMBERS[name])), PAIRS) for name in names}, assert_converts
    )
