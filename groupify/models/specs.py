"""What a dense model is made of: JSON-able, so that a recipe can hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import nn

from groupify.documents import Text
from groupify.errors import SpecError, near_names
from groupify.models.preprocessing import MAX_SIDE, Preprocessing, Side

# Of each kind of weights, the type of its value.
_VALUES: dict[str, type] = {
    "torchvision": str,
    "demo": type(None),
    "checkpoint": str,
    "factory": type(None),
    "given": type(None),
    "random": int,
}
MAX_INPUT_VALUES = 2**27


def _few_values(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > MAX_INPUT_VALUES:
        raise ValueError(f"sides of 1 to {MAX_SIDE}, together at most {MAX_INPUT_VALUES}")
    return shape


def _consistent(spec: ModelSpec) -> ModelSpec:
    preprocessing = spec.preprocessing
    if preprocessing is None:
        return spec
    problem = preprocessing.problem()
    if problem is None and preprocessing.size != spec.input_shape[-2:]:
        problem = f"the size of the input shape, {spec.input_shape[-2:]}"
    if problem is not None:
        raise ValueError(f"a preprocessing with {problem}")
    return spec


Shape = Annotated[tuple[Side, ...], Field(min_length=1, max_length=5), AfterValidator(_few_values)]


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build the dense architecture again; holds JSON values only."""

    name: Text
    """A torchvision name, ``demo``, or ``package.module:factory``."""
    arguments: Mapping[str, Any]
    """Keyword arguments of the factory."""
    input_shape: Shape
    """(C, H, W); (C, L) or (C, D, H, W) for models of other dimensions."""
    preprocessing: Preprocessing | None
    """None where nothing says it."""


# A spec in a document.
CheckedSpec = Annotated[ModelSpec, AfterValidator(_consistent)]


@dataclass(frozen=True)
class WeightsOrigin:
    """Where the weights of a model come from.

    Attributes:
        kind: ``"torchvision"``, ``"demo"``, ``"checkpoint"``, ``"factory"`` (those that it gave its model),
            ``"given"`` (those of a model in memory, which only their owner has) or ``"random"``.
        value: the name of torchvision's weights, the checkpoint's file or name, or the seed of random
            weights; None else.

    Raises:
        SpecError: an unknown kind, or a value of another type than its kind's.
    """

    kind: str
    value: str | int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _VALUES:
            raise SpecError(
                f"unknown kind of weights {self.kind!r}, expected one of {', '.join(_VALUES)}"
                f"{near_names(self.kind, _VALUES)}"
            )
        # Not isinstance: a bool is no seed.
        if type(self.value) is not _VALUES[self.kind]:
            raise SpecError(
                f"the value of weights of kind {self.kind!r} is {self.value!r}, "
                f"expected a {_VALUES[self.kind].__name__}"
            )

    @property
    def pretrained(self) -> bool:
        """Whether the weights are taken to be trained: all but those that are said to be random."""
        return self.kind != "random"

    @property
    def sentence(self) -> str:
        """What to show to people."""
        if self.kind == "random":
            return f"random, seed {self.value}"
        if self.kind == "given":
            return "as given"
        return self.kind if self.value is None else f"{self.kind} {self.value}"


@dataclass(frozen=True)
class Source:
    """A dense model in eval mode, how to build it again, and where its weights come from.

    Attributes:
        model: on the CPU, unless it was moved.
        spec: how to build it.
        weights: where they come from.
        input_known: whether the model, its weights or the user say the input shape; it is a guess otherwise.
        preprocessing_from: what says the spec's preprocessing; None where nothing does.
    """

    model: nn.Module
    spec: ModelSpec
    weights: WeightsOrigin
    input_known: bool = True
    preprocessing_from: str | None = None

    def on(self, device: torch.device) -> Source:
        """Move the model itself to a device, and return the source with it there."""
        return replace(self, model=self.model.to(device))
