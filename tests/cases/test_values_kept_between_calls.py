"""Models that keep activations, or anything else, on their modules: converted or refused, and left usable."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases.nets import grouped_already, noise
from tests.cases.small import (
    CHANNELS,
    PAIRS,
    TINY,
    Between,
    assert_converts,
    assert_same,
    convert_from_weights,
    convert_small,
    right_or_refused,
    situations,
    together,
)

Keep = Callable[[Any, Tensor], None]


class Keeping(nn.Module):
    """Keeps what it is given, in its own way."""

    def __init__(self, keep: Keep) -> None:
        super().__init__()
        self.feature: Any = None
        self.log: list[Any] = []
        self.table: dict[str, Any] = {}
        self.calls = 0
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        self.keep(self, x)
        return x * 1.5


def in_attribute(module: Any, x: Tensor) -> None:
    module.feature = x


def in_list(module: Any, x: Tensor) -> None:
    module.log.append(x.mean())


def in_dictionary(module: Any, x: Tensor) -> None:
    module.table["feature"] = (x, x.shape)


def as_number(module: Any, x: Tensor) -> None:
    module.calls += 1
    module.feature = (module.calls, x.shape[0])


KEPT: dict[str, Keep] = {
    "attribute": in_attribute,
    "list": in_list,
    "dictionary": in_dictionary,
    "number": as_number,
}


def net_of(keep: Keep) -> Between:
    return grouped_already(Between(Keeping(keep)), PAIRS)


def test_models_that_keep_activations_convert_and_can_be_pickled() -> None:
    def check(net: nn.Module) -> None:
        pickle.dumps(net)
        conversion = assert_converts(net)
        pickle.dumps(net)
        pickle.dumps(conversion.model)
        for module in net.modules():
            if isinstance(module, Keeping):
                for kept in (module.feature, *module.log, *module.table.values()):
                    first = kept[0] if isinstance(kept, tuple) else kept
                    assert first is None or type(first) in (Tensor, int), type(first)

    together({name: net_of(keep) for name, keep in KEPT.items()}, check)


def test_models_convert_behind_a_training_step() -> None:
    """They hold tensors with a history, which cannot be copied."""

    def check(net: nn.Module) -> None:
        net.train()(noise(4, TINY)).sum().backward()
        net.eval()
        conversion = convert_small(net)
        assert_same(conversion.model, net)
        assert all(parameter.grad is None for parameter in conversion.model.parameters())
        assert_same(convert_from_weights(net).model, net)

    together({name: net_of(keep) for name, keep in KEPT.items()}, check)


class Unpicklable(nn.Module):
    """Holds what cannot be copied."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5


HELD: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "generator": lambda: (number for number in range(3)),
    "open file": lambda: Path(__file__).open(),  # noqa: SIM115
}


@pytest.mark.parametrize("make", situations(HELD))
def test_a_model_that_cannot_be_copied_is_converted_or_refused(make: Callable[[], Any]) -> None:
    what = make()
    net = grouped_already(Between(Unpicklable(what)), PAIRS)
    try:
        right_or_refused(lambda: assert_converts(net), "copied")
    finally:
        if hasattr(what, "close"):
            what.close()


class Remembering(nn.Module):
    """Adds what it was given in the call before."""

    last: Tensor

    def __init__(self, register: bool) -> None:
        super().__init__()
        if register:
            self.register_buffer("last", torch.zeros(1, CHANNELS, 8, 8))
        else:
            self.last = torch.zeros(1, CHANNELS, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result = x + 0.5 * self.last
        self.last = x.detach().mean(0, keepdim=True)
        return result


@pytest.mark.parametrize("register", [False, True], ids=["attribute", "buffer"])
def test_a_model_that_remembers_its_last_images_is_converted_from_where_it_stands(register: bool) -> None:
    net = grouped_already(Between(Remembering(register)), PAIRS)
    before = copy.deepcopy(net)
    model = convert_small(net).model
    # Both go on from the same memory, call by call.
    with torch.no_grad():
        for seed in range(3):
            images = noise(4, TINY, seed)
            ours, wanted = model(images), before(images)
            assert float((ours - wanted).norm() / wanted.norm()) < 1e-3


def test_a_module_that_knows_its_parent_converts() -> None:
    net = grouped_already(Between(Unpicklable(None)), PAIRS)
    assert isinstance(net.between, Unpicklable)
    net.between.what = [net]  # in a list, so that it is no child
    model = assert_converts(net).model
    assert model.get_submodule("between").what[0] is model  # type: ignore[index]


def test_hooks_of_a_module_that_only_watch_do_not_disturb() -> None:
    seen: list[Tensor] = []
    net = net_of(as_number)
    net.c1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_converts(net)
    before = len(seen)
    with torch.no_grad():
        net(noise(1, TINY))
    assert len(seen) == before + 1
    assert type(seen[-1]) is Tensor
