"""Plans as files: JSON that can be edited by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field
from torch import nn

from groupify.conversion.surgery import restructure
from groupify.documents import Document, OneOf, Text
from groupify.errors import PlanError, near_names
from groupify.graph.call import one_example
from groupify.graph.plain_layers import Conv
from groupify.machine import KNOWN_CPUS
from groupify.models.wrappers import unwrapped
from groupify.planning.sites import describe, find_convs
from groupify.recipe import MAX_SITES, check_site, each_once
from groupify.structures import FLOAT32, Plan, Precision, SiteRecipe, Structure


@dataclass(frozen=True)
class PlanFile(Document):
    """What a plan file holds.

    Attributes:
        model: name of the model that it was made for.
        cpu: the processor that it was made for, one of ``groupify.machine.CPUS`` but never ``"auto"``.
        sites: every conv that it names, in order; one whose structure is one conv of as many groups as it has
            stays as it is.
        precision: what the converted model was to compute in.
    """

    what: ClassVar[str] = "plan"
    remedy: ClassVar[str] = "save one with groupify plan MODEL --save-plan FILE"

    format: Literal["groupify plan"] = field(default="groupify plan", kw_only=True)
    schema_version: Literal[5] = field(default=5, kw_only=True)
    model: Text
    cpu: Annotated[str, OneOf(*KNOWN_CPUS)]
    sites: Annotated[
        tuple[Annotated[SiteRecipe, AfterValidator(check_site)], ...],
        Field(min_length=1, max_length=MAX_SITES),
        AfterValidator(each_once),
    ]
    precision: Precision = FLOAT32

    @classmethod
    def of(cls, model: str, plan: Plan) -> PlanFile:
        """Return the file of a plan."""
        return cls(model, plan.cpu, tuple(site.recipe for site in plan.sites), plan.precision)

    def dumps(self) -> str:
        """Return the JSON text, one line for each conv; ``loads`` of it is this plan."""
        text = super().dumps()  # the line breaks in it are those of its layout: texts have none
        site = re.compile(r"^    \{.*?^    \}", re.DOTALL | re.MULTILINE)
        return site.sub(lambda found: "    " + re.sub(r"\s*\n\s*", " ", found[0].strip()), text)

    def apply(
        self, model: nn.Module, input_shape: tuple[int, ...] | None = None, *, example_inputs: Any = None
    ) -> Plan:
        """Return the plan for a model, with what it costs.

        Args:
            model: the dense model; left untouched.
            input_shape: (C, H, W) of one image.
            example_inputs: in its place, what the model is called with; see ``plan``.

        Raises:
            PlanError: it replaces nothing, names a conv that the model has not, or gives one a structure that
                does not suit it.
            SpecError: neither ``input_shape`` nor ``example_inputs``, or both.
            ConversionError: a conv cannot be replaced as it says.
        """
        model = unwrapped(model)
        convs = find_convs(model)
        replaced = [site for site in self.sites if not _stays(site, convs)]
        if not replaced:
            raise PlanError(
                "the plan leaves every conv as it is; give at least one a structure of more groups"
            )
        restructure(model, replaced)  # refuses what does not fit
        plan = describe(model, replaced, one_example(input_shape, example_inputs), self.cpu)
        sites = (site if site.converted else replace(site, reason="dense in the plan") for site in plan.sites)
        return replace(plan, sites=tuple(sites), precision=self.precision)


def _stays(site: SiteRecipe, convs: Mapping[str, Conv]) -> bool:
    if site.name not in convs:
        raise PlanError(
            f"the plan names {site.name!r}, which is no conv of the model it is applied to"
            f"{near_names(site.name, list(convs))}"
        )
    return not site.shuffle and site.structure == Structure(groups=convs[site.name].groups)
