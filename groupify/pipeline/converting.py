"""The stages that make the compressed model: plan, convert, then train."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from groupify.conversion.conversion import Conversion, convert
from groupify.conversion.surgery import restructure
from groupify.data.batches import Data, is_map_style
from groupify.data.ranks import ALONE, Ranks
from groupify.data.splits import DataSplits
from groupify.devices import device_of
from groupify.graph.call import Call, example_input
from groupify.graph.copying import on_cpu as cpu_copy
from groupify.onnx.exporting import export_onnx
from groupify.pipeline.compressed import Compressed
from groupify.pipeline.inputs import warn_near_chance
from groupify.pipeline.planning import Planned, make_plan, planning_stages
from groupify.pipeline.requests import ExportOptions, PlanRequest, TrainingRequest
from groupify.pipeline.subject import Subject
from groupify.planning.durations import Pace
from groupify.planning.plan_file import PlanFile
from groupify.reporting.budget import race_lines
from groupify.reporting.results import AccuracyChange, MetricChange, UniformRun
from groupify.scores import evaluate, measure_cost, measure_metric, metric_name
from groupify.stages import SILENT, Stages
from groupify.structures import Plan
from groupify.tasks import AUTO, OUTPUTS
from groupify.training.state import Checkpointing


def run_compression(
    subject: Subject, request: PlanRequest, *, ranks: Ranks = ALONE, stages: Stages = SILENT
) -> Compressed:
    """Plan, convert, and measure the accuracy where there are labels for that: what ``compress`` does.

    The first process converts; the others get its weights.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    planned = make_plan(request, subject, stages=stages)
    if request.save is not None and ranks.first:
        PlanFile.of(subject.source.spec.name, planned.plan).write(request.save)
    notes = request.notes + (() if planned.found is None else race_lines(planned.found))
    result = result_of(_conversion(subject, planned, ranks, stages), subject, planned.plan)
    budget = None if request.budget is None else request.budget.text
    result = replace(
        result, model=ranks.share_weights(result.model), notes=(*notes, *result.notes), budget=budget
    )
    return measured(result, ranks, stages)


def _conversion(subject: Subject, planned: Planned, ranks: Ranks, stages: Stages) -> Conversion:
    if planned.conversion is not None:
        stages.begin("taking the best of the converted plans")
        return planned.conversion
    source, plan = subject.source, planned.plan
    pace = Pace(source.model, subject.example, plan.macs.dense)
    images = _images(subject)
    convs = f"fitting {len(plan.converted)} convs"
    if images:
        stages.begin(f"{convs} on {images} images", lambda: pace.fit(plan.sites, images))
    else:
        stages.begin(f"{convs} from their weights alone")
    if ranks.first:
        return converted(subject, plan, progress=stages.show)
    return Conversion(restructure(source.model, plan.recipes), plan.recipes, (), "", (), None, None, {})


def compression_stages(subject: Subject, request: PlanRequest) -> int:
    """Return the number of stages of :func:`run_compression`."""
    return planning_stages(request, subject) + 1 + has_test_labels(subject.data, subject.task)


def has_test_labels(data: DataSplits | None, task: str = AUTO) -> bool:
    """Whether an accuracy can be measured, and means something."""
    return data is not None and data.labelled and data.test is not None and task != OUTPUTS


def _images(subject: Subject) -> int:
    """Return how many images there are to fit on; of data without a length at most."""
    if subject.given is not None:
        return subject.given.count
    if subject.data is None or subject.count == 0:
        return 0
    length = _length(subject.data.for_calibration)
    return subject.count if length is None else min(subject.count, length)


def converted(subject: Subject, plan: Plan, *, progress: bool = False) -> Conversion:
    """Convert by a plan."""
    how = subject.how_called if isinstance(subject.example, Call) else {}
    return convert(
        subject.source.model, plan, subject.calibration(), seed=subject.seed, progress=progress, **how
    )


def result_of(conversion: Conversion, subject: Subject, plan: Plan) -> Compressed:
    """Return a conversion with all that it was made from."""
    values = {field.name: getattr(conversion, field.name) for field in dataclasses.fields(Conversion)}
    return Compressed(
        **values,
        plan=plan,
        source=subject.source,
        example=subject.example,
        data=subject.data,
        inputs=subject.inputs,
        found_by=conversion.summary(),
        seed=subject.seed,
        metric=subject.metric,
        task=subject.task,
    )


def measured(result: Compressed, ranks: Ranks, stages: Stages) -> Compressed:
    """Add the accuracy of both models, where there are labels for that, and what the user's metric says."""
    data, source = result.data, result.source
    if result.metric is not None:
        dense, own = (measure_metric(result.metric, model) for model in (source.model, result.model))
        change = MetricChange(metric_name(result.metric), dense, own)
        result = replace(result, measured_by_metric=change)
    if not has_test_labels(data, result.task):
        return result
    assert data is not None
    assert data.test is not None
    images, pace = _length(data.test), Pace(source.model, result.example, 1)
    # The converted model takes less time, but not in PyTorch.
    guess = None if images is None else lambda: pace.passes(2 * images)
    stages.begin("measuring the accuracy of both models", guess)
    before, after = (
        evaluate(model, data.test, inputs=result.inputs, progress=stages.show, ranks=ranks)
        for model in (source.model, result.model)
    )
    warn_near_chance(before, source, data)
    changed = before.answers.against(after.answers, ranks) if before.answers and after.answers else None
    accuracy = AccuracyChange(before.top1, after.top1, images=before.images, changed=changed)
    return replace(result, accuracy=accuracy, answers=before.answers)


def train(
    result: Compressed,
    request: TrainingRequest | None,
    checkpointing: Checkpointing | None,
    ranks: Ranks,
    stages: Stages,
) -> Compressed:
    """Fine-tune, and measure the accuracy again.

    Raises:
        GroupifyError: the model cannot be trained as asked.
    """
    if request is None or result.data is None:
        return result
    stages.begin(f"fine-tuning, epochs: {request.settings.epochs:g}", _training_time(result, request, ranks))
    tuned = result.finetune(
        result.data,
        settings=request.settings,
        loss=request.loss,
        checkpointing=checkpointing,
        log=request.log,
        distributed=ranks.world > 1,
        progress=stages.show,
    )
    metric = tuned.measured_by_metric
    if metric is None or metric.recovered is not None:
        return tuned
    note = f"{metric.name} was not measured after the training: give --metric package.module:{metric.name}"
    return replace(tuned, notes=(*tuned.notes, note))


def on_cpu(result: Compressed) -> Compressed:
    """Return a result whose models are on the CPU, where they are written, exported and timed."""
    tuned = result.tuned
    if tuned is not None:
        tuned = replace(
            tuned, model=cpu_copy(tuned.model), last_model=cpu_copy(tuned.last_model),
            given_model=cpu_copy(tuned.given_model),
        )  # fmt: skip
    source = replace(result.source, model=cpu_copy(result.source.model))
    return replace(result, model=cpu_copy(result.model), source=source, tuned=tuned)


def _length(data: Data) -> int | None:
    return len(cast(Any, data)) if is_map_style(data) else None


def _training_time(result: Compressed, request: TrainingRequest, ranks: Ranks) -> Callable[[], float] | None:
    """Return what estimates the time of a fine-tune; None where that cannot be told."""
    data, settings = result.data, request.settings
    images = settings.images_per_epoch
    if images is None and data is not None and data.train is not None:
        images = _length(data.train)
    if images is None or device_of(result.model).type != "cpu":
        return None
    pace, count = Pace(result.source.model, result.example, 1), settings.epochs * images
    # A step: the teacher's forward pass, and the student's with a backward pass that costs two.
    return lambda: pace.passes(4 * count / ranks.world)


def convert_uniform(
    plans: dict[int, Plan], subject: Subject, export: ExportOptions, folder: Path, *, progress: bool
) -> dict[Path, UniformRun]:
    """Convert with other plans as the run itself was, without training.

    Args:
        plans: by number of groups.
        subject: the dense model, and data with labelled test images.
        export: how the files are made.
        folder: where to export to; to be timed, and removed.
        progress: show bars on stderr.

    Returns:
        What was measured so far, by ONNX file.
    """
    data, shape, dense = subject.data, subject.source.spec.input_shape, subject.source.model
    runs = {}
    for groups, plan in plans.items():
        assert data is not None
        assert data.test is not None
        model = converted(subject, plan, progress=progress).model
        exported = export_onnx(
            model, folder / f"uniform-{groups}.onnx", input_shape=shape, static_batch=export.static_batch,
            dynamic_size=export.dynamic_size,
        )  # fmt: skip
        cost = measure_cost(model, example_input(shape, like=dense))
        top1 = evaluate(model, data.test, progress=progress).top1
        runs[exported.path] = UniformRun(groups, cost.params, cost.macs, top1)
    return runs
