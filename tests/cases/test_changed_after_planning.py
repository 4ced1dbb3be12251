"""A model that changes between plan and conversion is converted as it is, not as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrizations

import groupify
from groupify.conversion.conversion import Conversion
from groupify.structures import Plan
from tests.cases.nets import lively, noise, planned

SHAPE = (3, 8, 8)
_captures: list[None] = []


@pytest.fixture(autouse=True)
def no_captures() -> Iterator[None]:
    _captures.clear()
    yield
    _captures.clear()


class Settings:
    def __init__(self) -> None:
        self.clip = 100.0


class Net(nn.Module):
    """Does what its attributes say; ``_captures`` grows when it is captured."""

    slope = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 5, 1)  # stays dense
        self.settings = Settings()
        self.scales = [torch.ones(16, 1, 1)]
        self.offset = torch.zeros(16, 1, 1)
        self.act: Callable[[Tensor], Tensor] = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor):
            _captures.append(None)
        x = self.act(self.stem(x)) * self.scales[0]
        x = self.act(self.second(self.act(self.first(x)))) + self.offset
        if self.settings.clip < 100:
            x = x.clamp(max=self.settings.clip)
        if self.slope:
            x = x + self.slope * x.flip(1)
        y: Tensor = self.last(x)
        return y


def made() -> tuple[Net, Plan]:
    net = lively(Net())
    return net, planned(net, SHAPE)


def converted(net: nn.Module, plan: Plan) -> Conversion:
    return groupify.convert(net, plan, noise(64, SHAPE))


def assert_as_with_a_fresh_plan(
    found: Conversion, net: nn.Module, plan: Plan, shape: tuple[int, ...] = SHAPE
) -> None:
    """Fail unless a conversion is that of a plan that carries no graph, as one from a file."""
    expected = groupify.convert(net, pickle.loads(pickle.dumps(plan)), noise(64, shape))
    images = noise(32, shape, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(found.model(images), expected.model(images))
    assert found.notes == expected.notes


def test_a_model_is_captured_once_for_plan_and_conversion() -> None:
    net, plan = made()
    assert len(_captures) == 1
    first = converted(net, plan)
    without_images = groupify.convert(net, plan)
    assert len(_captures) == 1
    fresh = copy.deepcopy(plan)
    assert fresh == plan
    anew = converted(net, fresh)
    assert len(_captures) == 2
    for name, value in anew.model.state_dict().items():
        torch.testing.assert_close(first.model.state_dict()[name], value)
    assert without_images.method.startswith("from the weights alone")


def test_the_mode_of_the_model_does_not_matter() -> None:
    net, plan = made()
    net.train()
    converted(net, plan)
    assert len(_captures) == 1


def _set_setting(net: Net) -> None:
    net.settings.clip = 0.5


def _set_item(net: Net) -> None:
    net.scales[0] = torch.full((16, 1, 1), 2.0)


def _set_class_attribute(net: Net) -> None:
    type(net).slope = 0.5


def _set_function(net: Net) -> None:
    net.act = torch.tanh


def _write_into_a_tensor(net: Net) -> None:
    net.offset.copy_(torch.arange(16.0).reshape(16, 1, 1))


def _behind_autograds_back(net: Net) -> None:
    net.scales[0].data.mul_(torch.linspace(0.5, 2, 16).reshape(16, 1, 1))


def _replace_a_layer(net: Net) -> None:
    net.last = lively(nn.Conv2d(16, 5, 3, padding=1), seed=7)


def _wrap_a_layer(net: Net) -> None:
    net.stem = nn.Sequential(net.stem, lively(nn.Conv2d(16, 16, 1), seed=7))  # type: ignore[assignment]


def _hook(net: Net) -> None:
    net.last.register_forward_pre_hook(lambda module, args: (args[0].roll(1, 1),))


def _rolled(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return nn.Conv2d.forward(layer, x.roll(1, 1))


def _forward_of_its_own(net: Net) -> None:
    net.last.forward = types.MethodType(_rolled, net.last)  # type: ignore[method-assign]


def _parametrise(net: Net) -> None:
    parametrizations.weight_norm(net.last)


def _train(net: Net) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    net(noise(8, SHAPE)).square().mean().backward()
    optimizer.step()


CHANGES = [
    _set_setting, _set_item, _set_class_attribute, _set_function, _write_into_a_tensor,
    _behind_autograds_back, _replace_a_layer, _wrap_a_layer, _hook, _forward_of_its_own, _parametrise, _train,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_what_is_changed(change: Callable[[Net], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "slope", Net.slope)  # put back at the end
    net, plan = made()
    change(net)
    found = converted(net, plan)
    assert len(_captures) == 2
    assert_as_with_a_fresh_plan(found, net, plan)


def test_other_weights_of_the_same_values() -> None:
    net, plan = made()
    net.second.weight = nn.Parameter(net.second.weight.detach().clone())
    converted(net, plan)
    assert len(_captures) == 2


def test_a_change_that_does_not_show_on_the_images() -> None:
    net, plan = made()
    net.settings.clip = 99.0  # above every activation
    found = converted(net, plan)
    assert len(_captures) == 2
    assert found.model.settings.clip == 99.0


def test_what_nobody_can_compare_is_captured_anew() -> None:
    net = lively(Net())
    net.table = np.ones(3)  # type: ignore[assignment]
    converted(net, planned(net, SHAPE))
    assert len(_captures) == 2


def test_another_model_of_the_same_class() -> None:
    _, plan = made()
    other = lively(Net(), seed=1)
    found = converted(other, plan)
    assert len(_captures) == 2
    assert_as_with_a_fresh_plan(found, other, plan)


def test_images_of_another_size() -> None:
    net, plan = made()
    found = groupify.convert(net, plan, noise(64, (3, 12, 12)))
    assert_as_with_a_fresh_plan(found, net, plan, (3, 12, 12))


def test_a_plan_does_not_keep_the_model_alive() -> None:
    net, plan = made()
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    assert plan.converted
