"""What the API does with a model, or with a result of its own: convert, fine-tune, export, save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from groupify.artefact import save as save_artefact
from groupify.conversion.conversion import Calibration
from groupify.conversion.conversion import convert as convert_model
from groupify.data.batches import Data
from groupify.data.calls import Inputs
from groupify.data.splits import DataSplits, as_splits
from groupify.errors import SpecError, expect_type
from groupify.graph.call import one_example, shape_of
from groupify.models.preprocessing import Preprocessing
from groupify.models.specs import Source
from groupify.onnx.exporting import ExportedModel, export_onnx
from groupify.onnx.parity import check_parity
from groupify.pipeline.compressed import Compressed
from groupify.pipeline.converting import result_of
from groupify.pipeline.subject import Subject, data_of, source_of
from groupify.planning.race import BudgetPlan
from groupify.recipe import Recipe
from groupify.reporting.results import ExportResult
from groupify.structures import FilePrecision, Plan
from groupify.tasks import AUTO
from groupify.training.finetuning import FinetuneResult
from groupify.training.finetuning import finetune as finetune_model
from groupify.training.history import LogSettings
from groupify.training.own_loss import Loss
from groupify.training.settings import FinetuneSettings
from groupify.training.state import Checkpointing

_RESULT = "what compress, convert or finetune returns"


def convert(
    model: nn.Module | Source,
    plan: Plan | BudgetPlan,
    calibration: Calibration | Tensor | Data | None = None,
    *,
    example_inputs: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Compressed:
    """Replace the planned convs and fit the weights of what replaces them.

    Args:
        model: the dense model, in memory or as ``load_model`` returns it; it is left untouched.
        plan: what to replace; of ``plan`` or ``plan_for_budget``.
        calibration: images as a tensor (N, C, H, W), a data set or an iterable of batches, labels unused; or
            a ``Calibration`` to set how they are used. None = from the weights alone, which does not
            protect the accuracy.
        example_inputs: what the model is called with, as for the plan; needed by a model of several inputs
            where there is no ``Calibration`` with ``inputs``.
        seed: seed of everything random.
        progress: show bars on stderr.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3))
        >>> plan = groupify.plan(net, (16, 8, 8), groups=2)
        >>> result = groupify.convert(net, plan, torch.randn(64, 16, 8, 8))
        >>> result.model[2]
        Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), groups=2)
        >>> [fit.name for fit in result.fits]
        ['2']

    Raises:
        WrongTypeError: ``plan`` is something else.
        ConversionError: the plan is for another model, or weights or activations are NaN or infinite.
        DataError: no calibration images, or NaN in them.
    """
    if isinstance(plan, BudgetPlan):
        plan = plan.plan
    expect_type(plan, Plan, "plan", "what groupify.plan or plan_for_budget returns")
    source = source_of(model, plan.input_shape)
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    conversion = convert_model(
        model.model if isinstance(model, Source) else model, plan, calibration, example_inputs=example_inputs,
        seed=seed, progress=progress,
    )  # fmt: skip
    example = plan.input_shape if example_inputs is None else one_example(None, example_inputs)
    if calibration is not None and calibration.inputs is not None:
        example = calibration.calls[0]
    subject = Subject(source, example, data_of(None, calibration), calibration, seed=seed)
    return result_of(conversion, subject, plan)


@overload
def finetune(
    student: Compressed,
    data: DataSplits | Data | Tensor,
    *,
    teacher: nn.Module | None = None,
    settings: FinetuneSettings | None = None,
    loss: Loss | None = None,
    task: str = AUTO,
    validation: Data | None = None,
    inputs: Inputs | None = None,
    checkpointing: Checkpointing | None = None,
    log: LogSettings | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> Compressed: ...


@overload
def finetune(
    student: nn.Module,
    data: DataSplits | Data | Tensor,
    *,
    teacher: nn.Module | None = None,
    settings: FinetuneSettings | None = None,
    loss: Loss | None = None,
    task: str = AUTO,
    validation: Data | None = None,
    inputs: Inputs | None = None,
    checkpointing: Checkpointing | None = None,
    log: LogSettings | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> FinetuneResult: ...


def finetune(
    student: Compressed | nn.Module,
    data: DataSplits | Data | Tensor,
    *,
    teacher: nn.Module | None = None,
    settings: FinetuneSettings | None = None,
    loss: Loss | None = None,
    task: str = AUTO,
    validation: Data | None = None,
    inputs: Inputs | None = None,
    checkpointing: Checkpointing | None = None,
    log: LogSettings | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> Compressed | FinetuneResult:
    """Train a converted model further: a loss by labels, and distillation from the dense model.

    For class scores that is cross-entropy, and what is distilled their softmax. For any other outputs it is
    your ``loss``, with labels of any shape, and what is distilled the outputs themselves, by their relative
    error, each output by itself; without a loss, nothing else. ``settings.distillation_weight`` divides
    the two.

    Part of the training data is held out, and the weights with the least loss on it are returned; the given
    ones unless it falls. The test part is never trained on. The same call gives the same weights, bit for
    bit on a CPU with the same number of threads, also when it was killed in between and resumed. Works on
    the student's device.

    In a process group (``distributed``) each step's batch is divided among the processes, batch norms
    use the statistics of the whole batch, and every process returns the same result, which is that of
    one process but for rounding. Augmentation and dropout draw other numbers, though.

    Args:
        student: what ``compress`` or ``convert`` returned, of which a new one comes back, or a converted
            model alone; left untouched.
        data: what ``load_data`` returns, or training data alone: a data set, a loader, or another iterable of
            batches, labelled or not.
        teacher: the dense model; None = that of the result, or, for a model alone, labels only.
        settings: None = the defaults.
        loss: (outputs, labels) → how wrong they are, lower is better: a number, the mean over the images, or
            one for each image, shape (n,). It takes the place of the cross-entropy, and chooses the weights:
            a number is asked for of each held-out image by itself. ``labels`` is a tensor (n, …) of what the
            data has for labels.
        task: of a model alone, ``"classes"``, ``"outputs"`` or ``"auto"``, by the form of the outputs; a
            result knows it.
        validation: held-out images of the caller's; None = a part of the training data.
        inputs: for a model that takes more than images, a batch, as the data gives it, → positional and
            keyword arguments. Labels are then the last entry of a batch, or under ``labels`` in a dict. None:
            as for the fit.
        checkpointing: store the state on the way, and go on from it; None = neither.
        log: where to log; None = nowhere.
        distributed: every process of the initialised process group makes this call, with the same
            arguments; a state and its resuming need a folder that all of them see.
        progress: show a progress bar on stderr.

    Raises:
        WrongTypeError: a student or data of another type.
        SpecError: neither labels nor a teacher, labels asked of data that has none or for outputs without a
            loss, a loss that fails or gives something else, or a state of another run.
        DataError: no training data, too little of it, or bad images or labels; or data that is not what
            the interrupted run read.
        ArtefactError: a state or log that cannot be read or written.

    Warns:
        GroupifyWarning: the loss is no longer finite; training stopped. Or an augmentation is asked of data
            that has none, or bfloat16 of a CPU that is slow in it.
    """
    expect_type(student, (Compressed, nn.Module), "student", f"{_RESULT}, or a converted model")
    if settings is not None:
        expect_type(settings, FinetuneSettings, "settings", "groupify.FinetuneSettings(...)")
    options: dict[str, Any] = {
        "loss": loss,
        "validation": validation,
        "checkpointing": checkpointing,
        "log": log,
        "distributed": distributed,
        "progress": progress,
    }
    if isinstance(student, Compressed):
        if task not in (AUTO, student.task):
            raise SpecError(f"task is {task!r}, and the result was made for {student.task!r}: leave it out")
        return student.finetune(data, teacher=teacher, settings=settings, inputs=inputs, **options)
    splits = as_splits(data, inputs, labelled=True if loss is None else "any")
    return finetune_model(
        student, splits, teacher=teacher, settings=settings, task=task, inputs=inputs, **options
    )


@overload
def export(
    model: Compressed,
    path: Path | str,
    *,
    precision: FilePrecision | None = None,
    static_batch: int | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
) -> ExportResult: ...


@overload
def export(
    model: nn.Module,
    path: Path | str,
    *,
    input_shape: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    preprocessing: Preprocessing | None = None,
    static_batch: int | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportedModel: ...


def export(
    model: Compressed | nn.Module, path: Path | str, *, precision: FilePrecision | None = None, **options: Any
) -> ExportResult | ExportedModel:
    """Export a model to ONNX, in evaluation mode, with its batch norms and channel shuffles folded.

    The file has one input, ``input``, of shape ``(batch, *input_shape)``, float32, or one for each tensor of
    ``example_inputs``, under the names of the parameters of the model's forward (``batch.image`` for an entry
    of a dict); what is no tensor is part of the file. It has one output for each tensor that the model
    returns, however nested; dictionaries give their keys as names. Weights go to a second file only above
    2 GB. The file is written aside and renamed; the model is left as it was.

    Args:
        model: what ``compress``, ``convert`` or ``finetune`` returned, whose file is checked against PyTorch;
            or any module that ``torch.export`` can trace.
        path: the file to write; an existing one is replaced.
        precision: of a result, ``"float32"``, ``"int8"`` or ``"float16"``; None = what it was planned for. A
            module is exported in float32; ``export_int8`` quantises it.
        input_shape: of a module, the shape of one input, without the batch dimension.
        example_inputs: in its place, what the model is called with: a tensor with a batch dimension, a tuple
            of positional arguments, a dict of keyword arguments, or a tuple of these two.
        preprocessing: of a module, what the inputs went through, recorded in the metadata.
        static_batch: a fixed batch size; None leaves it dynamic.
        dynamic_size: leave height and width open as well, for models that take images of any size, or of any
            multiple of 32, say; ``input_shape`` is then one of them. The file is checked against PyTorch at
            that size and at the nearest larger one that the model takes.
        opset: of the ONNX operators. None takes 18, the fastest in ONNX Runtime, or the lowest above it that
            has all operators of the model.
        metadata: of a module, more entries for the file's metadata.

    Raises:
        WrongTypeError: a model or path of another type.
        SpecError: for a module, neither ``input_shape`` nor ``example_inputs``, or both; for a result, what
            it says itself.
        ConversionError: the model does not run on such inputs, cannot be traced, or has operators that
            the opset lacks; or, with ``dynamic_size``, takes inputs of one size only.
        ParityError: the file of a result, or one with ``dynamic_size``, computes something else than its
            model.
        ArtefactError: the file cannot be written.
    """
    expect_type(path, (str, Path), "path", "the name of a file")
    if isinstance(model, Compressed):
        for name in sorted(options.keys() - {"static_batch", "dynamic_size", "opset"}):
            raise SpecError(f"{name} is for a module; a result of groupify knows it: leave it out")
        return model.export(path, precision=precision, **options)
    if precision not in (None, "float32"):
        raise SpecError(
            f"precision {precision!r} is for {_RESULT}, which knows images to calibrate on; for a module "
            "there is groupify.export_int8(model, path, images)"
        )
    exported = export_onnx(model, path, **options)
    if options.get("dynamic_size"):
        check_parity(model, exported.path, input_shape=_shape_of(options), dynamic_size=True)
    return exported


def _shape_of(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of one input, as the options of an export give it."""
    return shape_of(one_example(options.get("input_shape"), options.get("example_inputs")))


def save(
    folder: str | Path, model: Compressed | nn.Module, recipe: Recipe | None = None, *, force: bool = False
) -> Recipe:
    """Write an artefact folder, ``recipe.json`` and ``model.safetensors``, whole or not at all.

    Args:
        folder: the folder to write.
        model: what ``compress``, ``convert`` or ``finetune`` returned; or a converted model, say one that was
            trained further in code of your own, with its recipe.
        recipe: of a model alone: the ``recipe`` of the result that it comes from, or of its folder.
        force: replace an existing artefact folder.

    Returns:
        The recipe as written; its ``sha256``, ``memory_format`` and ``hooked`` are filled in.

    Raises:
        WrongTypeError: a model or recipe of another type, or a model without a recipe.
        ArtefactError: the folder exists or cannot be written, or the recipe does not describe the model.
    """
    expect_type(folder, (str, Path), "folder", "the name of a folder to write")
    if isinstance(model, Compressed) and recipe is None:
        return model.save(folder, force=force)
    expect_type(model, (Compressed, nn.Module), "model", f"{_RESULT}, or a converted model with its recipe")
    module = model.model if isinstance(model, Compressed) else model
    expect_type(recipe, Recipe, "recipe", f"the .recipe of {_RESULT}, which can be saved by itself as well")
    assert recipe is not None
    return save_artefact(folder, module, recipe, force=force)
