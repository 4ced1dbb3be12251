"""A plan for a budget: measure what each choice costs and loses, then let plans compete."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.site_fit import FitOptions
from groupify.data.calls import Inputs
from groupify.errors import PlanError, SpecError, expect_type
from groupify.graph.call import Call, Example, as_call, one_example
from groupify.graph.capture import Captured, capture
from groupify.graph.forward import run_once
from groupify.measure.latency_table import LatencyTable, cached_table, count_missing, look_up
from groupify.measure.plan_timer import PlanTimer
from groupify.models.wrappers import unwrapped
from groupify.onnx.exporting import export_onnx
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.onnx.runtime import OnnxModule
from groupify.planning.budget import LATENCY, Budget
from groupify.planning.candidates import candidates
from groupify.planning.costing import Costing, Finder
from groupify.planning.durations import Pace
from groupify.planning.group_counts import GroupCounts
from groupify.planning.judgements import Judgements
from groupify.planning.like_groups import DEFAULT_GROUPS, budget_like_groups, keep_ungrouped
from groupify.planning.race import BudgetPlan, Race
from groupify.planning.rules import Rules
from groupify.planning.sensitivity import (
    ERRORS,
    EXACT,
    FISHER,
    OUTPUTS,
    Sensitivity,
    exact_sensitivity,
    measure_sensitivity,
    weight_sensitivity,
)
from groupify.planning.sites import limits
from groupify.planning.worth_timing import worth_timing
from groupify.scores import Judge, Judgement, Metric, measure_cost
from groupify.stages import SILENT, Stages
from groupify.structures import INT8, Choices, Plan
from groupify.tasks import AUTO, CLASSES, describe_outputs, describe_task, task_of

SENSITIVITIES = (AUTO, ERRORS, FISHER, OUTPUTS, EXACT)
BOTH = "groups and a budget: both say how much smaller the model is to be; give one of the two"
_HELD_OUT = 0.25
_CALIBRATION_IMAGES = 256  # as many as an export of a whole run takes

ConvertPlan = Callable[[Plan], nn.Module]


@dataclass(frozen=True)
class Images:
    """Images to plan on, preprocessed as for inference.

    Attributes:
        fit: unlabelled calibration images to fit on, shape (N, C, H, W).
        held_out: other images, on which plans are compared.
        labels: class numbers of those, shape (M,); None = unlabelled. Only a limit on the drop reads them.
        inputs: for a model that takes more than images, a batch of them → positional and keyword arguments.
    """

    fit: Tensor
    held_out: Tensor
    labels: Tensor | None = None
    inputs: Inputs | None = None

    @classmethod
    def split(cls, images: Tensor, labels: Tensor | None = None, inputs: Inputs | None = None) -> Images:
        """Hold the last quarter out; of a single image, the image itself."""
        count = max(1, round(len(images) * (1 - _HELD_OUT)))
        if count == len(images):
            return cls(images, images, labels, inputs)
        return cls(images[:count], images[count:], None if labels is None else labels[count:], inputs)


@dataclass(frozen=True)
class SearchOptions:
    """How to look for a plan; see ``Rules`` for what it may do.

    Attributes:
        sensitivity: how the losses of convs are predicted. ``"errors"``: relative errors of the fitted
            convs; ``"fisher"``: weighted by the Fisher information of class scores; ``"outputs"``: times the
            measured sensitivity of all outputs; ``"auto"``: errors where the outputs are class scores (N, K),
            else outputs; ``"exact"``: every candidate of every conv is converted alone, which takes hours for
            a large model.
        verify: whether the plan and the best uniform one are converted and compared on held-out images, if
            their predictions are near each other, and latencies of whole plans measured where no ``table``
            is given.
        table: latencies measured on the device; None = measure them here, where the budget needs them.
        threads: intra-op threads of that measurement.
        cache: folder for what took long to measure: an interrupted search goes on; None = keep nothing.
        seed: seed of everything random.
        progress: show bars on stderr.
        task: what the model is taken for: ``"classes"``, judged by class probabilities, ``"outputs"``, judged
            by their relative error, or ``"auto"``, by the form of the outputs; see ``groupify.tasks``.
        metric: a model → how well it does, higher is better, measured on other images than those to fit on. A
            limit on the drop is then in its units, and holds as measured, since its error is not known.
        memory: bytes of moments, and of activations that wait while plans are converted, in memory; None = 2
            GiB of the former, and half of what is free of the latter.
        stages: says what is being done; those of the run that this search is a part of.
    """

    sensitivity: str = AUTO
    verify: bool = True
    table: LatencyTable | None = None
    threads: int = 1
    cache: Path | None = None
    seed: int = 0
    progress: bool = False
    task: str = AUTO
    metric: Metric | None = None
    memory: int | None = None
    stages: Stages = field(default=SILENT, repr=False, compare=False)


def count_stages(budget: Budget | None, options: SearchOptions, *, images: bool) -> int:
    """Return how many stages a search has: measuring what convs lose, timing them, comparing plans."""
    timed = _times_convs(budget, options)
    return 1 + timed + (_compares(budget, options, images=images) or (timed and options.verify))


def _times_convs(budget: Budget | None, options: SearchOptions) -> bool:
    return options.table is None and _limits_latency(budget)


def _compares(budget: Budget | None, options: SearchOptions, *, images: bool) -> bool:
    return images and (options.verify or (budget is not None and budget.drop is not None))


def _limits_latency(budget: Budget | None) -> bool:
    return budget is not None and any(limit.quantity == LATENCY for limit in budget.limits)


def plan_for_budget(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    budget: Budget | str | None = None,
    images: Images | Tensor | None = None,
    *,
    groups: int | Mapping[str, int] | GroupCounts | None = None,
    example_inputs: Any = None,
    rules: Rules = Rules(),
    options: SearchOptions = SearchOptions(),
    convert_plan: ConvertPlan | None = None,
) -> BudgetPlan:
    """Find the plan that loses the least within a budget, or at the MACs of plain groups.

    Every conv gets the structure for which the predicted losses of all convs add up to the
    least within all limits. If the best uniform plan (the same number of groups everywhere) within the same
    limits is predicted to lose less than twice as much, both are converted; whichever diverges less from the
    dense model on held-out images is returned, of those that hold a limit on the drop. A model without class
    scores diverges by the relative error of its outputs. A limit on the latency is held by measured ones:
    plans are timed, and the limit on what is predicted for them corrected until both agree. For a limit on
    the drop alone, the smallest plan that holds it is searched by bisection over the MACs (over the latency,
    if there is a table of it), each step converted and measured. A plan holds it if the drop on other images
    of the same kind is within the limit with 95% confidence, for all plans tried together; see
    ``groupify.paired``. Too few images to tell that are refused.

    Args:
        model: a dense model; left untouched.
        input_shape: (C, H, W) of one image, for a model of one input.
        budget: for example ``"macs=40%,params=8M"``; None = the MACs that ``groups`` would leave.
        images: unlabelled calibration images, of which a quarter is held out, or ``Images``. None = predict
            from the weights alone, and compare nothing.
        groups: in the place of ``budget``, number of plain groups whose MACs are the limit, or numbers by
            name as for ``plan``, where convs that get none stay as they are. With neither, 4.
        example_inputs: in the place of ``input_shape``, what the model is called with; see ``plan``.
            ``Images`` then need ``inputs``.
        rules: which convs may be converted and into what; by default what is fast on this machine's
            processor.
        options: how to look for the plan.
        convert_plan: what converts the plans that are compared, for callers that want the models too; None =
            ``convert`` with the images to fit on. Where the options have a cache, it is to do the same: a
            plan that was measured before is not converted again.

    Raises:
        PlanError: the budget cannot be held; says by how much. Or ``groups`` divide no conv.
        SpecError: the budget or an option cannot be understood, or ``groups`` are given beside it; a limit on
            the drop comes without images, or for a model without class scores.
        ConversionError: the model does not run on such inputs, or cannot be converted.
    """
    expect_type(rules, Rules, "rules", "groupify.Rules(...)")
    expect_type(options, SearchOptions, "options", "groupify.SearchOptions(...)")
    expect_type(budget, (str, Budget, type(None)), "budget", 'a text like "latency=2x"')
    expect_type(images, (Images, Tensor, type(None)), "images", "a tensor (N, C, H, W), or groupify.Images")
    model = unwrapped(model)
    example = one_example(input_shape, example_inputs)
    if isinstance(budget, str):
        budget = Budget.parse(budget)
    if budget is None:
        counts = DEFAULT_GROUPS if groups is None else GroupCounts.of(groups)
        rules = keep_ungrouped(rules, counts, model)
        budget = budget_like_groups(model, example, counts, rules)
    elif groups is not None:
        raise SpecError(BOTH)
    if isinstance(images, Tensor):
        images = Images.split(images)
    if budget.drop is not None and images is None:
        raise SpecError(f"{budget} limits the drop of accuracy, which needs images; give --data")
    needs_latency = options.table is not None or _limits_latency(budget)
    call = as_call(example, model)
    outputs = run_once(model, call)
    task = task_of(outputs, options.task)
    if budget.drop is not None and task != CLASSES and options.metric is None:
        raise SpecError(
            f"{budget} limits the drop of accuracy, but the model's outputs are {describe_outputs(outputs)}; "
            "give a metric, --metric module:function, or limit the macs, params, bytes or latency instead"
        )
    captured = capture(model, call)
    costing = make_costing(model, example, images, rules, options, latency=needs_latency, captured=captured)
    judge, finder = None, _finder(model, budget, costing, options)
    if images is not None and _compares(budget, options, images=True):
        judge = HeldOut(model, images, options, convert_plan)
    _begin_race(finder, judge, _pace(model, example, costing.choices), options)
    found = Race(finder, judge, progress=options.progress).run()
    names = [site.name for site in found.plan.converted]
    shown = limits(model, names, call, captured)
    plan = replace(found.plan, notes=shown.notes, captured=shown.captured)
    return replace(found, plan=plan, task=describe_task(outputs, task))


def make_costing(
    model: nn.Module,
    example: Example,
    images: Images | None,
    rules: Rules,
    options: SearchOptions,
    *,
    latency: bool,
    captured: Captured | None = None,
) -> Costing:
    """Measure all that a plan is chosen by: costs, sensitivities and, if asked for, latencies.

    ``captured`` is what capturing the graph of the model found; None = capture it where it is needed.
    """
    if options.sensitivity not in SENSITIVITIES:
        raise SpecError(
            f"unknown sensitivity {options.sensitivity!r}, expected one of {', '.join(SENSITIVITIES)}"
        )
    if latency and isinstance(example, Call):
        raise SpecError(
            "a limit on the latency is for models of one input, given as input_shape; limit the MACs or the "
            "parameters of this one"
        )
    if rules.precision == INT8 and isinstance(example, Call):
        raise SpecError("int8 is for models of one input, given as input_shape; plan for float32")
    choices = candidates(model, example, rules)
    dense = measure_cost(model, as_call(example, model, batch=1))
    pace = _pace(model, example, choices)
    guess = None if images is None else functools.partial(pace.sensitivity, choices, len(images.fit))
    options.stages.begin(_measuring(choices, images), guess)
    sensitivity = _sensitivity(model, choices, images, options, captured)
    if not latency:
        return Costing(choices, sensitivity, dense)
    table = options.table
    if table is None:
        choices = worth_timing(choices, sensitivity, rules.cpu_block)
        missing = count_missing(model, choices, threads=options.threads, cache=options.cache)
        known = "" if missing else ": known from an earlier run"
        options.stages.begin(
            f"timing {len(choices.open_sites)} convs and what could replace them{known}",
            functools.partial(pace.timing, choices, missing) if missing else None,
        )
        table = cached_table(
            model, choices, threads=options.threads, cache=options.cache, progress=options.progress
        )
    return Costing(choices, sensitivity, dense, look_up(table, model, choices))


def _measuring(choices: Choices, images: Images | None) -> str:
    """Say what the sensitivity takes."""
    lost = f"what each of {len(choices.open_sites)} convs would lose"
    return f"predicting {lost}" if images is None else f"measuring {lost}, on {len(images.fit)} images"


def _pace(model: nn.Module, example: Example, choices: Choices) -> Pace:
    return Pace(model, example, sum(options[0].site.macs.dense for options in choices.sites))


def _begin_race(finder: Finder, judge: HeldOut | None, pace: Pace, options: SearchOptions) -> None:
    """Say that plans compete, if they do."""
    if judge is None:
        if finder.timer is not None:
            options.stages.begin("timing the best plans as a whole")
        return
    plans = _to_convert(finder, judge)
    if not plans:
        # Without a limit on the drop a plan that nothing comes near is taken as it is.
        options.stages.begin(
            "comparing plans by predicted losses: none comes near the best, so none is converted"
            if finder.timer is None
            else "timing the best plans as a whole"
        )
        return
    smallest = [candidates[-1].site for candidates in finder.costing.choices.open_sites]
    doing = "converting" if finder.timer is None else "timing and converting"
    options.stages.begin(
        f"{doing} the best plans, compared on {judge}",
        lambda: plans * pace.fit(smallest, len(judge.images.fit)),
    )


def _to_convert(finder: Finder, judge: HeldOut) -> int:
    """Return how many plans are converted to be compared, as far as can be told before they are timed."""
    try:
        return Race(Finder(finder.budget, finder.costing), judge).to_convert()
    except PlanError:  # the race says it, if that is still so with measured latencies
        return len(finder.costing.sensitivity.powers)


def _finder(model: nn.Module, budget: Budget, costing: Costing, options: SearchOptions) -> Finder:
    """Return what finds plans; it times them, unless that is not wanted or a table says it all."""
    if costing.latencies is None or options.table is not None or not options.verify:
        return Finder(budget, costing)
    timer = PlanTimer(
        model, costing.choices, costing.latencies.dense_ms, threads=options.threads, cache=options.cache,
        progress=options.progress,
    )  # fmt: skip
    return Finder(budget, costing, timer, timer.again)


def _sensitivity(
    model: nn.Module,
    choices: Choices,
    images: Images | None,
    options: SearchOptions,
    captured: Captured | None,
) -> Sensitivity:
    if images is None:
        return weight_sensitivity(
            model, choices, seed=options.seed, progress=options.progress, captured=captured
        )
    how: dict[str, Any] = {
        "inputs": images.inputs,
        "seed": options.seed,
        "cache": options.cache,
        "progress": options.progress,
    }
    if options.sensitivity == EXACT:
        return exact_sensitivity(model, choices, images.fit, images.held_out, **how)
    how["task"] = options.task
    if options.memory is not None:
        how["memory"] = options.memory
    return measure_sensitivity(model, choices, images.fit, of=options.sensitivity, captured=captured, **how)


class HeldOut:
    """Converts plans and measures them on held-out images, each plan once; one for int8 as its int8 file.

    With a cache in the options and without a metric, what was measured is kept there.

    Args:
        model: the dense model; left untouched.
        images: to fit on, and to measure on.
        options: seed and progress of the conversion, the task, the metric and the cache.
        convert_plan: what converts a plan; None = ``convert`` with the images to fit on.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        options: SearchOptions = SearchOptions(),
        convert_plan: ConvertPlan | None = None,
    ) -> None:
        self._model, self.images, self._options = model, images, options
        self._convert = convert_plan or self._fit
        self._judge = Judge(
            model, images.held_out, images.labels, inputs=images.inputs, task=options.task,
            metric=options.metric,
        )  # fmt: skip
        # A function of the caller's has no fingerprint that a file could be known by.
        keep = None if options.metric is not None else options.cache
        self._known = Judgements() if keep is None else self._kept(keep)

    def _kept(self, folder: Path) -> Judgements:
        images, options = self.images, self._options
        labels = () if images.labels is None else (images.labels,)
        setting = (str(options.seed), options.task, str(options.memory))
        return Judgements.of(
            folder, self._model, (images.fit, images.held_out, *labels), images.inputs, *setting
        )

    @property
    def labelled(self) -> bool:
        """Whether the drop is one of accuracy, and not of agreement."""
        return self._judge.labelled

    def images_for(self, drop: float, confidence: float) -> int | None:
        """Return how many images it takes to tell a drop; None where there are enough."""
        return self._judge.images_for(drop, confidence)

    def __call__(self, plan: Plan) -> Judgement:
        """Return how far a plan is from the dense float32 model, in the precision that it is for."""
        known = self._known.get(plan)
        if known is not None:
            return known
        model = self._convert(plan)
        if plan.precision == INT8:
            model = self._in_int8(model)
        found = self._judge.judge(model)
        self._known.put(plan, found)
        return found

    def _in_int8(self, model: nn.Module) -> nn.Module:
        """Return a model as ONNX Runtime runs it in int8, its ranges from the images to fit on."""
        fit = self.images.fit
        with tempfile.TemporaryDirectory(prefix="groupify-") as folder:
            exported = export_onnx(model, Path(folder, "float32.onnx"), input_shape=tuple(fit.shape[1:]))
            ranges = fit[:_CALIBRATION_IMAGES]
            int8 = quantize_onnx(exported.path, Path(folder, "int8.onnx"), images=ranges)
            return OnnxModule(int8.path, threads=self._options.threads)

    def __str__(self) -> str:
        return f"{len(self._judge)} held-out {'labelled' if self.labelled else 'unlabelled'} images"

    def _fit(self, plan: Plan) -> nn.Module:
        options = self._options
        fit = FitOptions(task=options.task)
        calibration = Calibration(self.images.fit, inputs=self.images.inputs, fit=fit, memory=options.memory)
        return convert(self._model, plan, calibration, seed=options.seed, progress=options.progress).model
