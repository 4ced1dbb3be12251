"""Building models and giving them their weights."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groupify.errors import (
    CheckpointError,
    ConversionError,
    GroupifyError,
    GroupifyWarning,
    SpecError,
    expect_type,
    near_names,
)
from groupify.models import demo, torchvision_models
from groupify.models.checkpoints import of_model, read_checkpoint
from groupify.models.preprocessing import Preprocessing, of_timm
from groupify.models.specs import ModelSpec, Source, WeightsOrigin
from groupify.models.weights import fetch_torchvision_state, load_state, one_line
from groupify.models.wrappers import unwrapped

_DEFAULT_INPUT_SHAPE = (3, 224, 224)


def load_model(
    name: str,
    *,
    weights: str = "auto",
    checkpoint: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Source:
    """Return a dense model with its weights.

    Args:
        name: a torchvision name, ``demo``, or ``package.module:factory``.
        weights: ``auto`` takes torchvision's default weights, or warns and goes on with random ones
            where they cannot be had; ``DEFAULT`` or a name of torchvision is strict; ``none`` is random.
            A factory's model keeps the weights that the factory gave it; ``none`` says that these are random.
        checkpoint: a weight file, in place of ``weights``.
        arguments: keyword arguments of the factory; JSON values.
        input_shape: (C, H, W), or (C, L) or (C, D, H, W) for models of other dimensions; None = the size
            that the weights were trained for, as torchvision and timm say it, or a guess: (3, 224, 224).
        seed: seed of random weights. The global random state is left as it is.

    Raises:
        SpecError: an unknown name, weights or argument, a factory that cannot be imported or fails,
            or weights that cannot be had.
        CheckpointError: a checkpoint that is missing, corrupt or belongs to another model.

    Warns:
        GroupifyWarning: ``auto`` went on with random weights.
    """
    expect_type(name, str, "name", "a torchvision name, demo, or package.module:factory")
    expect_type(weights, str, "weights", "auto, none, or a name of torchvision's weights")
    arguments = _checked_arguments(name, arguments or {})
    if input_shape is not None:
        input_shape = _checked_shape(input_shape)
    if ":" in name or name == "demo":
        return _load_own(name, weights, checkpoint, arguments, input_shape, seed)
    source, problem = _load_torchvision(name, weights, checkpoint, arguments, input_shape, seed)
    if problem is not None and weights != "auto":
        raise SpecError(f"weights {weights!r} of {name}: {problem}")
    if problem is not None:
        warnings.warn(
            f"{name} goes on with RANDOM weights (seed {seed}), so its accuracy means nothing: {problem}; "
            "give a checkpoint, or weights 'none' if random is what you want",
            GroupifyWarning,
            stacklevel=2,
        )
    return source


def build_model(spec: ModelSpec, *, trust: bool = False) -> nn.Module:
    """Return the architecture of a spec in eval mode; its weights are to be loaded.

    Args:
        spec: as :func:`load_model` made it.
        trust: whether code may be imported; a ``package.module:factory`` is refused without.

    Raises:
        SpecError: an unknown name or argument, a factory that fails, or one that is not trusted.
    """
    if ":" in spec.name and not trust:
        raise SpecError(
            f"the model {spec.name!r} is made by code of its own, which is not run unasked: "
            f"pass trust=True (--model {spec.name}, or --trust) if you trust it, or give the model itself"
        )
    if ":" not in spec.name and spec.name != "demo":
        torchvision_models.known_name(spec.name)
    return _build(spec, seed=0, initialise=False)


def import_attribute(spec: str, kind: str) -> Callable[..., Any]:
    """Return the callable of ``package.module:name``; ``kind`` says in messages what it is for.

    Raises:
        SpecError: the module cannot be imported, or has no such callable.
    """
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise SpecError(f"{kind} {spec!r}: expected package.module:name")
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module can raise anything
        reason = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise SpecError(
            f"{kind} {spec!r}: cannot import {module_name!r} ({reason}{one_line(error)}): "
            "run from its folder, or add that to PYTHONPATH"
        ) from error
    for part in path.split("."):
        if not hasattr(value, part):
            raise SpecError(f"{kind} {spec!r}: no {part!r} in {module_name}{near_names(part, dir(value))}")
        value = getattr(value, part)
    if not callable(value):
        raise SpecError(f"{kind} {spec!r} is a {type(value).__name__}: expected a function or class")
    factory: Callable[..., Any] = value
    return factory


def _load_own(
    name: str,
    weights: str,
    checkpoint: str | Path | None,
    arguments: dict[str, Any],
    input_shape: tuple[int, ...] | None,
    seed: int,
) -> Source:
    """Load the demo, or the model of a factory."""
    known = ("auto", "none") if ":" in name else ("auto", "none", "DEFAULT")
    if weights not in known:
        raise SpecError(
            f"unknown weights {weights!r} of {name}: expected {' or '.join(known)}, or a checkpoint"
            f"{near_names(weights, known)}"
        )
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    model = _build(ModelSpec(name, arguments, input_shape or _DEFAULT_INPUT_SHAPE, None), seed)
    if state is not None:
        load_state(model, of_model(model, state, str(checkpoint)), str(checkpoint))
        origin = WeightsOrigin("checkpoint", str(checkpoint))
    elif weights == "none":
        origin = WeightsOrigin("random", seed)
    elif name == "demo":
        load_state(model, read_checkpoint(demo.MODEL_FILE), "the demo's weight file")
        origin = WeightsOrigin("demo")
    else:
        origin = WeightsOrigin("factory")
    return _with_input(name, model, arguments, origin, input_shape)


def _with_input(
    name: str,
    model: nn.Module,
    arguments: dict[str, Any],
    origin: WeightsOrigin,
    input_shape: tuple[int, ...] | None,
) -> Source:
    """Add the input shape and the preprocessing, as far as anything says them."""
    said_by: str | None = None
    known: tuple[tuple[int, ...], Preprocessing | None] | None = None
    if name == "demo" or name.startswith("groupify.models.demo:"):
        said_by, known = "the demo", (demo.INPUT_SHAPE, demo.PREPROCESSING)
    elif (timm := of_timm(model)) is not None:
        said_by, known = "timm's pretrained_cfg", timm
    shape = input_shape or (_DEFAULT_INPUT_SHAPE if known is None else known[0])
    preprocessing = None if known is None else known[1]
    if preprocessing is not None and (len(shape) != 3 or shape[0] != len(preprocessing.mean)):
        preprocessing = None  # the model was made for other inputs than its origin says
    if preprocessing is not None:
        preprocessing = preprocessing.of_size(shape[1:])
    return Source(
        model,
        ModelSpec(name, arguments, shape, preprocessing),
        origin,
        input_known=input_shape is not None or known is not None,
        preprocessing_from=None if preprocessing is None else said_by,
    )


def _load_torchvision(
    name: str,
    weights: str,
    checkpoint: str | Path | None,
    arguments: dict[str, Any],
    input_shape: tuple[int, ...] | None,
    seed: int,
) -> tuple[Source, str | None]:
    """Return the source, and why it is random although weights were asked for."""
    name = torchvision_models.known_name(name)
    chosen = None if checkpoint is not None else torchvision_models.choose_weights(name, weights)
    state = None
    problem = None
    if checkpoint is not None:
        state = read_checkpoint(checkpoint)
    elif chosen is not None:
        try:
            state = torchvision_models.modern_keys(fetch_torchvision_state(chosen))
        except SpecError as error:
            problem = str(error)

    implied = torchvision_models.implied_arguments(name, chosen, state)
    shape, preprocessing = torchvision_models.input_of(name, chosen)
    shape = input_shape or shape
    if preprocessing is not None:
        preprocessing = preprocessing.of_size(shape[-2:])
    spec = ModelSpec(name, {**implied, **arguments}, shape, preprocessing)
    said_by = None if preprocessing is None else "torchvision's weights"

    def source(origin: WeightsOrigin) -> Source:
        return Source(model, spec, origin, preprocessing_from=said_by)

    model = _build(spec, seed, initialise=state is None)
    if state is None:
        return source(WeightsOrigin("random", seed)), problem
    kept = torchvision_models.without_dropped_heads(state, spec.arguments)
    if checkpoint is not None:
        load_state(model, of_model(model, kept, str(checkpoint)), str(checkpoint))
        return source(WeightsOrigin("checkpoint", str(checkpoint))), None
    try:
        load_state(model, kept, f"torchvision's {chosen!r}")
    except CheckpointError as error:
        return source(WeightsOrigin("random", seed)), str(error)
    return source(WeightsOrigin("torchvision", str(chosen))), None


def _checked_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("weights", "weights_backbone", "pretrained", "progress"):
        if ":" not in name and key in arguments:
            raise SpecError(f"argument {key!r} of {name}: weights are given by weights or checkpoint")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(arguments)))
    except (TypeError, ValueError) as error:
        raise SpecError(f"arguments of {name}: {error}; expected JSON values") from error
    return copy


def _checked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) not in (2, 3, 4) or not all(size > 0 for size in shape):
        raise SpecError(f"input shape {shape}: expected positive integers (C, H, W), (C, L) or (C, D, H, W)")
    return tuple(shape)


def _build(spec: ModelSpec, seed: int, *, initialise: bool = True) -> nn.Module:
    arguments = dict(spec.arguments)
    if ":" in spec.name:
        factory: Callable[..., Any] = import_attribute(spec.name, "model")
    elif spec.name == "demo":
        factory = demo.DemoResNet
    else:
        factory = torchvision_models.builder(spec.name)
        arguments = torchvision_models.builder_arguments(spec.name, arguments, initialise)

    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = factory(**arguments)
    except GroupifyError:
        raise
    except Exception as error:  # a factory can raise anything
        raise SpecError(
            f"model {spec.name!r} with arguments {dict(spec.arguments)}: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise SpecError(f"model {spec.name!r} returned a {type(model).__name__}: expected an nn.Module")
    try:
        return unwrapped(model).eval()
    except ConversionError as error:
        raise SpecError(f"model {spec.name!r}: {error}") from error
