"""How an image becomes a model's input: a value, what says it, and what the user says otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from groupify.documents import OneOf
from groupify.errors import SpecError

MAX_SIDE = 65_536
CROPS = ("center", "none")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Channels = Field(min_length=1, max_length=MAX_SIDE)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resized, cropped, then ``(x - mean) / std`` of pixels in [0, 1]."""

    size: tuple[Side, Side]
    """(H, W) of the input, in pixels."""
    resize: Side | None
    """Shorter side before the crop, in pixels; None = the image's own, or whatever fills the crop."""
    crop: Annotated[str, OneOf(*CROPS)]
    """``"center"``: ``size`` is cut out of the middle. ``"none"``: the whole image is resized to ``size``."""
    mean: Annotated[tuple[float, ...], Channels]
    """One for each channel."""
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Channels]
    """One for each channel."""
    interpolation: Annotated[str, OneOf(*INTERPOLATIONS)]

    def __str__(self) -> str:
        height, width = self.size
        if self.crop == "none":
            way = f"the whole image to {height}×{width}"
        else:
            way = f"the middle {height}×{width}"
            if self.resize is not None:
                way = f"the shorter side to {self.resize}, then {way}"
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{way}, {self.interpolation}; mean ({mean}), std ({std})"

    def problem(self) -> str | None:
        """Return what contradicts itself, or None."""
        if len(self.mean) != len(self.std):
            return "as many means as standard deviations"
        if self.crop == "none" and self.resize is not None:
            return "no resize where nothing is cropped: the whole image gets the model's size"
        if self.resize is not None and self.resize < max(self.size):
            return f"a resize of at least {max(self.size)}, for a crop of {self.size[0]}×{self.size[1]}"
        return None

    def of_size(self, size: tuple[int, ...]) -> Preprocessing:
        """Return the same for another size (H, W): the crop keeps its share of the image."""
        height, width = size
        resize = self.resize
        if resize is not None and size != self.size:
            resize = max(round(resize * min(size) / min(self.size)), *size)
        return replace(self, size=(height, width), resize=resize)


@dataclass(frozen=True)
class PreprocessingOptions:
    """What the user says about the preprocessing; None = nothing.

    Example:
        >>> spec = groupify.load_model("demo").spec
        >>> said = groupify.PreprocessingOptions(mean=(0.5,), std=(0.25,))
        >>> print(groupify.load_data("demo", spec, preprocessing=said).preprocessing)
        the whole image to 28×28, bilinear; mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)

    Attributes:
        mean, std: one value for each channel, or one for all; for pixels in [0, 1].
        resize: shorter side before the crop, in pixels; 0 = the image's own.
        crop: one of ``CROPS``.
        interpolation: one of ``INTERPOLATIONS``.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | None = None
    crop: str | None = None
    interpolation: str | None = None

    @property
    def given(self) -> bool:
        """Whether anything is said."""
        return any(getattr(self, field.name) is not None for field in fields(self))

    @classmethod
    def of(cls, preprocessing: Preprocessing | None) -> PreprocessingOptions:
        """Return what says all of a preprocessing."""
        if preprocessing is None:
            return cls()
        known = preprocessing
        resize = None if known.crop == "none" else known.resize or 0
        return cls(known.mean, known.std, resize, known.crop, known.interpolation)

    def then(self, later: PreprocessingOptions) -> PreprocessingOptions:
        """Return these options with what ``later`` says in their place."""
        values = {field.name: getattr(later, field.name) for field in fields(later)}
        said = {name: value for name, value in values.items() if value is not None}
        if later.crop == "none":
            said.setdefault("resize", None)
        elif later.resize is not None:
            said.setdefault("crop", "center")
        return replace(self, **said)

    def over(
        self, base: Preprocessing | None, input_shape: tuple[int, ...], owner: str
    ) -> Preprocessing | None:
        """Return ``base`` with what is said here in its place.

        Args:
            base: what is known without the user; None = nothing.
            input_shape: (C, H, W) of the model.
            owner: the model, for messages.

        Raises:
            SpecError: values that are wrong, contradict each other, or leave mean or std unsaid.
        """
        if not self.given:
            return base
        if len(input_shape) != 3:
            raise SpecError(
                f"--mean, --std, --resize and --crop are for images, and an input of {owner} has the shape "
                f"{input_shape}: leave them out"
            )
        channels, height, width = input_shape
        mean = self.mean or (None if base is None else base.mean)
        std = self.std or (None if base is None else base.std)
        if mean is None or std is None:
            raise SpecError(f"{unknown(owner)}: give both, --mean and --std")
        if max(mean) > 1:
            raise SpecError(
                f"--mean {max(mean):g}: expected values for pixels in [0, 1]; divide those of pixels up to "
                "255 by 255, and --std likewise"
            )
        crop, resize = self._cut(base, max(height, width))
        found = Preprocessing(
            size=(height, width),
            resize=resize,
            crop=crop,
            mean=_spread("--mean", mean, channels),
            std=_spread("--std", std, channels),
            interpolation=self.interpolation or (base.interpolation if base else INTERPOLATIONS[0]),
        )
        problem = found.problem()
        if problem is None and min(found.std) <= 0:
            problem = "standard deviations above 0"
        if problem is not None:
            raise SpecError(f"preprocessing of {owner} ({found}): expected {problem}")
        return found

    def _cut(self, base: Preprocessing | None, side: int) -> tuple[str, int | None]:
        """Return crop and resize."""
        crop = self.crop
        if crop is None:
            crop = base.crop if base is not None and self.resize is None else CROPS[0]
        if crop == "none" or self.resize is not None:
            return crop, self.resize or None
        return crop, base.resize if base is not None and base.crop == crop else side


def unknown(owner: str) -> str:
    """Return that nothing says how an image becomes an input of ``owner``, and what would."""
    return (
        f"nothing says how images become inputs of {owner}: give --mean and --std as in its training (in "
        "Python PreprocessingOptions), for pixels in [0, 1]; 0 and 1 take them as they are, ImageNet's are "
        "0.485,0.456,0.406 and 0.229,0.224,0.225"
    )


def _spread(option: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise SpecError(
            f"{option} has {len(values)} values, the model {channels} channels: give as many, or one"
        )
    return values * channels if len(values) == 1 else values


def of_timm(model: nn.Module) -> tuple[tuple[int, ...], Preprocessing | None] | None:
    """Return the input shape and the preprocessing in the ``pretrained_cfg`` of a model of timm.

    Returns:
        None where there is none; no preprocessing where it cannot be told as one, such as one with a border.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        return None
    try:
        channels, height, width = (int(side) for side in config["input_size"])
    except (KeyError, TypeError, ValueError):
        return None
    if min(channels, height, width) < 1:
        return None
    try:
        return (channels, height, width), _of_config(config, (height, width))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return (channels, height, width), None


def _of_config(config: Mapping[str, Any], size: tuple[int, int]) -> Preprocessing | None:
    share = float(config.get("crop_pct") or 1)
    squashed = config.get("crop_mode") == "squash" and share == 1
    if config.get("crop_mode", "center") != "center" and not squashed:
        return None
    found = Preprocessing(
        size=size,
        resize=None if squashed else math.floor(max(size) / share),
        crop="none" if squashed else "center",
        mean=tuple(float(value) for value in config["mean"]),
        std=tuple(float(value) for value in config["std"]),
        interpolation=str(config["interpolation"]),
    )
    known = found.interpolation in INTERPOLATIONS and min(found.std) > 0
    return found if known and found.problem() is None else None
