from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.channels import Channels, channel_classes
from groupify.graph.model_graph import ModelGraph
from groupify.graph.permute import apply_orders
from tests.graph.random_nets import SIZE, RandomNet, Step, steps

relaxed = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def captured(net: RandomNet) -> ModelGraph:
    found = capture(net, Call((images(0),)))
    assume(found.graph is not None or "read_value" not in [step[0] for step in net.plan])
    assert found.graph is not None, found.problem
    return found.graph


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
    channels = channel_classes(captured(net), Call((x,)))
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
    channels = channel_classes(captured(net), Call((x,)))
    places = [
        (index, use)
        for index, found in enumerate(channels.classes)
        for use in found.places
        if channels.uses[use].dim is not None and len(found.places) > 1
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
