"""The recipe: the JSON that tells how to rebuild a converted model.

A recipe is outside input: every type, range and length is checked once, when it is read, so that the rest of
groupify can rely on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field

from groupify.documents import Document, OneOf, Text
from groupify.models.specs import CheckedSpec, WeightsOrigin
from groupify.structures import FLOAT32, Precision, SiteRecipe
from groupify.tasks import AUTO, TASKS

# Key of the recipe's ``sha256`` in the metadata of an ONNX file.
RECIPE_HASH = "groupify.recipe_sha256"
MAX_SITES = 10_000
MAX_CHANNELS = 65_536
MEMORY_FORMATS = ("contiguous", "channels_last")


def current_versions() -> dict[str, str]:
    """Return the versions of groupify, torch and torchvision that are running."""
    versions = {"torch": str(torch.__version__)}
    for package in ("groupify", "torchvision"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def check_site(site: SiteRecipe) -> SiteRecipe:
    """Return a site of a document; a validator for ``Annotated``.

    Raises:
        ValueError: it is larger than any layer.
    """
    structure = site.structure
    if max(structure.reduce or 1, structure.groups, structure.expand or 1) > MAX_CHANNELS:
        raise ValueError(f"1 to {MAX_CHANNELS} channels and groups")
    return site


def each_once(sites: tuple[SiteRecipe, ...]) -> tuple[SiteRecipe, ...]:
    """Return the sites of a document; a validator for ``Annotated``.

    Raises:
        ValueError: one is named twice.
    """
    names: set[str] = set()
    for site in sites:
        if site.name in names:
            raise ValueError(f"each site once, and {site.name!r} occurs twice")
        names.add(site.name)
    return sites


@dataclass(frozen=True)
class Recipe(Document):
    """Everything but the weights: how a converted model is rebuilt, and how it came about.

    It is checked when it is saved or read, not when it is made.

    Attributes:
        model: the dense architecture.
        weights: where the dense weights came from.
        sites: the convs that were replaced, each by what.
        calibration: how the new weights were found; JSON values; None = without data.
        recovery: how the model was trained afterwards; JSON values; None = not at all.
        metrics: what was measured; JSON values.
        cpu: the processor that the plan was made for, one of ``groupify.machine.CPUS``; None = not known.
        precision: what the plan was made for: what the model computes in where it is deployed.
        task: what the model was taken for, one of ``groupify.tasks.TASKS``.
        budget: what was asked for, as ``Budget.parse`` takes it; None = nothing.
        versions: package name → version, at the time of the conversion.
        memory_format: how the weights lie in memory, one of ``MEMORY_FORMATS``; kernels round
            differently for each. Filled in when the recipe is saved.
        hooked: names of the modules that had forward hooks, or a forward of their own, which are not saved:
            whatever rebuilds the model has to bring them. Filled in when the recipe is saved.
        sha256: hash of ``model.safetensors`` in hexadecimal digits; None until the recipe is saved.
    """

    what: ClassVar[str] = "recipe"
    remedy: ClassVar[str] = "install the version of groupify that wrote it, or convert the model again"

    format: Literal["groupify"] = field(default="groupify", kw_only=True)
    schema_version: Literal[5] = field(default=5, kw_only=True)
    model: CheckedSpec
    weights: WeightsOrigin
    sites: Annotated[
        tuple[Annotated[SiteRecipe, AfterValidator(check_site)], ...],
        Field(max_length=MAX_SITES),
        AfterValidator(each_once),
    ]
    calibration: Mapping[str, Any] | None = None
    recovery: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    cpu: Text | None = None
    precision: Precision = FLOAT32
    task: Annotated[str, OneOf(*TASKS)] = AUTO
    budget: Text | None = None
    versions: Mapping[str, str] = field(default_factory=current_versions)
    memory_format: Annotated[str, OneOf(*MEMORY_FORMATS)] = "contiguous"
    hooked: Annotated[tuple[Text, ...], Field(max_length=MAX_SITES)] = ()
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
