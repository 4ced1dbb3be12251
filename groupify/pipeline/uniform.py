"""The same number of groups everywhere, for comparison: converted, evaluated, exported, forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from groupify.conversion.conversion import Calibration, convert
from groupify.data.batches import Data
from groupify.graph.trace import example_input
from groupify.models import Source
from groupify.onnx.exporting import export_onnx
from groupify.pipeline.requests import ConversionRequest
from groupify.reporting.results import UniformRun
from groupify.scores import evaluate, measure_cost
from groupify.structures import Plan


def uniform_plans(request: ConversionRequest, source: Source, chosen: Plan) -> dict[int, Plan]:
    """Return a plan for each number of groups in ``request.uniform``, without repetitions and ``chosen``."""
    plans: dict[int, Plan] = {}
    for groups in request.uniform:
        asked = replace(request.plan, groups=groups, file=None, search=None)
        plan = asked.make(source)
        if all(plan.recipes != other.recipes for other in (chosen, *plans.values())):
            plans[groups] = plan
    return plans


def convert_uniform(
    request: ConversionRequest,
    source: Source,
    plans: dict[int, Plan],
    calibration: Calibration | None,
    test: Data,
    folder: Path,
    *,
    progress: bool,
) -> dict[Path, UniformRun]:
    """Convert with each plan as the run itself was, without training.

    Args:
        request: gives target, batch size and seed.
        source: the dense model.
        plans: by number of groups.
        calibration: as for the run itself.
        test: labelled images.
        folder: where to export to; to be timed, and removed.
        progress: show bars on stderr.

    Returns:
        What was measured so far, by ONNX file.
    """
    shape = source.spec.input_shape
    runs = {}
    for groups, plan in plans.items():
        model = convert(source.model, plan, calibration, seed=request.seed, progress=progress).model
        exported = export_onnx(
            model,
            folder / f"uniform-{groups}.onnx",
            input_shape=shape,
            static_batch=request.output.static_batch,
        )
        cost = measure_cost(model, example_input(shape, like=source.model))
        top1 = evaluate(model, test, progress=progress).top1
        runs[exported.path] = UniformRun(groups, cost.params, cost.macs, top1)
    return runs
