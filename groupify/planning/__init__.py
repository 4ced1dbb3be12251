"""Which layer gets how many groups, and why."""

from groupify.planning.rules import describe, plan
from groupify.scores.cost import Change, ModelCost, measure_cost
from groupify.structures import Plan, SitePlan

__all__ = ["Change", "ModelCost", "Plan", "SitePlan", "describe", "measure_cost", "plan"]
