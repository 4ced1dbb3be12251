"""A model and its data brought together: the input's shape, its preprocessing, the classes."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import replace
from pathlib import Path

from torch import nn

from groupify.data.batches import UNLABELLED, Data, first_input, iterate_batches
from groupify.data.images import size_in_common
from groupify.data.splits import DataSplits, check_classes, is_function, load_data
from groupify.errors import DataError, GroupifyWarning, SpecError
from groupify.graph.call import example_input
from groupify.graph.forward import run_once
from groupify.models.preprocessing import PreprocessingOptions, unknown
from groupify.models.specs import Source
from groupify.scores import Accuracy
from groupify.tasks import AUTO, OUTPUTS, class_scores

# Fewer images say too little about chance.
_FEWEST_IMAGES = 30
_FROM_RECIPE, _FROM_FILE = "the recipe", "the file"

_log = logging.getLogger(__name__)


def from_recipe(source: Source) -> Source:
    """Return a model whose spec a recipe says, so that its preprocessing holds for any data."""
    said_by = None if source.spec.preprocessing is None else _FROM_RECIPE
    return replace(source, input_known=True, preprocessing_from=said_by)


def from_file(source: Source) -> Source:
    """Return an ONNX file whose own metadata, where it has such, say the preprocessing for any data."""
    return replace(source, preprocessing_from=None if source.spec.preprocessing is None else _FROM_FILE)


def with_data(
    source: Source, data: str | None, options: PreprocessingOptions, *, seed: int, task: str = AUTO
) -> tuple[Source, DataSplits | None]:
    """Load a data set for a model; settle the input's shape and preprocessing.

    Args:
        source: the model.
        data: data spec; None = none.
        options: what the user says about the preprocessing.
        seed: of the data.
        task: what the model is taken for, see ``groupify.tasks``.

    Returns:
        The model with a spec that says what is fed to it, and the data.

    Raises:
        SpecError: nothing says the input's shape or the preprocessing.
        ConversionError: the model does not run on its input shape.
        GroupifyError: the data cannot be had, or do not fit the model.

    Warns:
        GroupifyWarning: the model is no classifier, so the labels are not used; or its classes are more.
    """
    splits = load_data(data, source.spec) if data is not None and is_function(data) else None
    if not source.input_known:
        source = _with_shape(source, _shape_of(data, splits, source))
    said = options
    if source.preprocessing_from in (_FROM_RECIPE, _FROM_FILE):
        said = PreprocessingOptions.of(source.spec.preprocessing).then(options)
    if splits is not None:
        check_shapes(source, splits)
    elif data is not None:
        splits = load_data(data, source.spec, preprocessing=said, seed=seed)
    source = _with_preprocessing(source, splits, said, asked=options.given)
    return source, None if splits is None else classified(source, splits, task)


def _shape_of(data: str | None, splits: DataSplits | None, source: Source) -> tuple[int, ...]:
    """Return the input's shape as the first batch has it, or as the images of a folder have it."""
    if splits is not None:
        return tuple(first_input(_decisive(splits)).shape)
    if data is not None and data.startswith("imagefolder:"):
        size = size_in_common(Path(data.partition(":")[2]).expanduser())
        if size is not None:
            return (_channels(source.model), *size)
    raise SpecError(
        f"nothing says the size of the inputs of {source.spec.name}: give it with --input-size, like 3,64,64"
    )


def _decisive(splits: DataSplits) -> Data:
    """Return the part whose inputs have the model's shape: what accuracy is measured on, if there is such."""
    return splits.for_calibration if splits.test is None else splits.test


def _channels(model: nn.Module) -> int:
    """Return the channels of an image for a model: those that its first conv takes, or three."""
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    first = next(convs, None)
    return 3 if first is None else first.in_channels


def _with_shape(source: Source, shape: tuple[int, ...]) -> Source:
    _log.info("input: %s, as the data have it", "×".join(map(str, shape)))
    return replace(source, spec=replace(source.spec, input_shape=shape), input_known=True)


def check_shapes(source: Source, splits: DataSplits) -> None:
    """Refuse batches of another shape than the model's input, before any work.

    Training images may have another height and width than the test images, as some recipes have it.
    """
    expected = source.spec.input_shape
    decisive = _decisive(splits)
    for part in (splits.train, splits.test):
        if part is None:
            continue
        found = tuple(first_input(part).shape)
        alike = found == expected if part is decisive else found[0] == expected[0]
        if not alike or len(found) != len(expected):
            raise DataError(
                f"the first batch of {splits.spec} holds inputs of shape {found}, {source.spec.name} is to "
                f"take {expected}: give --input-size {','.join(map(str, found))}, or other data"
            )


def _with_preprocessing(
    source: Source, splits: DataSplits | None, said: PreprocessingOptions, *, asked: bool
) -> Source:
    """Return the model with the preprocessing that holds in this run."""
    spec = source.spec
    of_data = None if splits is None else splits.preprocessing
    found = said.over(of_data or spec.preprocessing, spec.input_shape, spec.name)
    if asked:
        said_by: str | None = "as asked"
    elif said.given or of_data is None or splits is None or splits.spec.startswith("imagefolder:"):
        said_by = source.preprocessing_from
    else:
        said_by = "the data set's own"
    return replace(source, spec=replace(spec, preprocessing=found), preprocessing_from=said_by)


def tell_preprocessing(source: Source, splits: DataSplits | None) -> None:
    """Log what is done to images in this run, or that nothing says what belongs into recipe and ONNX file.

    Args:
        source, splits: of :func:`with_data`.
    """
    spec = source.spec
    if spec.preprocessing is not None:
        ready_made = splits is not None and is_function(splits.spec)
        beside = f"; {splits.spec} gives inputs ready-made" if splits is not None and ready_made else ""
        _log.info("preprocessing (%s): %s%s", source.preprocessing_from, spec.preprocessing, beside)
    elif len(spec.input_shape) == 3:
        _log.info("preprocessing: %s; recipe and ONNX file do not say it either", unknown(spec.name))


_UNLABELLED = "the test images have no labels that are class numbers"


def classified(source: Source, splits: DataSplits, task: str = AUTO) -> DataSplits:
    """Return the data, checked against the model's classes; without labels where it is taken to have none."""
    if task == OUTPUTS:
        return replace(splits, labelled=False)
    classes = class_count(source)
    if classes is not None:
        check_classes(splits, classes)
    if not splits.labelled:
        return splits
    problem = _no_labels(splits)
    if problem is None and classes is None:
        problem = f"{source.spec.name} gives no logits of shape (N, classes)"
    if problem is None:
        return splits
    unused = f"; the labels of {splits.spec} are not used, but by a loss of your own"
    warnings.warn(
        f"no accuracy is measured: {problem}{f' ({splits.spec})' if problem == _UNLABELLED else unused}",
        GroupifyWarning,
        stacklevel=3,
    )
    return replace(splits, labelled=False)


def _no_labels(splits: DataSplits) -> str | None:
    """Return why the labels of the user's own data are of no use, or None."""
    if splits.test is None or not is_function(splits.spec):
        return None
    try:
        _, labels = next(iterate_batches(splits.test, 1, limit=1))
    except DataError as error:  # of the labels: the inputs have been looked at
        return str(error)
    return _UNLABELLED if int(labels[0]) == UNLABELLED else None


def class_count(source: Source) -> int | None:
    """Number of classes that a model tells apart; None when it is no classifier."""
    example = example_input(source.spec.input_shape, like=source.model)
    try:
        return class_scores(run_once(source.model, example)).shape[1]
    except DataError:
        return None


def warn_near_chance(accuracy: Accuracy, source: Source, splits: DataSplits) -> None:
    """Warn of an accuracy that guessing would have: nearly always the inputs are not what the model wants.

    Warns:
        GroupifyWarning: the accuracy is within three standard deviations of chance.
    """
    classes = splits.num_classes or class_count(source)
    if not classes or accuracy.images < _FEWEST_IMAGES or not source.weights.pretrained:
        return
    chance = 1 / classes
    if accuracy.top1 <= chance + 3 * math.sqrt(chance * (1 - chance) / accuracy.images):
        warnings.warn(
            f"{source.spec.name} has {100 * accuracy.top1:.2f}% on {splits.spec}, about what guessing among "
            f"{classes} classes has: check the preprocessing (--mean, --std, --resize, --crop, "
            "--input-size), the order of the classes, and the weights (--weights none: they are random)",
            GroupifyWarning,
            stacklevel=2,
        )
