"""Where a channel shuffle is worth its latency: ``--shuffle auto``.

A shuffle behind a grouped conv mixes the groups for the convs that read it, and it is the one permutation
that cannot be folded into weights. Two trial conversions, without shuffles and with one at every place that
could gain, give the fitted errors of all convs, from the moments of the in-order fit. Their exports, timed
in turns in ONNX Runtime, give what the shuffles cost together in this model, on this machine, in the form
they are lowered to; each place carries its share by the size of its tensor.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, fx, nn

from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.errors import PlanError
from groupify.graph.operations import CONVS
from groupify.graph.trace import trace
from groupify.measure.benchmarks import benchmark_onnx, speed_up
from groupify.onnx.exporting import export_onnx
from groupify.planning.slow_kernels import shuffle_work
from groupify.structures import GROUPED, Plan, SitePlan

# The mean fitted error that 1% of latency has to buy: what it buys where the groups are made fewer instead.
# On the demo, 8 groups → 4 lower the error by 0.0019 for each 1% of MACs, and 4 → 2 by 0.0013.
ERROR_PER_PERCENT = 0.0015
TIMING_SECONDS = 2.0


@dataclass(frozen=True)
class ShufflePlace:
    """A place where a shuffle could go.

    Attributes:
        name: the conv in front of it.
        readers: the converted convs that read its output.
        gain: by how much it lowers the mean fitted error of all converted convs. What a conv gains is put
            down in equal parts to the places that it reads.
        cost: the latency it adds, as a share of the latency without any shuffle.
        chosen: whether it gets one.
    """

    name: str
    readers: tuple[str, ...]
    gain: float
    cost: float
    chosen: bool


@dataclass(frozen=True)
class ShuffleChoice:
    """A plan with shuffles where they pay, and the measurements behind it.

    Attributes:
        plan: the plan; the reason of each site says why it has a shuffle or not.
        places: all places that could gain.
        error_without, error_with: mean fitted error without shuffles and with one at every place.
        milliseconds_without, milliseconds_with: median latency of the two, one image, timed in turns.
        error_per_percent: the exchange rate: the gain that was asked for each 1% of latency.
    """

    plan: Plan
    places: tuple[ShufflePlace, ...]
    error_without: float
    error_with: float
    milliseconds_without: float
    milliseconds_with: float
    error_per_percent: float


def choose_shuffles(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration | Tensor,
    *,
    target: str = "auto",
    threads: int = 1,
    error_per_percent: float = ERROR_PER_PERCENT,
    seconds: float = TIMING_SECONDS,
    seed: int = 0,
    progress: bool = False,
) -> ShuffleChoice:
    """Return a plan with a shuffle wherever its measured gain is worth its measured latency.

    It takes two conversions and two exports. Gains are repeatable, latencies are measured: a place whose
    gain is close to what its latency asks for may get a shuffle in one run and none in the next.

    Args:
        model: the dense model; left untouched.
        plan: what is converted; shuffles in it are ignored.
        calibration: unlabelled images, as for ``convert``.
        target: the processor that will run the ONNX file; see ``blocked_width``.
        threads: intra-op threads of the timing.
        error_per_percent: the mean fitted error that 1% of latency has to buy.
        seconds: measuring time.
        seed: as for ``convert``.
        progress: show bars on stderr.

    Raises:
        PlanError: the model cannot be traced, or the kind of a site takes no shuffle.
        GroupifyError: the model cannot be converted or exported.
    """
    if isinstance(calibration, Tensor):
        calibration = Calibration(calibration)
    calibration = dataclasses.replace(calibration, reconstruction=ReconstructionOptions(steps=0))
    readers = _readers(model, plan)
    without = with_shuffles(plan, ())
    if not readers:
        reasons = {site.name: "no shuffle: no grouped conv reads it" for site in plan.converted}
        return ShuffleChoice(_explained(without, reasons), (), *(float("nan"),) * 4, error_per_percent)
    trials = {"without": without, "with": with_shuffles(plan, tuple(readers))}
    errors: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="groupify-") as folder:
        files = {}
        for name, trial in trials.items():
            conversion = convert(model, trial, calibration, seed=seed, progress=progress)
            errors[name] = {fit.name: fit.error for fit in conversion.fits}
            files[name] = export_onnx(
                conversion.model, Path(folder) / f"{name}.onnx", input_shape=plan.input_shape, target=target
            ).path
        rows = benchmark_onnx(
            files,
            input_shape=plan.input_shape,
            threads=(threads,),
            seconds=seconds,
            seed=seed,
            progress=progress,
        )
    slow_down = max(0.0, speed_up(rows[1], rows[0]) - 1)
    places = weigh(plan, readers, errors["without"], errors["with"], slow_down, error_per_percent)
    chosen = with_shuffles(plan, tuple(place.name for place in places if place.chosen))
    reasons = {site.name: "no shuffle: no grouped conv reads it" for site in plan.converted}
    reasons |= {place.name: _reason(place, error_per_percent) for place in places}
    return ShuffleChoice(
        plan=_explained(chosen, reasons),
        places=places,
        error_without=_mean(errors["without"]),
        error_with=_mean(errors["with"]),
        milliseconds_without=rows[0].median_ms,
        milliseconds_with=rows[1].median_ms,
        error_per_percent=error_per_percent,
    )


def weigh(
    plan: Plan,
    readers: Mapping[str, tuple[str, ...]],
    without: Mapping[str, float],
    with_all: Mapping[str, float],
    slow_down: float,
    error_per_percent: float,
) -> tuple[ShufflePlace, ...]:
    """Put gains and costs down to places, and choose.

    Args:
        plan: gives the size of the tensors, by which the cost is shared out.
        readers: place → converted convs that read it.
        without, with_all: fitted error of each conv without shuffles and with one at every place.
        slow_down: latency that all shuffles add together, as a share of the latency without.
        error_per_percent: the exchange rate.
    """
    sites = {site.name: site for site in plan.converted}
    sources = {reader: sum(reader in others for others in readers.values()) for reader in without}
    work = {name: shuffle_work(sites[name]) for name in readers}
    places = []
    for name, read_by in readers.items():
        gain = sum((without[reader] - with_all[reader]) / sources[reader] for reader in read_by) / len(
            without
        )
        cost = slow_down * work[name] / sum(work.values())
        chosen = gain > 0 and gain >= error_per_percent * 100 * cost
        places.append(ShufflePlace(name, read_by, gain, cost, chosen))
    return tuple(places)


def with_shuffles(plan: Plan, names: tuple[str, ...]) -> Plan:
    """Return the plan with a shuffle behind the named sites and nowhere else."""
    sites = tuple(dataclasses.replace(site, shuffle=site.name in names) for site in plan.sites)
    return dataclasses.replace(plan, sites=sites)


def _readers(model: nn.Module, plan: Plan) -> dict[str, tuple[str, ...]]:
    """Place → converted convs that read its output, other dense layers between them excluded.

    In front of a dense conv or linear layer a shuffle changes nothing, and is folded away.
    """
    other = next((site for site in plan.converted if site.kind != GROUPED), None)
    if other is not None:
        raise PlanError(f"site {other.name!r} of kind {other.kind!r} takes no shuffle; leave it at none")
    traced = trace(model)
    if traced.module is None:
        raise PlanError(
            f"shuffle auto needs a model that can be traced, to know what reads what ({traced.problem}); "
            "choose none or all"
        )
    sites = {site.name for site in plan.converted}
    found: dict[str, tuple[str, ...]] = {}
    for node in traced.module.graph.nodes:
        if node.op == "call_module" and str(node.target) in sites:
            reached = _reached(traced.module, node, sites)
            known = found.get(str(node.target), ())
            found[str(node.target)] = (*known, *(name for name in reached if name not in known))
    return {name: read_by for name, read_by in found.items() if read_by}


def _reached(traced: fx.GraphModule, start: fx.Node, sites: set[str]) -> list[str]:
    reached: list[str] = []
    seen: set[fx.Node] = set()
    stack = list(start.users)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_module":
            name, module = str(node.target), traced.get_submodule(str(node.target))
            if name in sites:
                if name not in reached:
                    reached.append(name)
                continue
            if isinstance(module, nn.Linear) or (isinstance(module, CONVS) and module.groups == 1):
                continue
        stack.extend(node.users)
    return sorted(reached)


def _explained(plan: Plan, reasons: Mapping[str, str]) -> Plan:
    def explain(site: SitePlan) -> SitePlan:
        if site.name not in reasons:
            return site
        return dataclasses.replace(site, reason="; ".join(filter(None, (site.reason, reasons[site.name]))))

    return dataclasses.replace(plan, sites=tuple(explain(site) for site in plan.sites))


def _reason(place: ShufflePlace, error_per_percent: float) -> str:
    sign = "" if place.chosen else "no "
    return (
        f"{sign}shuffle: fitted error {-place.gain:+.5f} for {100 * place.cost:.2f}% latency, "
        f"which asks for {-error_per_percent * 100 * place.cost:+.5f}"
    )


def _mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / len(errors)
