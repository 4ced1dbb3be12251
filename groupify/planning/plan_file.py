"""Plans as files: JSON that can be edited by hand, and its strict reader."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from groupify.conversion.surgery import restructure
from groupify.errors import ArtefactError, PlanError
from groupify.graph.operations import CONVS
from groupify.machine import KNOWN_CPUS
from groupify.planning.json_file import read_json_file, take_header, write_json_file
from groupify.planning.sites import describe
from groupify.strict_json import JsonObject, json_list, parse
from groupify.structures import DENSE, KINDS, Plan, SiteRecipe

FORMAT = "groupify plan"
SCHEMA_VERSION = 2
_MAX_SITES = 10_000
_MAX_GROUPS = 65_536


@dataclass(frozen=True)
class PlanFile:
    """What a plan file holds.

    Attributes:
        model: name of the model that it was made for.
        cpu: the processor that it was made for.
        sites: every conv that it names, in order; None for one that stays dense.
    """

    model: str
    cpu: str
    sites: tuple[tuple[str, SiteRecipe | None], ...]

    @property
    def recipes(self) -> tuple[SiteRecipe, ...]:
        """What is replaced."""
        return tuple(recipe for _, recipe in self.sites if recipe is not None)

    @classmethod
    def of(cls, model: str, plan: Plan) -> PlanFile:
        """Return the file of a plan."""
        sites = tuple((site.name, site.recipe if site.converted else None) for site in plan.sites)
        return cls(model, plan.cpu, sites)

    def dumps(self) -> str:
        """Return the JSON text, one line for each conv; ``loads`` of it is this plan."""
        lines = ",\n".join("    " + json.dumps(_site_json(name, recipe)) for name, recipe in self.sites)
        head = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "model": self.model, "cpu": self.cpu}
        fields = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        return f'{{\n{fields}  "sites": [\n{lines}\n  ]\n}}\n'

    @classmethod
    def loads(cls, text: str) -> PlanFile:
        """Return the plan of a JSON text.

        Raises:
            ArtefactError: the text is not JSON, or anything in it is missing, unknown or out of range.
        """
        top = JsonObject(parse(text), "plan")
        take_header(top, "plan", FORMAT, SCHEMA_VERSION, "save the plan again")
        model, cpu = top.text("model"), top.choice("cpu", KNOWN_CPUS)
        sites = [
            _site(entry, f"plan.sites[{number}]")
            for number, entry in enumerate(json_list(top.take("sites"), "plan.sites", 1, _MAX_SITES))
        ]
        top.finish()
        names = [name for name, _ in sites]
        for name in names:
            if names.count(name) > 1:
                raise ArtefactError(f"plan.sites names {name!r} twice; keep one of the two")
        return cls(model, cpu, tuple(sites))

    @classmethod
    def read(cls, path: Path) -> PlanFile:
        """Read a file.

        Raises:
            ArtefactError: it cannot be read, or is no plan.
        """
        return read_json_file(path, "plan", cls.loads, "save one with groupify plan MODEL --save-plan FILE")

    def write(self, path: Path) -> None:
        """Write a file aside, then rename it.

        Raises:
            ArtefactError: it cannot be written.
        """
        write_json_file(path, self.dumps())

    def apply(self, model: nn.Module, input_shape: tuple[int, ...]) -> Plan:
        """Return the plan for a model, with what it costs.

        Args:
            model: the dense model; left untouched.
            input_shape: (C, H, W) of one image.

        Raises:
            PlanError: it replaces nothing, or names a conv that the model has not.
            ConversionError: a conv cannot be replaced as it says.
        """
        if not self.recipes:
            raise PlanError('the plan leaves every conv dense; give at least one the kind "grouped"')
        convs = {name for name, module in model.named_modules() if isinstance(module, CONVS)}
        for name, recipe in self.sites:
            if recipe is None and name not in convs:
                raise PlanError(f"the plan names {name!r}, which is no conv of the model it is applied to")
        restructure(model, self.recipes)  # refuses what does not fit
        plan = describe(model, self.recipes, input_shape, self.cpu)
        sites = (site if site.converted else replace(site, reason="dense in the plan") for site in plan.sites)
        return replace(plan, sites=tuple(sites))


def _site_json(name: str, recipe: SiteRecipe | None) -> dict[str, Any]:
    if recipe is None:
        return {"name": name, "kind": DENSE}
    return {"name": name, "kind": recipe.kind, "groups": recipe.groups, "shuffle": recipe.shuffle}


def _site(value: object, where: str) -> tuple[str, SiteRecipe | None]:
    fields = JsonObject(value, where)
    name = fields.text("name")
    kind = fields.choice("kind", (DENSE, *KINDS))
    if kind == DENSE:
        fields.finish()
        return name, None
    recipe = SiteRecipe(name, kind, fields.integer("groups", 2, _MAX_GROUPS), fields.flag("shuffle"))
    fields.finish()
    return name, recipe
