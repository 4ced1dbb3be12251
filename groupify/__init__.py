"""Turn the convolutions of a trained CNN into grouped ones: smaller, measurably faster, still accurate.

The public names, and nothing else; each is imported when it is first used, so ``import groupify`` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from groupify.errors import GroupifyError, GroupifyWarning

if TYPE_CHECKING:
    from groupify.artefact import apply, load
    from groupify.conversion.in_order import Calibration
    from groupify.data.batches import calibration_images
    from groupify.data.splits import load_data
    from groupify.measure.benchmarks import benchmark_onnx as benchmark
    from groupify.models.preprocessing import PreprocessingOptions
    from groupify.models.sources import load_model
    from groupify.onnx.int8.exporting import export_int8
    from groupify.pipeline.compressed import Compressed
    from groupify.pipeline.compressing import compress
    from groupify.pipeline.verbs import convert, export, finetune, save
    from groupify.planning.plan_file import PlanFile
    from groupify.planning.rules import Rules
    from groupify.planning.search import SearchOptions, plan_for_budget
    from groupify.planning.uniform import plan
    from groupify.recipe import Recipe
    from groupify.scores import evaluate
    from groupify.training.settings import FinetuneSettings

__version__: str
"""The version of the installed package."""

__all__ = [
    "Calibration",
    "Compressed",
    "FinetuneSettings",
    "GroupifyError",
    "GroupifyWarning",
    "PlanFile",
    "PreprocessingOptions",
    "Recipe",
    "Rules",
    "SearchOptions",
    "__version__",
    "apply",
    "benchmark",
    "calibration_images",
    "compress",
    "convert",
    "evaluate",
    "export",
    "export_int8",
    "finetune",
    "load",
    "load_data",
    "load_model",
    "plan",
    "plan_for_budget",
    "save",
]

_HOMES = {
    "artefact": ("apply", "load"),
    "conversion.in_order": ("Calibration",),
    "data.batches": ("calibration_images",),
    "data.splits": ("load_data",),
    "measure.benchmarks": ("benchmark_onnx",),
    "onnx.int8.exporting": ("export_int8",),
    "scores": ("evaluate",),
    "planning.uniform": ("plan",),
    "planning.plan_file": ("PlanFile",),
    "planning.rules": ("Rules",),
    "planning.search": ("SearchOptions", "plan_for_budget"),
    "pipeline.compressed": ("Compressed",),
    "pipeline.compressing": ("compress",),
    "pipeline.verbs": ("convert", "export", "finetune", "save"),
    "recipe": ("Recipe",),
    "training.settings": ("FinetuneSettings",),
    "models.preprocessing": ("PreprocessingOptions",),
    "models.sources": ("load_model",),
}
_LAZY = {name.removesuffix("_onnx"): (home, name) for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from groupify.machine import package_version

        return package_version("groupify") or "unknown"
    if name not in _LAZY:
        raise AttributeError(f"module 'groupify' has no attribute {name!r}")
    home, attribute = _LAZY[name]
    value = getattr(importlib.import_module(f"groupify.{home}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
