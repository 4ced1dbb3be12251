"""What models of other people's libraries taught about capturing and labelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import groupify
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.channels import channel_classes
from groupify.graph.model_graph import ModelGraph, computes_the_same
from groupify.graph.permute import apply_orders


class TwoNames(nn.Module):
    """A conv that its model holds twice, as the nested skips of MONAI's DynUNet do."""

    def __init__(self, list_first: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(16, 32, 3)
        if list_first:
            self.nested = nn.ModuleList([conv])
        self.first, self.conv = nn.Conv2d(3, 16, 3), conv
        if not list_first:
            self.nested = nn.ModuleList([conv])

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.conv(self.first(images))
        return result


@pytest.mark.parametrize("list_first", [False, True])
def test_a_conv_with_two_names_is_converted_under_both(list_first: bool) -> None:
    torch.manual_seed(0)
    model, images = TwoNames(list_first).eval(), torch.randn(8, 3, 8, 8)
    found = capture(model, Call.of(images)).graph
    assert found is not None
    assert not found.pinned
    plan = groupify.plan(model, (3, 8, 8), groups=4, rules=groupify.Rules(min_group_width=1))
    assert len(plan.converted) == 1
    converted: Any = groupify.convert(model, plan, images).model
    assert converted.conv is converted.nested[0]
    assert converted.conv.groups == 4


class Reducing(nn.Module):
    """Two convs with a reduction between them."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.reduce = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), reduce

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        result: Tensor = self.second(features * self.reduce(features))
        return result


REDUCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # whether channels stay free
    "norm over space": (lambda x: x.norm(p=2, dim=(2, 3), keepdim=True), True),
    "norm over channels": (lambda x: x.norm(p=2, dim=1, keepdim=True), False),
    "norm over the second dimension, of order 1": (lambda x: x.norm(p=1, dim=2, keepdim=True), True),
    "vector norm over space": (lambda x: torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True), True),
    "norm of all": (lambda x: x.norm(), False),
    "variance of all": (lambda x: x.var(False), False),
    "variance over space": (lambda x: x.var((2, 3), keepdim=True), True),
    "deviation over space": (lambda x: x.std(dim=(2, 3), keepdim=True, correction=0), True),
    "largest over space": (lambda x: x.amax((2, 3), keepdim=True), True),
    "product over height": (lambda x: x.prod(2, keepdim=True), True),
    "logsumexp over space": (lambda x: x.logsumexp((2, 3), keepdim=True), True),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_read_by_the_name_of_their_dimension(name: str) -> None:
    reduce, free = REDUCTIONS[name]
    torch.manual_seed(0)
    model, call = Reducing(reduce).eval(), Call.of(torch.randn(2, 3, 6, 6))
    graph = capture(model, call).graph
    assert graph is not None
    assert computes_the_same(model, graph, call)
    channels = channel_classes(graph, call)
    sizes = [found.size for found in channels.classes]
    assert (8 in sizes) == free
    orders = {index: torch.randperm(size) for index, size in enumerate(sizes)}
    with torch.no_grad():
        expected, permuted = call.run(model), call.run(apply_orders(model, channels, orders))
    torch.testing.assert_close(permuted, expected)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def graph_of(net: nn.Module) -> ModelGraph:
    found = capture(net.eval(), Call((images(),)))
    assert found.graph is not None, found.problem
    return found.graph


class Remembering(nn.Module):
    """Keeps what it made of the first images that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 4, 3), [torch.zeros(0)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if not self.first[0].numel():
            self.first = [x.detach()]
        return x + self.first[0]


def test_what_is_right_for_the_inputs_of_an_earlier_run_alone_is_not_the_model() -> None:
    net = Remembering()
    net.eval()(images())
    call = Call((images(),))
    assert torch.equal(net(images()), graph_of(net).run(call)[0])
    twin = Remembering()
    twin.load_state_dict(net.state_dict())
    assert not computes_the_same(twin, graph_of(net), call)


class InPlace(nn.Module):
    """Writes in place where another reader, or a view, sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        half, doubled = x[:, :2], x * 2
        half.relu_()
        F.relu_(doubled).add_(x)
        return x.sub_(0.5) + doubled


def test_writing_in_place_is_seen_wherever_it_shows() -> None:
    net = InPlace().eval()
    assert computes_the_same(net, graph_of(net), Call((images(),)))


class TensorsOfItsOwn(nn.Module):
    """Makes, copies and detaches tensors, and writes to them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        factors = torch.tensor([0.5, 1.0, 1.5, 2.0]).reshape(-1, 1, 1)
        kept = x.clone().mul_(factors)
        detached = x.detach_()
        before = detached + 1
        detached.mul_(2)
        return x + before + kept.add_(torch.tensor(0.5).add_(1))


def test_tensors_that_forward_makes_may_be_written_to() -> None:
    net = TensorsOfItsOwn().eval()
    assert computes_the_same(net, graph_of(net), Call((images(),)))


def test_the_model_and_its_inputs_stay_as_they_are() -> None:
    net = Remembering().eval()
    x = images()
    before = x.clone()
    assert capture(net, Call((x,))).graph is not None
    assert torch.equal(x, before)
    assert type(net.first[0]) is Tensor
    assert not net.first[0].numel()


def test_a_size_that_the_code_asks_for_is_fixed() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x), -1)

    graph = graph_of(Flat())
    assert graph.batch == 2
    assert not graph.accepts(Call((images(3),)))


def test_autocast_is_left_out() -> None:
    class Reduced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
                x = self.conv(x)
            return x.float()

    net = Reduced().eval()
    graph = graph_of(net)
    assert graph.reduced_precision
    assert graph.calls == {"conv": 1}
    assert computes_the_same(net, graph, Call((images(),)))


class Reshaping(nn.Module):
    """Two convs with a reshape to another tensor's shape between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        result: Tensor = self.second(features.flatten(2).reshape_as(features).flatten(2).view_as(features))
        return result


def test_channels_go_through_a_reshape_to_the_shape_of_another_tensor() -> None:
    call = Call.of(torch.randn(2, 3, 6, 6))
    graph = capture(Reshaping().eval(), call).graph
    assert graph is not None
    channels = channel_classes(graph, call)
    assert not channels.pinned_by
    assert [found.size for found in channels.classes] == [8]
