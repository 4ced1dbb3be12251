"""Plans as files: JSON that can be edited by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field
from torch import nn

from groupify.conversion.surgery import restructure
from groupify.documents import Document, OneOf, Text
from groupify.errors import PlanError
from groupify.graph.call import one_example
from groupify.machine import KNOWN_CPUS
from groupify.models.wrappers import unwrapped
from groupify.planning.sites import describe, find_convs
from groupify.recipe import MAX_GROUPS, MAX_SITES, each_once
from groupify.structures import DENSE, KINDS, Plan, SiteRecipe


def _check_site(site: SiteRecipe) -> SiteRecipe:
    kinds = (DENSE, *KINDS)
    if site.kind not in kinds:
        raise ValueError(f"the kind {' or '.join(map(repr, kinds))}")
    fewest = 1 if site.kind == DENSE else 2
    if not fewest <= site.groups <= MAX_GROUPS:
        raise ValueError(f"groups from {fewest} to {MAX_GROUPS}")
    if site.kind == DENSE and site.shuffle:
        raise ValueError("no shuffle behind a conv that stays dense")
    return site


@dataclass(frozen=True)
class PlanFile(Document):
    """What a plan file holds.

    Attributes:
        model: name of the model that it was made for.
        cpu: the processor that it was made for, one of ``groupify.machine.CPUS`` but never ``"auto"``.
        sites: every conv that it names, in order; one of kind ``"dense"`` stays as it is.
    """

    what: ClassVar[str] = "plan"
    remedy: ClassVar[str] = "save one with groupify plan MODEL --save-plan FILE"

    format: Literal["groupify plan"] = field(default="groupify plan", kw_only=True)
    schema_version: Literal[3] = field(default=3, kw_only=True)
    model: Text
    cpu: Annotated[str, OneOf(*KNOWN_CPUS)]
    sites: Annotated[
        tuple[Annotated[SiteRecipe, AfterValidator(_check_site)], ...],
        Field(min_length=1, max_length=MAX_SITES),
        AfterValidator(each_once),
    ]

    @property
    def recipes(self) -> tuple[SiteRecipe, ...]:
        """What is replaced."""
        return tuple(site for site in self.sites if site.kind != DENSE)

    @classmethod
    def of(cls, model: str, plan: Plan) -> PlanFile:
        """Return the file of a plan."""
        return cls(model, plan.cpu, tuple(site.recipe for site in plan.sites))

    def dumps(self) -> str:
        """Return the JSON text, one line for each conv; ``loads`` of it is this plan."""
        text = super().dumps()  # the line breaks in it are those of its layout: texts have none
        return text.replace("{\n      ", "{").replace(",\n      ", ", ").replace("\n    }", "}")

    def apply(
        self, model: nn.Module, input_shape: tuple[int, ...] | None = None, *, example_inputs: Any = None
    ) -> Plan:
        """Return the plan for a model, with what it costs.

        Args:
            model: the dense model; left untouched.
            input_shape: (C, H, W) of one image.
            example_inputs: in its place, what the model is called with; see ``plan``.

        Raises:
            PlanError: it replaces nothing, names a conv that the model has not, or leaves one dense with
                another number of groups.
            SpecError: neither ``input_shape`` nor ``example_inputs``, or both.
            ConversionError: a conv cannot be replaced as it says.
        """
        if not self.recipes:
            raise PlanError('the plan leaves every conv dense; give at least one the kind "grouped"')
        model = unwrapped(model)
        convs = find_convs(model)
        for site in self.sites:
            if site.kind == DENSE:
                _check_dense(site, convs[site.name].groups if site.name in convs else None)
        restructure(model, self.recipes)  # refuses what does not fit
        plan = describe(model, self.recipes, one_example(input_shape, example_inputs), self.cpu)
        sites = (site if site.converted else replace(site, reason="dense in the plan") for site in plan.sites)
        return replace(plan, sites=tuple(sites))


def _check_dense(site: SiteRecipe, groups: int | None) -> None:
    if groups is None:
        raise PlanError(f"the plan names {site.name!r}, which is no conv of the model it is applied to")
    if site.groups != groups:
        raise PlanError(
            f"the plan leaves {site.name!r} dense and gives it {site.groups} groups; expected {groups}, as "
            'it has, or the kind "grouped"'
        )
