"""Which layer gets how many groups, and why."""

from groupify.planning.cost import Change, ModelCost, measure_cost
from groupify.planning.plan import Plan, SitePlan
from groupify.planning.rules import describe, plan

__all__ = ["Change", "ModelCost", "Plan", "SitePlan", "describe", "measure_cost", "plan"]
