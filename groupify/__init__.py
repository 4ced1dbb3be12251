"""Turn the convolutions of a trained CNN into grouped ones: smaller, measurably faster, still accurate.

The public names, and nothing else; each is imported when it is first used, so ``import groupify`` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from groupify.errors import GroupifyError, GroupifyWarning

if TYPE_CHECKING:
    from groupify.artefact import load, save
    from groupify.conversion.convert import Calibration, Conversion, convert
    from groupify.data import DataSplits, calibration_images, load_data
    from groupify.deployment.benchmark import benchmark_onnx as benchmark
    from groupify.deployment.export import export_onnx as export
    from groupify.deployment.machine import blocked_width
    from groupify.evaluation import evaluate
    from groupify.planning import Plan, plan
    from groupify.planning.budget import Budget
    from groupify.planning.plan_file import PlanFile
    from groupify.planning.search import BudgetPlan, SearchOptions, plan_for_budget
    from groupify.recipe import Recipe
    from groupify.recovery.finetune import FinetuneSettings, finetune
    from groupify.shuffles import ShuffleChoice, choose_shuffles
    from groupify.zoo import ModelSpec, Source, WeightsOrigin, load_model

__all__ = [
    "Budget",
    "BudgetPlan",
    "Calibration",
    "Conversion",
    "DataSplits",
    "FinetuneSettings",
    "GroupifyError",
    "GroupifyWarning",
    "ModelSpec",
    "Plan",
    "PlanFile",
    "Recipe",
    "SearchOptions",
    "ShuffleChoice",
    "Source",
    "WeightsOrigin",
    "benchmark",
    "blocked_width",
    "calibration_images",
    "choose_shuffles",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "load",
    "load_data",
    "load_model",
    "plan",
    "plan_for_budget",
    "save",
]

_HOMES = {
    "artefact": ("load", "save"),
    "conversion.convert": ("Calibration", "Conversion", "convert"),
    "data": ("DataSplits", "calibration_images", "load_data"),
    "deployment.benchmark": ("benchmark_onnx",),
    "deployment.export": ("export_onnx",),
    "deployment.machine": ("blocked_width",),
    "evaluation": ("evaluate",),
    "planning": ("Plan", "plan"),
    "planning.budget": ("Budget",),
    "planning.plan_file": ("PlanFile",),
    "planning.search": ("BudgetPlan", "SearchOptions", "plan_for_budget"),
    "recipe": ("Recipe",),
    "recovery.finetune": ("FinetuneSettings", "finetune"),
    "shuffles": ("ShuffleChoice", "choose_shuffles"),
    "zoo": ("ModelSpec", "Source", "WeightsOrigin", "load_model"),
}
_LAZY = {name.removesuffix("_onnx"): (home, name) for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'groupify' has no attribute {name!r}")
    home, attribute = _LAZY[name]
    value = getattr(importlib.import_module(f"groupify.{home}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
