"""The first stage: the dense model, the data, and what is to be replaced."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from groupify.artefact import read_recipe
from groupify.data.ranks import Ranks
from groupify.data.splits import DataSplits
from groupify.errors import SpecError
from groupify.machine import find_cpu
from groupify.models.sources import load_model
from groupify.models.specs import Source
from groupify.pipeline.inputs import class_count, from_recipe, tell_preprocessing, with_data
from groupify.pipeline.planning import Planned, make_plan
from groupify.pipeline.requests import ConversionRequest, FinetuneRequest
from groupify.planning.plan_file import PlanFile
from groupify.planning.sites import describe
from groupify.planning.uniform import plan as plan_uniform
from groupify.recipe import Recipe
from groupify.reporting.budget import race_lines
from groupify.structures import Plan


@dataclass(frozen=True)
class Prepared:
    """What the stages work on.

    Attributes:
        source: the dense model.
        data: None = no data.
        plan: what is replaced.
        uniform: other plans by their number of groups, to convert with for comparison.
        notes: how the plan was found.
    """

    source: Source
    data: DataSplits | None
    plan: Plan
    uniform: dict[int, Plan] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def prepare_conversion(request: ConversionRequest, ranks: Ranks) -> Prepared:
    """Load the dense model and the data, and plan.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    if ranks.world > 1:
        _refuse_what_one_process_measures(request)
    source, data = with_data(
        request.model.load(request.seed), request.data, request.model.preprocessing, seed=request.seed
    )
    tell_preprocessing(source, data)
    if request.uniform:
        _check_comparable(request, source, data)
    planned = make_plan(
        request.plan, source, data, calibration_images=request.calibration_images, seed=request.seed
    )
    if request.plan.save is not None and ranks.first:
        PlanFile.of(source.spec.name, planned.plan).write(request.plan.save)
    notes = request.plan.notes
    if planned.found is not None:
        notes += race_lines(planned.found)
    return Prepared(source, data, planned.plan, _uniform_plans(request, source, planned), notes)


def _check_comparable(request: ConversionRequest, source: Source, data: DataSplits | None) -> None:
    """Refuse to compare accuracies where none can be measured."""
    start = "--uniform compares accuracies"
    if data is None:
        raise SpecError(f"{start}: give --data with labels and a test part")
    if class_count(source) is None:
        raise SpecError(
            f"{start}, and {source.spec.name} gives no logits of shape (N, classes): leave it out"
        )
    if not data.labelled:
        raise SpecError(f"{start}, and {request.data} has no labels: give other --data, or leave it out")
    if data.test is None:
        raise SpecError(f"{start}, and {request.data} has no test part: give other --data, or leave it out")


def _refuse_what_one_process_measures(request: ConversionRequest) -> None:
    if request.uniform:
        raise SpecError("--uniform is measured in one process: leave it out under torchrun")
    if request.plan.is_searched:
        raise SpecError(
            "structures are chosen for each conv in one process: write the plan with 'groupify plan "
            "MODEL --save-plan FILE', then give --plan FILE under torchrun; or give --groups 4"
        )


def _uniform_plans(request: ConversionRequest, source: Source, planned: Planned) -> dict[int, Plan]:
    """Return a plan for each number of groups in ``request.uniform``, each other than all before."""
    seen = [planned.plan.recipes]
    plans = {}
    rules = request.plan.rules
    if rules.structures is not None and not rules.is_uniform:
        rules = replace(rules, structures=None)
    for groups in request.uniform:
        made = plan_uniform(source.model, source.spec.input_shape, groups=groups, rules=rules)
        if made.recipes not in seen:
            seen.append(made.recipes)
            plans[groups] = made
    return plans


def prepare_finetune(request: FinetuneRequest) -> Prepared:
    """Load the dense model that an output folder was made from, and the data.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    recipe = read_recipe(request.folder)
    source = dense_source(recipe, request.checkpoint, beside=request.folder, trust=request.trust)
    source, data = with_data(from_recipe(source), request.data, request.preprocessing, seed=request.seed)
    tell_preprocessing(source, data)
    # A recipe that was not made by a run need not say which processor it was planned for.
    plan = describe(source.model, recipe.sites, source.spec.input_shape, recipe.cpu or find_cpu())
    return Prepared(source, data, plan)


def dense_source(recipe: Recipe, checkpoint: Path | None, *, beside: Path, trust: bool) -> Source:
    """Load the dense model that a recipe was made from, weights included.

    Args:
        recipe: says which model.
        checkpoint: the weights; None = those that the recipe names.
        beside: the recipe's folder; a checkpoint is also looked for from where that lies.
        trust: whether code may be imported.

    Raises:
        SpecError: the recipe does not say where its weights can be had; name the file.
    """
    spec, origin = recipe.model, recipe.weights
    if ":" in spec.name and not trust and not spec.name.startswith("groupify.models.demo:"):
        raise SpecError(
            f"the recipe's model {spec.name!r} is code of its own: give --model {spec.name} if you trust it"
        )
    if checkpoint is None and origin.kind == "checkpoint":
        checkpoint = _checkpoint_of(str(origin.value), beside)
    weights = {"torchvision": origin.value, "random": "none"}.get(origin.kind, "auto")
    source = load_model(
        spec.name,
        weights=str(weights),
        checkpoint=checkpoint,
        arguments=spec.arguments,
        input_shape=spec.input_shape,
        seed=origin.value if isinstance(origin.value, int) else 0,
    )
    return Source(source.model, spec, recipe.weights)


def _checkpoint_of(name: str, folder: Path) -> Path:
    """Return the file that a recipe names, as seen from here or from where its folder lies."""
    for file in (Path(name), folder.absolute().parent / name):
        if file.is_file():
            return file
    raise SpecError(
        f"the dense weights are needed as a teacher and came from 'checkpoint {name}', which is not here; "
        "give --checkpoint FILE"
    )
