"""A plan for a budget: predict, allocate, and let the plan race against uniform groups."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from groupify.conversion.conversion import Calibration, convert
from groupify.errors import PlanError, SpecError
from groupify.graph.trace import example_input
from groupify.measure.latency_table import LatencyTable, cached_table, look_up
from groupify.planning.budget import LATENCY, MACS, Budget
from groupify.planning.candidates import Uniform, candidates
from groupify.planning.costing import Chosen, Costing, shown
from groupify.planning.limits import limits as limits_of
from groupify.planning.plan_timer import PlanTimer
from groupify.planning.rules import Rules
from groupify.planning.sensitivity import (
    Sensitivity,
    exact_sensitivity,
    measure_sensitivity,
    weight_sensitivity,
)
from groupify.scores import Judge, Judgement, measure_cost
from groupify.structures import Plan

SENSITIVITIES = ("fisher", "exact")
_POWERS = (1.0, 0.5)
_BISECTIONS = 6
_CLOSE = 0.01  # relative to the cost: a nearer bisection would only resolve noise
_HELD_OUT = 0.25
_TIMINGS = 6
_CLOSEST = 1.002  # limits that are nearer than this give the same plans
_WIDER = 1.02
_SLACK = 0.03  # a plan that is faster than asked by more than this could lose less
_WARM = 0.85  # of the predicted latency: a plan that is faster than this has its weights in the caches
_WARMER = 1.2  # how much more than other plans one may be faster than predicted
_NOISE = 0.01  # what a measured latency may be over its limit

ConvertPlan = Callable[[Plan], nn.Module]


@dataclass(frozen=True)
class Images:
    """Images to plan on, preprocessed as for inference.

    Attributes:
        fit: unlabelled calibration images to fit on, shape (N, C, H, W).
        held_out: other images, on which plans are compared.
        labels: class numbers of those, shape (M,); None = unlabelled. Only a limit on the drop reads them.
    """

    fit: Tensor
    held_out: Tensor
    labels: Tensor | None = None

    @classmethod
    def split(cls, images: Tensor, labels: Tensor | None = None) -> Images:
        """Hold the last quarter out; of a single image, the image itself."""
        count = max(1, round(len(images) * (1 - _HELD_OUT)))
        if count == len(images):
            return cls(images, images, labels)
        return cls(images[:count], images[count:], None if labels is None else labels[count:])


@dataclass(frozen=True)
class Contender:
    """One plan in the race.

    Attributes:
        name: ``"planned"``, or which uniform plan it is.
        uniform: whether it has the same number of groups everywhere.
        chosen: index of each conv's candidate.
        loss: predicted divergence.
        costs: MACs, parameters, bytes and, where asked for, milliseconds of the whole model: measured ones,
            unless they come from a table of another device.
        measured: by converting it; None where that was not done.
    """

    name: str
    uniform: bool
    chosen: Chosen
    loss: float
    costs: Mapping[str, float]
    measured: Judgement | None = None


@dataclass(frozen=True)
class BudgetPlan:
    """The plan for a budget, and what it won against.

    Attributes:
        plan: the winner's.
        budget: what was asked for.
        contenders: the winner first, then the others from best to worst.
        dense_costs: MACs, parameters, bytes and milliseconds of the dense model.
        costing: choices, sensitivities and costs that it was made from.
        method: one line on how the losses were predicted.
        labelled: whether the measured drop is one of accuracy, and not of agreement.
    """

    plan: Plan
    budget: Budget
    contenders: tuple[Contender, ...]
    dense_costs: Mapping[str, float]
    costing: Costing
    method: str
    labelled: bool

    @property
    def winner(self) -> Contender:
        """The contender whose plan it is."""
        return self.contenders[0]


@dataclass(frozen=True)
class SearchOptions:
    """How to look for a plan; see ``Rules`` for what it may do.

    Attributes:
        sensitivity: ``"fisher"``, or ``"exact"`` to convert every candidate of every conv alone and measure
            the divergence, which takes hours for a large model.
        verify: whether the plan and the best uniform one are converted and compared on held-out images, and
            latencies of whole plans measured where no ``table`` is given.
        table: latencies measured on the device; None = measure them here, where the budget needs them.
        threads: intra-op threads of that measurement.
        cache: folder for what took long to measure; None = keep nothing.
        seed: seed of everything random.
        progress: show bars on stderr.
    """

    sensitivity: str = "fisher"
    verify: bool = True
    table: LatencyTable | None = None
    threads: int = 1
    cache: Path | None = None
    seed: int = 0
    progress: bool = False


def plan_for_budget(
    model: nn.Module,
    input_shape: tuple[int, ...],
    budget: Budget | str,
    images: Images | Tensor | None = None,
    *,
    rules: Rules = Rules(),
    options: SearchOptions = SearchOptions(),
    convert_plan: ConvertPlan | None = None,
) -> BudgetPlan:
    """Find the plan that loses the least within a budget.

    Every conv gets the kind and number of groups for which the predicted losses of all convs add up to the
    least within all limits. The plan is then converted, and so is the best uniform plan (the same number of
    groups everywhere) within the same limits; whichever diverges less from the dense model on held-out
    images is returned, of those that hold a limit on the drop. A limit on the latency is held by measured
    ones: plans are timed, and the limit on what is predicted for them corrected until both agree. For a
    limit on the drop alone, the smallest plan that holds it is searched by bisection over the MACs (over the
    latency, if there is a table of it), each step converted and measured.

    Args:
        model: a dense model; left untouched.
        input_shape: (C, H, W) of one image.
        budget: for example ``"macs=40%,params=8M"``.
        images: unlabelled calibration images, of which a quarter is held out, or ``Images``. None = predict
            from the weights alone, and compare nothing.
        rules: which convs may be converted and into what; by default what is fast on this machine's
            processor.
        options: how to look for the plan.
        convert_plan: what converts the plans that are compared, for callers that want the models too; None =
            ``convert`` with the images to fit on.

    Raises:
        PlanError: the budget cannot be held; says by how much.
        SpecError: the budget or an option cannot be understood, or a limit on the drop comes without images.
        ConversionError: the model does not run on that input shape, or cannot be converted.
    """
    if isinstance(budget, str):
        budget = Budget.parse(budget)
    if isinstance(images, Tensor):
        images = Images.split(images)
    if budget.drop is not None and images is None:
        raise SpecError(f"{budget} limits the drop of accuracy, which needs images; give --data")
    needs_latency = options.table is not None or any(limit.quantity == LATENCY for limit in budget.limits)
    costing = make_costing(model, input_shape, images, rules, options, latency=needs_latency)
    return _Search(model, budget, costing, images, options, convert_plan).run()


def make_costing(
    model: nn.Module,
    input_shape: tuple[int, ...],
    images: Images | None,
    rules: Rules,
    options: SearchOptions,
    *,
    latency: bool,
) -> Costing:
    """Measure all that a plan is chosen by: costs, sensitivities and, if asked for, latencies."""
    if options.sensitivity not in SENSITIVITIES:
        raise SpecError(
            f"unknown sensitivity {options.sensitivity!r}, expected one of {', '.join(SENSITIVITIES)}"
        )
    choices = candidates(model, input_shape, rules)
    dense = measure_cost(model, example_input(input_shape, like=model))
    sensitivity: Sensitivity
    if images is None:
        sensitivity = weight_sensitivity(model, choices, seed=options.seed, progress=options.progress)
    elif options.sensitivity == "exact":
        sensitivity = exact_sensitivity(
            model, choices, images.fit, images.held_out, seed=options.seed, cache=options.cache,
            progress=options.progress,
        )  # fmt: skip
    else:
        sensitivity = measure_sensitivity(
            model, choices, images.fit, seed=options.seed, cache=options.cache,
            progress=options.progress,
        )  # fmt: skip
    latencies = None
    if latency:
        table = options.table
        if table is None:
            table = cached_table(
                model, choices, threads=options.threads, cache=options.cache, progress=options.progress
            )
        latencies = look_up(table, model, choices)
    return Costing(choices, sensitivity, dense, latencies)


def measurer(
    model: nn.Module,
    costing: Costing,
    images: Images,
    options: SearchOptions,
    convert_plan: ConvertPlan | None = None,
) -> tuple[Judge, Callable[[Chosen], Judgement]]:
    """Return what converts plans and measures them on held-out images, each plan once."""
    judge = Judge(model, images.held_out, images.labels)
    known: dict[Chosen, Judgement] = {}

    def fit(plan: Plan) -> nn.Module:
        calibration = Calibration(images.fit)
        return convert(model, plan, calibration, seed=options.seed, progress=options.progress).model

    def measure(chosen: Chosen) -> Judgement:
        if chosen not in known:
            known[chosen] = judge.judge((convert_plan or fit)(costing.choices.plan(chosen)))
        return known[chosen]

    return judge, measure


class _Search:
    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        costing: Costing,
        images: Images | None,
        options: SearchOptions,
        convert_plan: ConvertPlan | None = None,
    ) -> None:
        self._model = model
        self._budget = budget
        self._costing = costing
        self._options = options
        self._judge: Judge | None = None
        self._powers: Sequence[float] = _POWERS
        if images is not None and (options.verify or budget.drop is not None):
            self._judge, self._judgement = measurer(model, costing, images, options, convert_plan)
        else:
            self._powers = _POWERS[:1]  # without a race there is nothing to tell variants apart by
        self._timer: PlanTimer | None = None
        self._measured_to_predicted: list[float] = []  # of the latencies of the plans that were timed
        if costing.latencies is not None and options.table is None and options.verify:
            self._timer = PlanTimer(
                model, costing.choices, costing.latencies.dense_ms, threads=options.threads,
                cache=options.cache, progress=options.progress,
            )  # fmt: skip

    def run(self) -> BudgetPlan:
        """Return the winner."""
        costs, drop = self._budget.costs, self._budget.drop
        dense = self._costing.dense_costs
        if costs:
            contenders = self._race({limit.quantity: limit.at_most(dense[limit.quantity]) for limit in costs})
            best = contenders[0].measured
            if drop is not None and best is not None and best.drop > drop:
                raise PlanError(
                    f"{self._budget} cannot be held together: within {' and '.join(map(str, costs))} the "
                    f"drop came to {best.drop:.2f} points on {self._images}; allow more of one of them"
                )
        else:
            assert drop is not None
            contenders = self._bisect(drop)
        return BudgetPlan(
            plan=self._plan(contenders[0].chosen),
            budget=self._budget,
            contenders=tuple(contenders),
            dense_costs=dense,
            costing=self._costing,
            method=self._costing.sensitivity.method,
            labelled=self._judge is not None and self._judge.labelled,
        )

    def _plan(self, chosen: Chosen) -> Plan:
        plan = self._costing.choices.plan(chosen)
        names = [site.name for site in plan.converted]
        example = example_input(plan.input_shape, like=self._model)
        return replace(plan, notes=limits_of(self._model, names, example))

    # one race ----------------------------------------------------------------------------------

    def _race(self, limits: Mapping[str, float]) -> list[Contender]:
        """All contenders within the limits, the best first."""
        dense = self._costing.dense_costs
        if all(dense[quantity] <= limit for quantity, limit in limits.items()):
            raise PlanError(f"{self._budget} allows all that the dense model costs; ask for less of it")
        contenders: list[Contender] = []
        for power in self._powers:
            chosen = self._best(limits, power)
            if all(chosen != other.chosen for other in contenders):
                name = "planned" if power == 1 else f"planned (losses to the power {power:g})"
                contenders.append(self._contender(name, chosen))
        for key, chosen in self._costing.uniform_within(self._loosened(limits)):
            if self._holds(chosen, limits):
                contenders.append(self._contender(uniform_name(key), chosen, uniform=True))
                break
        if self._judge is not None:
            contenders = [replace(c, measured=self._judgement(c.chosen)) for c in contenders]
        return sorted(contenders, key=self._rank)

    def _best(self, limits: Mapping[str, float], power: float) -> Chosen:
        """The plan that loses the least within limits; one on the latency is held by the measured one."""
        costing = self._costing
        if self._timer is None or LATENCY not in limits:
            chosen = costing.best(limits, power=power)
            if chosen is None:
                raise costing.refuse(self._budget.costs)
            return chosen
        tried = self._timed(costing, limits, power)
        if any(time < _WARM * costing.costs(chosen)[LATENCY] for chosen, time in tried.items()):
            tried |= self._timed(self._warm_costing, limits, power)
        if not tried:
            raise costing.refuse(self._budget.costs)
        holding = [chosen for chosen in tried if self._holds(chosen, limits)]
        if not holding:
            raise PlanError(
                f"{self._budget} cannot be held: the fastest plan that was tried has a measured "
                f"{shown(LATENCY, min(tried.values()), costing.dense_costs[LATENCY])}; allow more of it"
            )
        return min(holding, key=lambda chosen: costing.loss(chosen, power=power))

    def _timed(self, costing: Costing, limits: Mapping[str, float], power: float) -> dict[Chosen, float]:
        """Plans whose measured latencies approach the limit, with these.

        The limit on the predicted latency is corrected by how far the prediction was off.
        """
        asked, least = limits[LATENCY], costing.least(LATENCY) * (1 + 1e-9)
        predicted = max(asked, least)
        low, high = 0.0, math.inf  # limits on what is predicted: of a plan that holds, of one that does not
        tried: dict[Chosen, float] = {}
        while high > low * _CLOSEST:
            chosen = costing.best({**limits, LATENCY: predicted}, power=power)
            if chosen is None or (chosen not in tried and len(tried) == _TIMINGS):
                break
            if chosen not in tried:
                tried[chosen] = self._milliseconds(chosen)
                self._measured_to_predicted.append(tried[chosen] / self._costing.costs(chosen)[LATENCY])
            held = self._holds(chosen, limits)
            if (held and tried[chosen] >= asked * (1 - _SLACK)) or (not held and predicted == least):
                break
            if held:
                low = max(low, predicted)
            else:
                high = min(high, predicted)
            predicted = max(least, costing.costs(chosen)[LATENCY] * asked / tried[chosen])
            if not low < predicted < high:  # plans come in steps, and their times scatter
                predicted = max(least, math.sqrt(low * high) if high < math.inf else _WIDER * low)
            if predicted > costing.dense_costs[LATENCY]:
                break
        return tried

    @functools.cached_property
    def _warm_costing(self) -> Costing:
        """The costing for a model whose weights stay in the caches."""
        model, options, choices = self._model, self._options, self._costing.choices
        table = cached_table(
            model, choices, threads=options.threads, cache=options.cache, warm=True, progress=options.progress
        )
        return replace(self._costing, latencies=look_up(table, model, choices, warm=True))

    def _loosened(self, limits: Mapping[str, float]) -> Mapping[str, float]:
        """The limits, with that on a latency wide enough for all that measurement may find to hold it."""
        if self._timer is None or LATENCY not in limits:
            return limits
        return {**limits, LATENCY: _WARMER * limits[LATENCY] / min([1.0, *self._measured_to_predicted])}

    def _holds(self, chosen: Chosen, limits: Mapping[str, float]) -> bool:
        """Whether the measured latency, where there is one, is within its limit."""
        if self._timer is None or LATENCY not in limits:
            return True
        return self._milliseconds(chosen) <= limits[LATENCY] * (1 + _NOISE)

    def _milliseconds(self, chosen: Chosen) -> float:
        """Measured latency."""
        assert self._timer is not None
        return self._timer(self._costing.choices.plan(chosen))

    def _contender(self, name: str, chosen: Chosen, *, uniform: bool = False) -> Contender:
        costs = dict(self._costing.costs(chosen))
        if self._timer is not None:
            costs[LATENCY] = self._milliseconds(chosen)
        return Contender(name, uniform, chosen, self._costing.loss(chosen), costs)

    def _rank(self, contender: Contender) -> tuple[float, float, float, bool]:
        """What exceeds the drop, measured divergence, predicted one; where all are equal, uniform first."""
        measured, drop = contender.measured, self._budget.drop
        excess = 0.0 if measured is None or drop is None else max(0.0, measured.drop - drop)
        divergence = 0.0 if measured is None else measured.divergence
        return excess, divergence, contender.loss, not contender.uniform

    @property
    def _images(self) -> str:
        assert self._judge is not None
        kind = "labelled" if self._judge.labelled else "unlabelled"
        return f"{len(self._judge)} held-out {kind} images"

    # a limit on the drop -----------------------------------------------------------------------

    def _bisect(self, drop: float) -> list[Contender]:
        """The cheapest plan whose measured drop is within the limit, and what else was measured."""
        costing = self._costing
        quantity = LATENCY if costing.latencies is not None else MACS
        dense, least = costing.dense_costs[quantity], costing.least(quantity)
        low, high = math.log(least), math.log(dense)  # of what holds nothing; of what holds
        seen: list[Contender] = []
        steps = range(_BISECTIONS)
        for _ in tqdm(steps, desc="bisection", disable=None if self._options.progress else True, leave=False):
            if high - low < _CLOSE:
                break
            middle = (low + high) / 2
            raced = self._race({quantity: math.exp(middle)})
            seen += raced
            winner = raced[0]
            if winner.measured is not None and winner.measured.drop <= drop:
                high = min(middle, math.log(winner.costs[quantity]))
            else:
                low = middle
        holding = [c for c in seen if c.measured is not None and c.measured.drop <= drop]
        if not holding:
            best = min(seen, key=lambda c: c.measured.drop if c.measured is not None else math.inf)
            assert best.measured is not None
            raise PlanError(
                f"drop={drop:g} cannot be held: the mildest plan that was tried, with "
                f"{100 * best.costs[quantity] / dense:.0f}% of the {quantity}, lost {best.measured.drop:.2f} "
                f"points on {self._images}; allow a larger drop"
            )
        best = min(holding, key=lambda c: (c.costs[quantity], self._rank(c)))
        return [best, *sorted((c for c in seen if c is not best), key=lambda c: c.costs[quantity])]


def uniform_name(uniform: Uniform) -> str:
    """Return a name for a plan with one number of groups."""
    kind, groups, shuffle = uniform
    return f"uniform {kind}, {groups} groups" + (", shuffled" if shuffle else "")
