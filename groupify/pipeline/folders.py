"""An output folder, opened to go on from it: its model, the dense model and its weights, the precisions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from groupify.artefact import load, read_recipe
from groupify.devices import find_device
from groupify.errors import ArtefactError, SpecError
from groupify.machine import find_cpu
from groupify.models.sources import load_model
from groupify.models.specs import Source
from groupify.pipeline.compressed import Compressed
from groupify.pipeline.inputs import from_recipe, tell_preprocessing, with_data
from groupify.pipeline.requests import FinetuneRequest
from groupify.planning.sites import describe
from groupify.recipe import Recipe
from groupify.reporting.read import REPORT_FILE
from groupify.reporting.results import MetricChange, Report
from groupify.structures import FLOAT32, PRECISIONS, FilePrecision, Precision


def open_folder(request: FinetuneRequest) -> Compressed:
    """Load the model of an output folder, the dense model that it was made from, and data.

    Raises:
        GroupifyError: anything that cannot be done as asked.
    """
    device = find_device(request.device)
    model = load(request.folder, trust=request.trust).to(device)
    recipe = read_recipe(request.folder)
    task = recipe.task if request.task is None else request.task
    source = dense_source(recipe, request.checkpoint, beside=request.folder, trust=request.trust)
    source, data = with_data(
        from_recipe(source.on(device)), request.data, request.preprocessing, seed=request.seed, task=task
    )
    tell_preprocessing(source, data)
    shape = source.spec.input_shape
    # A recipe that was not made by a run need not say which processor it was planned for.
    plan = describe(source.model, recipe.sites, shape, recipe.cpu or find_cpu())
    return Compressed(
        model, recipe.sites, (), "as before the fine-tune", (), None, None, {},
        plan=replace(plan, precision=recipe.precision),
        source=source,
        example=shape,
        data=data,
        found_by=recipe.calibration,
        seed=request.seed,
        task=task,
        budget=recipe.budget,
        metric=request.metric,
        measured_by_metric=_metric_of(request.folder),
    )  # fmt: skip


def _metric_of(folder: Path) -> MetricChange | None:
    """Return what a folder's report says of a user's metric, as before another training."""
    try:
        known = Report.read(folder / REPORT_FILE).metric
    except ArtefactError:  # none, or one of another version
        return None
    if known is None:
        return None
    converted = known.converted if known.recovered is None else known.recovered
    return replace(known, converted=converted, recovered=None)


def precisions_of(folder: Path) -> tuple[Precision, ...]:
    """Return the precisions of a folder's ONNX files; where it has none, the one that it was planned for."""
    found = [precision for precision in PRECISIONS if (folder / model_file(precision)).is_file()]
    return tuple(found) or (read_recipe(folder).precision,)


def model_file(precision: FilePrecision) -> str:
    """Name of an ONNX file in a folder: ``model.onnx``, ``model.int8.onnx``."""
    return "model.onnx" if precision == FLOAT32 else f"model.{precision}.onnx"


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
    if checkpoint is None and origin.kind == "given":
        raise SpecError(
            "the dense weights are needed as a teacher and were those of a model in memory: give "
            "--checkpoint FILE, or call finetune on the result in Python"
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
