"""What builders and other code set on a conv, and ask of it: its replacement has it too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import groupify
from groupify.conversion.surgery import restructure
from groupify.planning.candidates import candidates
from groupify.structures import GROUPED_POINTWISE, SiteRecipe, Structure
from tests.cases.nets import (
    SHAPE,
    Straight,
    assert_exact,
    converted,
    converted_names,
    grouped_already,
    planned,
    reason_of,
    refusal,
)


class FromList(nn.Module):
    """Layers that know where their input comes from, as in nets that are built from a configuration."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[Any] = [
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 1), nn.Conv2d(32, 8, 1),
        ]  # fmt: skip
        for index, layer in enumerate(layers):
            layer.index, layer.source = index, [4, 1] if index == 5 else -1
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for layer in self.layers:
            source: Any = layer.source
            if source != -1:
                x = torch.cat([kept[index] for index in source], 1)
            x = layer(x)
            kept.append(x)
        return x


class WithNorm(nn.Module):
    """The norm of each conv is a child of the conv; the block calls the two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c1, self.c2 = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))
        for conv in (self.stem, self.c1, self.c2):
            conv.norm = nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.stem, self.c1, self.c2):
            norm: Any = conv.norm
            x = torch.relu(norm(conv(x)))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class WithBuffer(Straight):
    """A buffer and a parameter that were registered on a conv, read by the block."""

    def __init__(self) -> None:
        super().__init__()
        self.c1.register_buffer("gain", torch.tensor(1.5))
        self.c1.register_buffer("shift", torch.tensor(0.25), persistent=False)
        self.c1.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        c1: Any = self.c1
        x = torch.relu(c1(torch.relu(self.stem(x))) * c1.gain * c1.factor + c1.shift)
        result: Tensor = self.head(torch.relu(self.rest[0](x)).mean((2, 3)))
        return result


class AskingSizes(Straight):
    """Pads by what the conv says of itself, and asks its class."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for conv in (self.c1, self.rest[0]):
            kernel: Any = conv.kernel_size
            x = F.pad(x, [kernel[0] // 2] * 4)[..., 1:-1, 1:-1]
            x = torch.relu(conv(x)) * (conv.out_channels / 16)  # type: ignore[operator]
        result: Tensor = self.head(x.mean((2, 3)))
        return result


@pytest.mark.parametrize("make", [FromList, WithNorm, WithBuffer, AskingSizes])
def test_attributes_children_and_buffers_stay(make: type[nn.Module]) -> None:
    net = grouped_already(make())
    conversion = converted(net)
    assert len(conversion.sites) >= 2
    assert_exact(conversion.model, net)
    keys = [key for key in net.state_dict() if not key.endswith("weight")]
    assert [key for key in conversion.model.state_dict() if not key.endswith("weight")] == keys


@pytest.mark.parametrize("make", [FromList, WithBuffer, AskingSizes])
def test_they_stay_on_a_pair_of_convs_too(make: type[nn.Module]) -> None:
    net = grouped_already(make())
    conversion = converted(net, plan=planned(net, structures=(GROUPED_POINTWISE,)))
    assert len(conversion.sites) >= 1
    assert_exact(conversion.model, net)


def test_a_conv_with_layers_of_its_own_becomes_no_pair() -> None:
    net = grouped_already(WithNorm())
    said = refusal(lambda: planned(net, structures=(GROUPED_POINTWISE,)))
    assert "has layers of its own (norm)" in said
    assert said.endswith("--structure grouped makes it a grouped conv alone")
    said = refusal(lambda: restructure(net, [SiteRecipe("c1", Structure(None, 4, 16))]))
    assert "layer 'c1' has layers of its own (norm)" in said


class ByClass(Straight):
    """Runs a ReLU behind what is a conv."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.c1, *self.rest):
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                x = torch.relu(x)
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def test_code_that_asks_for_the_class_of_a_layer_is_heard() -> None:
    net = grouped_already(ByClass())
    assert_exact(converted(net).model, net)
    said = refusal(lambda: converted(net, plan=planned(net, structures=(GROUPED_POINTWISE,))))
    assert "something else than its graph: its code asks a replaced conv for its class" in said


class AskingWeight(Straight):
    """Asks the weight of a conv for its type and device."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.c1.weight
        x = torch.relu(self.stem(x)).to(weight).to(weight.dtype)
        x = torch.relu(self.c1(x)) + weight.new_zeros(())
        result: Tensor = self.head(torch.relu(self.rest[0](x)).mean((2, 3)))
        return result


def test_a_weight_that_is_asked_for_its_type_alone_may_be_grouped() -> None:
    net = grouped_already(AskingWeight())
    plan = planned(net)
    assert converted_names(plan) == ["c1", "rest.0"]
    assert_exact(converted(net, plan=plan).model, net)
    pairs = planned(net, structures=(GROUPED_POINTWISE,))
    assert converted_names(pairs) == ["rest.0"]
    reason = "its weight is used outside of its own call, in the model itself"
    assert reason_of(pairs, "c1") == reason
    rules = groupify.Rules(min_group_width=1, structures=("grouped", GROUPED_POINTWISE))
    one_conv = {
        site[0].site.name: {option.site.structure.is_one_conv for option in site[1:]}
        for site in candidates(net, SHAPE, rules).sites
    }
    assert one_conv["c1"] == {True}
    assert one_conv["rest.0"] == {True, False}


class CallingForward(Straight):
    """Calls the forward of a conv, not the conv."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c1.forward(torch.relu(self.stem(x))))
        result: Tensor = self.head(torch.relu(self.rest[0](x)).mean((2, 3)))
        return result


def test_a_conv_that_is_not_called_as_a_module_is_left_alone() -> None:
    net = grouped_already(CallingForward())
    plan = planned(net)
    assert (reason_of(plan, "c1") or "").endswith("is used outside of its own call, in the model itself")
    assert_exact(converted(net, plan=plan).model, net)


class Listed(Straight):
    """Keeps its convs in a plain list beside, and runs those."""

    def __init__(self) -> None:
        super().__init__()
        self.order = [self.stem, self.c1, self.rest[0]]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = torch.relu(layer(x))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


@pytest.mark.parametrize(
    ("structure", "shuffle"),
    [(Structure(groups=4), False), (Structure(groups=4), True), (Structure(None, 4, 16), False),
     (Structure(8, 4, 12), False), (Structure(4), False)],
)  # fmt: skip
def test_whatever_refers_to_a_conv_refers_to_its_replacement(structure: Structure, shuffle: bool) -> None:
    net = Listed()
    again = restructure(net, [SiteRecipe("c1", structure, shuffle)])
    order: Any = again.order
    assert order[1] is again.get_submodule("c1")
    assert net.order[1] is net.c1
    assert again.get_submodule("c1") is not net.c1
    assert copy.deepcopy(again)(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
