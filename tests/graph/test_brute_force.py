"""The permutation classes of small nets against what trying all combinations of exchanges finds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.channels import Channels, channel_classes
from tests.graph.random_nets import CHANNELS, SIZE, RandomNet, Step

# Operations that leave every channel at its place, so that an exchange is of the same two numbers everywhere.
IN_PLACE = (
    "batch_norm", "group_norm", "layer_norm", "instance_norm", "relu", "prelu", "functional", "add",
    "subtract_method", "multiply", "scale", "own_scale", "shared", "twice", "tied", "transposed", "pool",
    "depthwise",
)  # fmt: skip
# Parameters that are used twice, and transposed convs, keep their order, though some would not have to.
CAUTIOUS = ("own_scale", "shared", "twice", "tied", "transposed")
STEM = "stem"
MOST_PLACES = 8

steps = st.lists(
    st.tuples(st.sampled_from(IN_PLACE), st.integers(0, 7), st.integers(0, 7), st.integers(0, 7)),
    min_size=1,
    max_size=3,
)

# The tensors that move together when two channels are exchanged, each with the dimension.
Slot = tuple[tuple[Tensor, int], ...]


def slots(net: RandomNet) -> list[Slot]:
    """All places where two channels can be exchanged, those of the stem first."""
    found: list[Slot] = []
    for module in (net.stem, *(module for module in net.modules() if module is not net.stem)):
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            outputs = 1 if isinstance(module, nn.ConvTranspose2d) else 0
            bias = () if module.bias is None else ((module.bias, 0),)
            found += [((module.weight, outputs), *bias), ((module.weight, 1 - outputs),)]
        elif isinstance(weight, Tensor):
            found.append(
                tuple((t, 0) for t in (*module.parameters(False), *module.buffers(False)) if t.dim())
            )
    scales = net.get_submodule("scales")
    found += [((scale, 0),) for scale in scales.parameters()]
    sizes = (CHANNELS, CHANNELS * SIZE * SIZE)  # the latter behind a flatten
    return [slot for slot in found if all(t.shape[dim] in sizes for t, dim in slot)]


def exchange(slot: Slot, pair: tuple[int, int]) -> None:
    a, b = pair
    order = torch.arange(CHANNELS)
    order[[a, b]] = order[[b, a]]
    for tensor, dim in slot:
        by_channel = tensor.unflatten(dim, (CHANNELS, -1)).index_select(dim, order)
        tensor.copy_(by_channel.flatten(dim, dim + 1))


def combinations(places: list[Slot]) -> Iterator[tuple[Slot, ...]]:
    for count in range(len(places) + 1):
        yield from itertools.combinations(places, count)


def merged(found: list[Slot]) -> list[Slot]:
    """Slots of one weight as one: layers that share it have biases of their own, which move with it."""
    places: dict[tuple[int, int], dict[tuple[int, int], tuple[Tensor, int]]] = {}
    for slot in found:
        parts = {(tensor.data_ptr(), dim): (tensor, dim) for tensor, dim in slot}
        places.setdefault(next(iter(parts)), {}).update(parts)
    return [tuple(parts.values()) for parts in places.values()]


def can_be_exchanged(net: RandomNet, pair: tuple[int, int], x: Tensor) -> bool | None:
    """Whether two outputs of the stem can be exchanged, with whatever else; None where nobody reads them."""
    before = net(x)
    places = merged(slots(net))
    assume(len(places) <= MOST_PLACES)
    stem, others = places[0], places[1:]
    assert stem[0][0] is net.stem.weight
    exchange(stem, pair)
    if equal(net(x), before):
        return None
    for chosen in combinations(others):
        for slot in chosen:
            exchange(slot, pair)
        same = equal(net(x), before)
        for slot in reversed(chosen):
            exchange(slot, pair)
        if same:
            return True
    return False


def equal(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-9 * other.abs().max() + 1e-12)


def said_to_be_exchangeable(channels: Channels, pair: tuple[int, int]) -> bool:
    """Whether a class holds both outputs of the stem."""
    for index, use in enumerate(channels.uses):
        if use.name == f"{STEM}.weight" and use.dim == 0:
            for found in channels.classes:
                places = found.places.get(index)
                if places is not None and set(pair) <= set(places.reshape(-1).tolist()):
                    return True
    return False


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=steps, end=st.sampled_from(["flatten", "pool", "conv"]), near=st.booleans())
@example(plan=[("tied", 0, 0, 0), ("add", 0, 1, 0)], end="flatten", near=False)
@torch.no_grad()
def test_two_channels_share_a_class_where_they_can_be_exchanged_and_nowhere_else(
    plan: list[Step], end: str, near: bool
) -> None:
    net = RandomNet(plan, end)
    pair = (0, 1) if near else (1, 6)  # in one group of the group norms, or in two
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    call = Call((torch.cat([x, x])[:2],))
    captured = capture(net, call).graph
    assert captured is not None
    said = said_to_be_exchangeable(channel_classes(captured, call), pair)
    found = can_be_exchanged(net, pair, x)
    assume(found is not None)
    assert found or not said
    if not any(name in CAUTIOUS for name, *_ in plan):
        assert said == found
