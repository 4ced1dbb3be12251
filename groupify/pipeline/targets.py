"""What is done with an output folder or a dense model: evaluate it, export it, time its convs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from groupify.artefact import WEIGHTS_FILE, load, read_recipe
from groupify.data.splits import DataSplits
from groupify.devices import AUTO, find_device
from groupify.errors import ArtefactError, DataError, SpecError
from groupify.files import folder_exists
from groupify.measure.latency_table import LatencyTable
from groupify.models.sources import build_model
from groupify.models.specs import Source
from groupify.onnx.python_file import write_python_file
from groupify.pipeline.exporting import export_and_check, export_result, paths_of
from groupify.pipeline.inputs import from_file, from_recipe, tell_preprocessing, warn_near_chance, with_data
from groupify.pipeline.onnx_source import is_onnx_file, onnx_source
from groupify.pipeline.planning import make_table
from groupify.pipeline.requests import ExportOptions, ModelRequest
from groupify.pipeline.timing import int8_notes, time_int8
from groupify.recipe import Recipe
from groupify.reporting.results import ExportResult
from groupify.scores import Accuracy, evaluate
from groupify.structures import FLOAT32, Precision
from groupify.tasks import AUTO as TASK_BY_FORM
from groupify.tasks import OUTPUTS


def open_target(
    target: ModelRequest, data: str | None, seed: int
) -> tuple[Source, DataSplits | None, Recipe | None]:
    """Load an output folder or a dense model, and data for it.

    Returns:
        The model, the data, and its recipe; None where it has none.

    Raises:
        GroupifyError: it is neither, or the data cannot be had or do not fit.
    """
    source, recipe = _load_target(target, seed)
    task = TASK_BY_FORM if recipe is None else recipe.task
    return *with_data(source, data, target.preprocessing, seed=seed, task=task), recipe


def _load_target(target: ModelRequest, seed: int) -> tuple[Source, Recipe | None]:
    if is_onnx_file(target.name):
        raise SpecError(f"{target.name!r} is an ONNX file already: give an output folder, or a dense model")
    device = find_device(target.device)
    if folder_exists(target.name):
        target.check_for_folder()
        recipe = read_recipe(target.name)
        source = Source(load(target.name, trust=target.trust), recipe.model, recipe.weights)
        return from_recipe(source.on(device)), recipe
    if os.sep in target.name or "/" in target.name:  # both separate on Windows
        raise ArtefactError(
            f"no folder {target.name!r}; expected an output folder of 'groupify convert', or a model"
        )
    try:
        return target.load(seed), None
    except SpecError as error:
        raise SpecError(f"no folder {target.name!r}, and as a model: {error}") from error


def run_evaluation(target: ModelRequest, data: str, *, seed: int = 0, progress: bool = False) -> Accuracy:
    """Measure the accuracy of an output folder, a dense model or an ONNX file on the test part of a data set.

    Raises:
        DataError: there is no labelled test part.
        GroupifyError: the model or the data cannot be had.
    """
    if is_onnx_file(target.name):
        if target.device not in (AUTO, "cpu"):
            raise SpecError(
                f"--device {target.device}: ONNX files run in ONNX Runtime, on the CPU; leave it out"
            )
        source = from_file(onnx_source(target.name, target.input_shape))
        source, splits = with_data(source, data, target.preprocessing, seed=seed)
    else:
        source, splits, recipe = open_target(target, data, seed)
        if recipe is not None and recipe.task == OUTPUTS:
            raise SpecError(
                f"{target.name} was converted as --task {OUTPUTS}: its outputs are no class scores"
            )
    tell_preprocessing(source, splits)
    if splits is None or not splits.labelled or splits.test is None:
        raise DataError(f"data {data!r} has no labelled test part to measure accuracy on")
    accuracy = evaluate(source.model, splits.test, progress=progress)
    warn_near_chance(accuracy, source, splits)
    return accuracy


def run_export(
    target: ModelRequest,
    path: Path,
    options: ExportOptions,
    *,
    data: str | None = None,
    force: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> ExportResult:
    """Export an output folder or a dense model in one precision or two, and check the files.

    Args:
        target: the folder or model.
        path: the file; of two precisions the float file, and the int8 file goes beside it.
        options: how.
        data: data spec with real images for the check and for int8.
        force: replace existing files.
        seed: of the check's inputs and the choice of images.
        progress: show bars on stderr.

    Raises:
        ParityError: the file computes something else than the model.
        GroupifyError: anything that cannot be done as asked.
    """
    options.check(data)
    wanted = paths_of(path, options)
    check_paths(*wanted.values(), force=force)
    source, splits, recipe = open_target(target, data, seed)
    tell_preprocessing(source, splits)
    with tempfile.TemporaryDirectory(prefix="groupify-") as aside:
        exported = export_and_check(
            source.model, source.spec, {FLOAT32: Path(aside, path.name), **wanted}, options, splits,
            recipe_sha256=None if recipe is None else recipe.sha256,
            task=TASK_BY_FORM if recipe is None else recipe.task, seed=seed, progress=progress,
        )  # fmt: skip
        exported = time_int8(exported, source.spec, options, progress=progress)
    return export_result(exported, wanted, int8_notes(exported.int8))


def export_python(folder: str, path: Path, *, force: bool = False, trust: bool = False) -> Path:
    """Write a Python file that rebuilds a folder's model with torch and torchvision alone.

    Returns:
        The file of the weights that belong to it.

    Raises:
        GroupifyError: there is no such folder, or the file cannot be written.
    """
    check_paths(path, force=force, option="--python")
    if not folder_exists(folder):
        raise ArtefactError(f"--python needs an output folder of 'groupify convert', not {folder!r}")
    write_python_file(read_recipe(folder), path, trust=trust)
    return Path(folder) / WEIGHTS_FILE


def run_table(
    target: ModelRequest,
    path: Path,
    *,
    precisions: Sequence[Precision] = (FLOAT32,),
    threads: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> LatencyTable:
    """Write a latency table for the plans of an output folder's model or a dense model.

    Raises:
        GroupifyError: the model cannot be had, or the file holds something else.
    """
    if folder_exists(target.name):
        target.check_for_folder()
        spec = read_recipe(target.name).model
        model = build_model(spec, trust=target.trust)
    else:
        source = replace(target, weights="none").load(seed)
        source, _ = with_data(source, None, target.preprocessing, seed=seed)
        model, spec = source.model, source.spec
    return make_table(
        model, spec.input_shape, path, precisions=precisions, threads=threads, progress=progress
    )


def check_paths(*paths: Path, force: bool, option: str = "-o") -> None:
    """Refuse files that cannot be written, before any work.

    Raises:
        ArtefactError: a file exists and ``force`` is not given, or its folder does not.
    """
    for file in paths:
        if os.path.lexists(file) and not force:
            raise ArtefactError(f"{file} exists; give --force to replace it, or another file with {option}")
        if os.path.isdir(file) or not os.path.isdir(file.parent):
            raise ArtefactError(
                f"cannot write {file}: expected a file in an existing folder; choose it with {option}"
            )
