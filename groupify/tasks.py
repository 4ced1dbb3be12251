"""What a model's outputs are: class scores, or anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from groupify.errors import DataError, SpecError, near_names
from groupify.graph.forward import output_tensors

AUTO, CLASSES, OUTPUTS = "auto", "classes", "outputs"
TASKS = (AUTO, CLASSES, OUTPUTS)
SCORE_NAMES = ("logits", "out")  # of class scores among several outputs


def class_scores(output: Any) -> Tensor:
    """Return the class scores among a model's outputs, shape (N, classes).

    Args:
        output: a tensor, or a dict or tuple with the entry ``logits`` or ``out``, or with them in front.

    Raises:
        DataError: outputs of another form, such as those of a detector or a segmentation.
    """
    if isinstance(output, Mapping):
        named = [output[name] for name in SCORE_NAMES if name in output]
    else:
        named = [getattr(output, name) for name in SCORE_NAMES if hasattr(output, name)]
    if named:
        output = named[0]
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    dims = output.dim() if isinstance(output, Tensor) else 0
    if dims == 2 and output.shape[1] > 1:
        return cast(Tensor, output)
    found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
    raise DataError(f"the model's output has {found}, expected class scores of shape (N, classes)")


def has_classes(output: Any) -> bool:
    """Whether a model's outputs count as class scores, (N, K) with K > 1, where :func:`class_scores` looks.

    See :func:`task_of` for what follows from it.
    """
    try:
        class_scores(output)
    except DataError:
        return False
    return True


def task_of(output: Any, asked: str = AUTO) -> str:
    """Return what a model is taken for: ``"classes"`` or ``"outputs"``.

    A model of classes is judged by its class probabilities, the softmax of its scores; any other by the
    relative error of all outputs.

    Args:
        output: what the model gives.
        asked: one of ``TASKS``; ``"auto"``: classes where the outputs have their form, which an embedding
            (N, K) has as well.

    Raises:
        SpecError: an unknown task, or classes are asked of other outputs.
    """
    if asked not in TASKS:
        raise SpecError(f"unknown task {asked!r}: expected {', '.join(TASKS)}{near_names(asked, TASKS)}")
    if asked == CLASSES and not has_classes(output):
        raise SpecError(
            f"the task is {CLASSES!r}, but the model's outputs are {describe_outputs(output)}: "
            f"take {OUTPUTS!r}"
        )
    return asked if asked != AUTO else CLASSES if has_classes(output) else OUTPUTS


def describe_task(output: Any, task: str) -> str:
    """Return a line on what a model was taken for, by what it is judged, and what to do if that is wrong."""
    if task == CLASSES:
        return (
            f"task: {describe_outputs(output)}, judged by their softmax; if they are none, as in an "
            f"embedding, say so: --task {OUTPUTS}, task={OUTPUTS!r}"
        )
    taken = f"outputs {_shapes_of(output)}" if has_classes(output) else describe_outputs(output)
    return f"task: {taken}, judged by their relative error"


def describe_outputs(output: Any) -> str:
    """Return what a model's outputs look like, with their shapes, the batch as N."""
    if has_classes(output):
        return f"class scores (N, {class_scores(output).shape[1]})"
    return f"no class scores: {_shapes_of(output)}"


def _shapes_of(output: Any) -> str:
    shapes = [", ".join(map(str, ("N", *values.shape[1:]))) for values in output_tensors(output)]
    return ", ".join(f"({shape})" for shape in shapes)
