"""Turn the convolutions of a trained CNN into grouped ones: smaller, measurably faster, still accurate.

The public names, and nothing else; each is imported when it is first used, so ``import groupify`` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from groupify.errors import GroupifyError, GroupifyWarning

if TYPE_CHECKING:
    from groupify.artefact import load, save
    from groupify.conversion.conversion import Calibration, Conversion, convert
    from groupify.data.batches import calibration_images
    from groupify.data.splits import DataSplits, load_data
    from groupify.machine import blocked_width
    from groupify.measure.benchmarks import benchmark_onnx as benchmark
    from groupify.models import ModelSpec, Source, WeightsOrigin, load_model
    from groupify.onnx.exporting import export_onnx as export
    from groupify.planning.budget import Budget
    from groupify.planning.plan_file import PlanFile
    from groupify.planning.race import BudgetPlan
    from groupify.planning.rules import Rules
    from groupify.planning.search import SearchOptions, plan_for_budget
    from groupify.planning.uniform import plan
    from groupify.recipe import Recipe
    from groupify.scores import evaluate
    from groupify.shuffles import ShuffleChoice, choose_shuffles
    from groupify.structures import Plan
    from groupify.training.finetuning import finetune
    from groupify.training.settings import FinetuneSettings

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
    "Rules",
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
    "conversion.conversion": ("Calibration", "Conversion", "convert"),
    "data.batches": ("calibration_images",),
    "data.splits": ("DataSplits", "load_data"),
    "measure.benchmarks": ("benchmark_onnx",),
    "onnx.exporting": ("export_onnx",),
    "machine": ("blocked_width",),
    "scores": ("evaluate",),
    "planning.uniform": ("plan",),
    "structures": ("Plan",),
    "planning.budget": ("Budget",),
    "planning.plan_file": ("PlanFile",),
    "planning.rules": ("Rules",),
    "planning.race": ("BudgetPlan",),
    "planning.search": ("SearchOptions", "plan_for_budget"),
    "recipe": ("Recipe",),
    "training.finetuning": ("finetune",),
    "training.settings": ("FinetuneSettings",),
    "shuffles": ("ShuffleChoice", "choose_shuffles"),
    "models": ("ModelSpec", "Source", "WeightsOrigin", "load_model"),
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
