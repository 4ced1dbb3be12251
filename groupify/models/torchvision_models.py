"""What torchvision says about its models: names, weights, input, and the arguments that weights imply."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models import get_model_builder, get_model_weights, list_models

from groupify.errors import SpecError, near_names
from groupify.models.preprocessing import Preprocessing

_DEFAULT_INPUT_SHAPE = (3, 224, 224)
_DEFAULT_FRAMES = 16
# DenseNet's published weights have keys from before module names could not hold dots.
_OLD_DENSENET_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")
# Behind a prefix too, as in a checkpoint of Lightning.
_AUXILIARY_HEADS = re.compile(r"(^|\.)(AuxLogits|aux1|aux2)\.")
_AUXILIARY_CLASSIFIER = re.compile(r"(^|\.)aux_classifier\.")


def known_name(name: str) -> str:
    """Return the lower-case name of a torchvision model, or raise a SpecError with near names."""
    known = list_models()
    if name.lower() not in known:
        raise SpecError(
            f"unknown model {name!r}: expected a torchvision name, 'demo' or package.module:factory"
            f"{near_names(name.lower(), [*known, 'demo'])}"
        )
    return name.lower()


def choose_weights(name: str, weights: str) -> Any:
    """Return a member of the model's weights enum, None for ``none``, or raise a SpecError."""
    if weights == "none":
        return None
    members: dict[str, Any] = dict(get_model_weights(name).__members__)
    key = "DEFAULT" if weights == "auto" else weights.rpartition(".")[2]
    if key not in members:
        raise SpecError(
            f"unknown weights {weights!r} of {name}: expected auto, none, {', '.join(members)}"
            f"{near_names(key, members)}"
        )
    return members[key]


def input_of(name: str, weights: Any) -> tuple[tuple[int, ...], Preprocessing | None]:
    """Return the input shape and the preprocessing that the (default) weights were trained for."""
    preset = (weights or get_model_weights(name).DEFAULT).transforms()
    crop = list(getattr(preset, "crop_size", ()))
    shape = (3, *(crop * 2)) if crop else _DEFAULT_INPUT_SHAPE
    if type(preset).__name__ == "VideoClassification":
        shape = (3, _DEFAULT_FRAMES, *crop)
    if not hasattr(preset, "mean"):
        return shape, None
    resize = preset.resize_size
    if isinstance(resize, list | tuple):
        resize = None if resize[0] is None else min(resize)
    return shape, Preprocessing(
        size=(shape[-2], shape[-1]),
        resize=resize,
        crop="center",
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def implied_arguments(name: str, weights: Any, state: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Return the arguments that torchvision's builders set where they are given weights."""
    if state is None:
        return {}
    if name.endswith(("inception_v3", "googlenet")):
        heads = any(map(_AUXILIARY_HEADS.search, state))
        if weights is None:
            return {"aux_logits": heads}
        # torchvision keeps inception's auxiliary head, and drops googlenet's, which is not trained.
        return {"transform_input": True, "aux_logits": heads and name.endswith("inception_v3")}
    if name.startswith(("fcn", "deeplab")):
        return {"aux_loss": any(map(_AUXILIARY_CLASSIFIER.search, state))}
    if name.startswith("vit_") and weights is not None and weights.meta["min_size"][0] != 224:
        return {"image_size": weights.meta["min_size"][0]}
    return {}


def without_dropped_heads(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return ``state`` without auxiliary heads, if the arguments drop them from the model."""
    if arguments.get("aux_logits", True):
        return state
    return {key: value for key, value in state.items() if not _AUXILIARY_HEADS.search(key)}


def modern_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with the keys that torchvision's models have today."""
    return {_OLD_DENSENET_KEY.sub(r"\1\2", key): value for key, value in state.items()}


def builder(name: str) -> Callable[..., nn.Module]:
    """Return torchvision's function that builds the model ``name``."""
    function: Callable[..., nn.Module] = get_model_builder(name)
    return function


def builder_arguments(name: str, arguments: Mapping[str, Any], initialise: bool) -> dict[str, Any]:
    """Return ``arguments`` with what keeps the builder from fetching weights or warning."""
    complete = {**arguments, "weights": None}
    if "weights_backbone" in inspect.signature(builder(name)).parameters:
        complete["weights_backbone"] = None
    if name.endswith(("inception_v3", "googlenet")):
        # Takes seconds, so only where the weights stay random; a FutureWarning where it is left open.
        complete.setdefault("init_weights", initialise)
    return complete
