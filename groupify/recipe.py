"""The recipe: the JSON that tells how to rebuild a converted model, and its strict reader.

A recipe is outside input: every type, range and length is checked here, once, so that the rest of
groupify can rely on it. The schema is the code of ``Recipe.from_json``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from groupify.errors import ArtefactError, SpecError
from groupify.models import ModelSpec, Preprocessing, WeightsOrigin
from groupify.strict_json import (
    JsonObject,
    is_finite,
    is_integer,
    json_list,
    parse,
    plain_object,
    refuse,
    show,
)
from groupify.structures import KINDS, SiteRecipe

FORMAT = "groupify"
SCHEMA_VERSION = 2
MAX_SITES = 10_000
MAX_GROUPS = 65_536
MAX_SIDE = 65_536
MAX_INPUT_VALUES = 2**27
MEMORY_FORMATS = ("contiguous", "channels_last")
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


def current_versions() -> dict[str, str]:
    """Return the versions of groupify, torch and torchvision that are running."""
    versions = {"torch": str(torch.__version__)}
    for package in ("groupify", "torchvision"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


@dataclass(frozen=True)
class Recipe:
    """Everything but the weights: how a converted model is rebuilt, and how it came about.

    Attributes:
        model: the dense architecture.
        weights: where the dense weights came from.
        sites: the convs that were replaced, each by what.
        calibration: how the new weights were found; JSON values; None = without data.
        recovery: how the model was trained afterwards; JSON values; None = not at all.
        metrics: what was measured; JSON values.
        versions: package name → version, at the time of the conversion.
        memory_format: how the weights lie in memory, one of ``MEMORY_FORMATS``; kernels round
            differently for each. Filled in when the recipe is saved.
        sha256: hash of ``model.safetensors`` in hexadecimal digits; None until the recipe is saved.
    """

    model: ModelSpec
    weights: WeightsOrigin
    sites: tuple[SiteRecipe, ...]
    calibration: Mapping[str, Any] | None = None
    recovery: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=current_versions)
    memory_format: str = "contiguous"
    sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as a JSON document of plain dicts and lists."""
        preprocessing = None
        if self.model.preprocessing is not None:
            preprocessing = asdict(self.model.preprocessing)
            preprocessing |= {key: list(preprocessing[key]) for key in ("mean", "std")}
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "versions": dict(self.versions),
            "model": {
                "name": self.model.name,
                "arguments": dict(self.model.arguments),
                "input_shape": list(self.model.input_shape),
                "preprocessing": preprocessing,
            },
            "weights": {
                **asdict(self.weights),
                "memory_format": self.memory_format,
                "sha256": self.sha256,
            },
            "plan": [asdict(site) for site in self.sites],
            "calibration": None if self.calibration is None else dict(self.calibration),
            "recovery": None if self.recovery is None else dict(self.recovery),
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_json(cls, document: object) -> Recipe:
        """Return the recipe of a JSON document.

        Raises:
            ArtefactError: anything is missing, unknown, of the wrong type or out of range.
        """
        top = JsonObject(document, "recipe")
        if top.take("format") != FORMAT:
            raise ArtefactError('it is not a groupify recipe: expected "format": "groupify"')
        version = top.integer("schema_version", 1, 10**9)
        if version != SCHEMA_VERSION:
            raise ArtefactError(
                f"its schema version is {version}, this groupify reads version {SCHEMA_VERSION}: "
                "install the version of groupify that wrote it"
            )
        weights = JsonObject(top.take("weights"), "weights")
        recipe = cls(
            model=_model_spec(JsonObject(top.take("model"), "model")),
            weights=_origin(weights),
            sites=_sites(top.take("plan")),
            calibration=None
            if (value := top.take("calibration")) is None
            else plain_object(value, "calibration"),
            recovery=None if (value := top.take("recovery")) is None else plain_object(value, "recovery"),
            metrics=plain_object(top.take("metrics"), "metrics"),
            versions=_versions(top.take("versions")),
            memory_format=weights.choice("memory_format", MEMORY_FORMATS),
            sha256=_sha256(weights.take("sha256")),
        )
        weights.finish()
        top.finish()
        return recipe

    def dumps(self) -> str:
        """Return the JSON text; ``loads`` of it is this recipe.

        Raises:
            ArtefactError: a field holds something that JSON or the schema does not allow.
        """
        try:
            text = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ArtefactError(f"the recipe cannot be written as JSON: {error}") from error
        self.loads(text)
        return text

    @classmethod
    def loads(cls, text: str) -> Recipe:
        """Return the recipe of a JSON text.

        Raises:
            ArtefactError: the text is not JSON, or not a recipe.
        """
        return cls.from_json(parse(text))


def _origin(weights: JsonObject) -> WeightsOrigin:
    try:
        return WeightsOrigin(weights.text("kind"), weights.take("value"))
    except SpecError as error:
        raise ArtefactError(f"weights: {error}") from error


def _model_spec(model: JsonObject) -> ModelSpec:
    shape = json_list(model.take("input_shape"), "model.input_shape", 1, 5)
    if not all(is_integer(side, 1, MAX_SIDE) for side in shape) or math.prod(shape) > MAX_INPUT_VALUES:
        refuse("model.input_shape", shape, f"sides of 1 to {MAX_SIDE}, together at most {MAX_INPUT_VALUES}")
    spec = ModelSpec(
        name=model.text("name"),
        arguments=plain_object(model.take("arguments"), "model.arguments"),
        input_shape=tuple(shape),
        preprocessing=_preprocessing(model.take("preprocessing")),
    )
    model.finish()
    return spec


def _preprocessing(value: object) -> Preprocessing | None:
    if value is None:
        return None
    where = "model.preprocessing"
    fields = JsonObject(value, where)
    channels = {key: json_list(fields.take(key), f"{where}.{key}", 1, MAX_SIDE) for key in ("mean", "std")}
    for key, values in channels.items():
        if not all(is_finite(entry) for entry in values) or (key == "std" and min(values) <= 0):
            refuse(f"{where}.{key}", values, "finite numbers" + (" above 0" if key == "std" else ""))
    if len(channels["mean"]) != len(channels["std"]):
        raise ArtefactError(
            f"{where} has {len(channels['mean'])} means but {len(channels['std'])} standard deviations"
        )
    resize = fields.take("resize")
    if resize is not None and not is_integer(resize, 1, MAX_SIDE):
        refuse(f"{where}.resize", resize, f"null or an integer from 1 to {MAX_SIDE}")
    interpolation = fields.choice("interpolation", _INTERPOLATIONS)
    fields.finish()
    mean, std = (tuple(float(entry) for entry in channels[key]) for key in ("mean", "std"))
    return Preprocessing(mean=mean, std=std, resize=resize, interpolation=interpolation)


def _sites(value: object) -> tuple[SiteRecipe, ...]:
    sites = []
    for index, entry in enumerate(json_list(value, "plan", 0, MAX_SITES)):
        fields = JsonObject(entry, f"plan[{index}]")
        site = SiteRecipe(
            name=fields.text("name", shortest=0),
            kind=fields.choice("kind", KINDS),
            groups=fields.integer("groups", 1, MAX_GROUPS),
            shuffle=fields.flag("shuffle"),
        )
        fields.finish()
        sites.append(site)
    names = set()
    for site in sites:
        if site.name in names:
            raise ArtefactError(f"plan names the site {show(site.name)} twice")
        names.add(site.name)
    return tuple(sites)


def _optional_object(value: object, where: str) -> dict[str, Any] | None:
    return None if value is None else plain_object(value, where)


def _versions(value: object) -> dict[str, str]:
    versions = plain_object(value, "versions")
    if not all(isinstance(version, str) for version in versions.values()):
        refuse("versions", versions, "a text for each package")
    return versions


def _sha256(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or re.fullmatch(r"[0-9a-f]{64}", value) is None:
        refuse("weights.sha256", value, "64 hexadecimal digits")
    return value
