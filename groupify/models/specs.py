"""What a dense model is made of: JSON-able, so that a recipe can hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Preprocessing:
    """How pixel values in [0, 1] become the model's input: ``(x - mean) / std``, one value per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None
    """Shorter side before the centre crop, in pixels; None = no resize."""
    interpolation: str
    """``"bilinear"``, ``"bicubic"`` or ``"nearest"``."""


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build the dense architecture again; holds JSON values only."""

    name: str
    """A torchvision name, ``demo``, or ``package.module:factory``."""
    arguments: Mapping[str, Any]
    """Keyword arguments of the factory."""
    input_shape: tuple[int, ...]
    """(C, H, W)."""
    preprocessing: Preprocessing | None
    """None where the model does not say."""


@dataclass(frozen=True)
class WeightsOrigin:
    """Where the weights of a model come from."""

    source: str
    pretrained: bool
    """Whether the weights are known to be trained."""


@dataclass(frozen=True)
class Source:
    """A dense model in eval mode, how to build it again, and where its weights come from."""

    model: nn.Module
    spec: ModelSpec
    weights: WeightsOrigin
