from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from groupify.graph.channels import Channels, channel_classes
from groupify.graph.permute import apply_orders
from groupify.graph.trace import trace
from tests.graph.random_nets import SIZE, RandomNet, Step, steps

relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def traced(net: RandomNet) -> fx.GraphModule:
    found = trace(net)
    assert found.module is not None, found.problem
    return found.module


def random_orders(channels: Channels, seed: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.randperm(c.size, generator=generator) for i, c in enumerate(channels.classes)}


def images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)


ends = st.sampled_from(["flatten", "pool", "conv", "none"])


@relaxed
@given(plan=steps(), end=ends, seed=st.integers(0, 1000))
def test_any_order_of_any_class_leaves_the_output_unchanged(plan: list[Step], end: str, seed: int) -> None:
    net = RandomNet(plan, end, seed)
    x = images(seed)
    channels = channel_classes(traced(net), x[:1])
    permuted = apply_orders(net, channels, random_orders(channels, seed))
    with torch.no_grad():
        before, after = net(x), permuted(x)
    scale = float(before.abs().max()) + 1e-30
    assert float((before - after).abs().max()) <= 1e-9 * scale


@relaxed
@given(plan=steps(4), seed=st.integers(0, 1000), choice=st.integers(0, 100))
def test_forgetting_one_place_of_a_class_changes_the_output(plan: list[Step], seed: int, choice: int) -> None:
    net = RandomNet(plan, "conv", seed)
    x = images(seed)
    channels = channel_classes(traced(net), x[:1])
    places = [
        (index, use)
        for index, found in enumerate(channels.classes)
        for use in found.places
        if channels.uses[use].kind.startswith("conv") and len(found.places) > 1
    ]
    assume(places)
    index, forgotten = places[choice % len(places)]
    found = channels.classes[index]
    order = torch.arange(found.size).roll(1)

    def with_places(places: dict[int, Any]) -> nn.Module:
        classes = list(channels.classes)
        classes[index] = dataclasses.replace(found, places=places)
        changed = dataclasses.replace(channels, classes=tuple(classes))
        return apply_orders(net, changed, {index: order})

    alone = with_places({forgotten: found.places[forgotten]})
    without = with_places({use: where for use, where in found.places.items() if use != forgotten})
    with torch.no_grad():
        before, after, moved = net(x), without(x), alone(x)
    # Steps may compute what nobody reads, or channels that are all alike.
    least = 1e-9 * float(before.abs().max())
    assume(float((before - moved).abs().max()) > least)
    assert float((before - after).abs().max()) > least
