"""Nets of eight channels, which convert in a moment, and what the cases ask of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.conversion.conversion import Conversion
from groupify.errors import GroupifyError
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.channels import Channels, channel_classes
from groupify.graph.forward import equal_outputs
from groupify.graph.permute import apply_orders
from tests.cases.nets import (
    TOLERANCE,
    converted,
    grouped_already,
    noise,
    planned,
    relative_error,
    reorder_between,
)  # fmt: skip

TINY = (3, 8, 8)
CHANNELS = 8
PAIRS = 2  # groups of four channels

# What waits for the graph from ``torch.export``.
GRAPH = pytest.mark.xfail(strict=False, reason="graph")

Function = Callable[[Tensor], Tensor]
Kind = TypeVar("Kind")


def situations(kinds: Mapping[str, Kind], *, graph: Iterable[str] = ()) -> list[Any]:
    """Parameters of a test, one for each kind; those in ``graph`` wait for ``torch.export``."""
    waiting = set(graph)
    assert waiting <= kinds.keys()
    return [
        pytest.param(kind, id=name, marks=GRAPH if name in waiting else ()) for name, kind in kinds.items()
    ]


class Between(nn.Module):
    """A stem and two convs with something in between, and a classifier; ReLUs behind the convs."""

    def __init__(self, between: Function | nn.Module, read: int = CHANNELS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.c1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.between = between
        self.c2 = nn.Conv2d(read, CHANNELS, 3, padding=1)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(torch.relu(self.c1(torch.relu(self.stem(x)))))
        result: Tensor = self.head(torch.relu(self.c2(x)).mean((2, 3)))
        return result


Net = TypeVar("Net", bound=nn.Module)


def hidden(net: Net, vectors: Iterable[Tensor] = (), *, second: bool = True, example: Any = None) -> Net:
    """Make a net of ``stem``, ``c1`` and ``c2`` grouped already, behind channels that are reordered.

    Args:
        net: the net.
        vectors: what is kept for each channel between the two convs.
        second: whether the channels between them are reordered, too; else only those in front of ``c1``.
        example: what it is called with, as for ``Call.of``; None = an image.
    """
    grouped_already(net, PAIRS)
    if example is None:
        example = noise(2, (next(net.parameters()).shape[1], 8, 8))
    before = _outputs(net, example)
    stem, first, last = (net.get_submodule(name) for name in ("stem", "c1", "c2"))
    assert isinstance(stem, nn.Conv2d)
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    reorder_between(stem, first, seed=1)
    if second:
        reorder_between(first, last, vectors, seed=2)
    assert equal_outputs(before, _outputs(net, example)), "the net itself minds the order"
    return net


def _outputs(net: nn.Module, example: Any) -> Any:
    with torch.no_grad():
        return Call.of(example).run(copy.deepcopy(net))


def convert_small(net: nn.Module, images: Tensor | None = None, **rules: Any) -> Conversion:
    """Convert a small net on 32 images."""
    images = noise(32, TINY) if images is None else images
    return converted(net, images, plan=planned(net, tuple(images.shape[1:]), PAIRS, **rules))


def assert_converts(net: nn.Module, images: Tensor | None = None, **rules: Any) -> Conversion:
    """Fail unless a net that is grouped already converts exactly."""
    images = noise(32, TINY) if images is None else images
    conversion = convert_small(net, images, **rules)
    fresh = torch.randn(images[:8].shape, generator=torch.Generator().manual_seed(9))
    assert_same(conversion.model, net, fresh)
    return conversion


def assert_same(
    model: nn.Module,
    reference: nn.Module,
    images: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Fail unless two models compute the same; of ``Several``, unless each of their nets does."""
    images = noise(8, TINY, 9) if images is None else images
    if isinstance(model, Several) and isinstance(reference, Several):
        for name, ours, wanted in zip(model.names, model.nets, reference.nets, strict=True):
            error = relative_error(ours, wanted, images)
            assert error < tolerance, f"{name}: relative error {error:.3g}"
    error = relative_error(model, reference, images)
    assert error < tolerance, f"relative error {error:.3g}"


class Several(nn.Module):
    """Nets side by side on the same images, since each capture takes its time."""

    def __init__(self, nets: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names, self.nets = list(nets), nn.ModuleList(nets.values())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets], 1)


def together(nets: Mapping[str, nn.Module], check: Callable[[nn.Module], object]) -> None:
    """Check nets as one; where that fails, name those that fail alone."""
    try:
        check(Several(nets).eval())
    except Exception as joint:
        alone = {name: _problem(net, check) for name, net in nets.items()}
        found = [f"{name}: {problem}" for name, problem in alone.items() if problem]
        raise AssertionError("; ".join(found) or "only together") from joint


def _problem(net: nn.Module, check: Callable[[nn.Module], object]) -> str | None:
    try:
        check(net)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def assert_free(net: nn.Module, *names: str) -> None:
    """Fail unless the outputs of these convs may change places; of ``Several``, in each of their nets."""
    prefixes = [f"nets.{number}." for number in range(len(net.nets))] if isinstance(net, Several) else [""]
    found = free_convs(net)
    fixed = [prefix + name for prefix in prefixes for name in names if prefix + name not in found]
    assert not fixed, f"these keep their order: {fixed}"


def follows(net: nn.Module) -> None:
    """Fail unless a net's channels may change places, and it converts exactly though they are hidden."""
    assert_free(net, "stem", "c1")
    assert_converts(net)


def stays(net: nn.Module) -> None:
    """Fail unless channels in front of ``c1`` may change places, and the net converts exactly."""
    assert_free(net, "stem")
    assert_converts(net)


def right_from_weights(net: nn.Module) -> None:
    """Fail unless a net that is grouped already converts exactly without images."""
    assert_same(convert_from_weights(net).model, net)


def free_convs(net: nn.Module, shape: tuple[int, ...] = TINY) -> set[str]:
    """Names of the convs whose outputs may change places; fails where that changes the model's outputs."""
    example = noise(2, shape)
    channels = classes_of(net, example)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        orders = {
            index: torch.randperm(found.size, generator=generator)
            for index, found in enumerate(channels.classes)
        }
        moved = apply_orders(net, channels, orders)
        with torch.no_grad():
            assert equal_outputs(net(example.clone()), moved(example.clone()))
    return {
        channels.uses[index].name.removesuffix(".weight")
        for found in channels.classes
        for index in found.places
        if channels.uses[index].dim == 0 and net.get_parameter(channels.uses[index].name).dim() > 2
    }


def classes_of(net: nn.Module, example: Tensor) -> Channels:
    """The permutation classes of a net."""
    captured = capture(net, Call((example,)))
    assert captured.graph is not None, captured.problem
    return channel_classes(captured.graph, Call((example,)))


def convert_from_weights(net: nn.Module, shape: tuple[int, ...] = TINY) -> Conversion:
    """Convert a small net without images."""
    return groupify.convert(net, planned(net, shape, PAIRS))


def right_or_refused(what: Callable[[], object], *words: str) -> bool:
    """Do it; whether it was done. A refusal must be groupify's own, in one line with these words in it."""
    try:
        what()
    except GroupifyError as refused:
        text = str(refused)
    else:
        return True
    assert "\n" not in text
    assert all(word in text for word in words), text
    return False
