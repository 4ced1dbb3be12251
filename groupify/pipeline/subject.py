"""What a conversion is about: the dense model, how it is called, and images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from groupify.conversion.conversion import Calibration
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.conversion.site_fit import FitOptions
from groupify.data.batches import UNLABELLED, Data, calibration_images, first_input, iterate_batches
from groupify.data.calls import Inputs
from groupify.data.splits import DataSplits, as_splits
from groupify.errors import SpecError, WrongTypeError
from groupify.graph.call import Call, Example, one_example, shape_of
from groupify.models.preprocessing import of_timm
from groupify.models.specs import ModelSpec, Source, WeightsOrigin
from groupify.models.wrappers import unwrapped
from groupify.pipeline.inputs import check_shapes, classified
from groupify.planning.search import Images
from groupify.scores import Metric
from groupify.tasks import AUTO

_IMAGES = "images as a tensor, a data set, an iterable of batches, a Calibration, or what load_data returns"
_HELD_OUT = 500
# A drop must be known well: where 1.5 of 100 images change, 10,000 tell it within 0.3 points.
_HELD_OUT_FOR_DROP = 10_000
_HELD_OUT_BYTES = 2**30


@dataclass(frozen=True)
class Subject:
    """What a run works on.

    Attributes:
        source: the dense model.
        example: how it is called.
        data: to fit and to measure on; None = none.
        given: the calibration, where the caller has chosen the images; None = they are drawn from ``data``.
        count: number of images to draw; 0 = fit from the weights alone.
        reconstruct_steps: of block reconstruction after the fit.
        seed: of everything random.
        memory: bytes of activations that wait in memory; None = half of what is free.
        metric: a model → how well it does, higher is better; None = none.
        task: what the model is taken for, see ``groupify.tasks``.
    """

    source: Source
    example: Example
    data: DataSplits | None = None
    given: Calibration | None = None
    count: int = 1000
    reconstruct_steps: int = 0
    seed: int = 0
    memory: int | None = None
    metric: Metric | None = None
    task: str = AUTO

    @property
    def inputs(self) -> Inputs | None:
        """A batch → what the model is called with; None = its images."""
        return None if self.given is None else self.given.inputs

    @property
    def how_called(self) -> dict[str, Any]:
        """The arguments by which the functions of the API are told how the model is called."""
        name = "example_inputs" if isinstance(self.example, Call) else "input_shape"
        return {name: self.example}

    @property
    def is_fitted(self) -> bool:
        """Whether there are images to fit on."""
        return self.given is not None or (self.data is not None and self.count > 0)

    def calibration(self) -> Calibration | None:
        """Return the images to fit on; None = fit from the weights alone."""
        if self.given is not None or self.data is None or self.count == 0:
            return self.given
        images = calibration_images(self.data.for_calibration, self.count, seed=self.seed)
        reconstruction = ReconstructionOptions(steps=self.reconstruct_steps)
        fit = FitOptions(task=self.task)
        return Calibration(images, fit=fit, reconstruction=reconstruction, memory=self.memory)

    def planning_images(self, *, for_drop: bool) -> Images | None:
        """Return images to compare plans on; None = predict from the weights alone."""
        if self.given is not None:
            return _of_calibration(self.given)
        if self.data is None or self.count == 0:
            return None
        return planning_images(self.data, self.count, for_drop=for_drop, seed=self.seed)


def make_subject(
    model: nn.Module | Source,
    images: Calibration | DataSplits | Data | Tensor | None,
    example_inputs: Any = None,
    *,
    count: int = 1000,
    seed: int = 0,
    memory: int | None = None,
    metric: Metric | None = None,
    task: str = AUTO,
) -> Subject:
    """Put together what a call of the API is about.

    Args:
        model: the dense model, in memory or as ``load_model`` returns it.
        images: what to fit on; None = nothing.
        example_inputs: what the model is called with; None = with images like those given.
        count, seed, memory, metric, task: see :class:`Subject`.

    Raises:
        WrongTypeError: something of another type.
        SpecError: nothing says how the model is called.
        GroupifyError: the data cannot be read, or do not fit the model.
    """
    if not isinstance(model, Source):
        model = _source_of(model)
    if isinstance(images, str):
        raise WrongTypeError(
            f"images is the text {images!r}: expected {_IMAGES}; load_data({images!r}, source.spec) reads it"
        )
    if isinstance(images, Mapping | nn.Module):
        raise WrongTypeError(f"images is a {type(images).__name__}: expected {_IMAGES}")
    if isinstance(images, Tensor):
        images = Calibration(images, fit=FitOptions(task=task), memory=memory)
    given = images if isinstance(images, Calibration) else None
    data = data_of(images, given)
    example = _example(model, data, given, example_inputs)
    model = replace(model, spec=replace(model.spec, input_shape=shape_of(example)), input_known=True)
    if data is not None and not isinstance(example, Call):
        model = _preprocessed_as(model, data)
        if data.test is not None:
            data = classified(model, data, task)
    return Subject(model, example, data, given, count, seed=seed, memory=memory, metric=metric, task=task)


def source_of(model: nn.Module | Source, input_shape: tuple[int, ...]) -> Source:
    """Return a dense model with its description; one in memory is described by its class."""
    source = model if isinstance(model, Source) else _source_of(model)
    return (
        source if source.input_known else replace(source, spec=replace(source.spec, input_shape=input_shape))
    )


def _source_of(model: nn.Module) -> Source:
    model = unwrapped(model)
    kind = type(model)
    name = f"{kind.__module__}:{kind.__qualname__}"
    found = of_timm(model)
    shape, preprocessing = ((1, 1, 1), None) if found is None else found
    spec = ModelSpec(name, {}, shape, preprocessing)
    said_by = None if preprocessing is None else "timm's pretrained_cfg"
    return Source(model, spec, WeightsOrigin("given"), input_known=False, preprocessing_from=said_by)


def data_of(images: Any, given: Calibration | None) -> DataSplits | None:
    """Return images of the caller's own, or those of a calibration, as splits; None where there are none."""
    if given is not None:
        images = given.images if given.inputs is None else None
    if images is None or isinstance(images, DataSplits):
        return images
    return replace(as_splits(images), labelled=False)


def _example(
    source: Source, data: DataSplits | None, given: Calibration | None, example_inputs: Any
) -> Example:
    if example_inputs is not None:
        example = one_example(None, example_inputs)
        assert isinstance(example, Call)
        alone = len(example.args) == 1 and isinstance(example.args[0], Tensor) and not example.kwargs
        return shape_of(example) if alone else example
    if given is not None and given.inputs is not None:
        return one_example(None, given.calls[0])
    if data is not None and not source.input_known:
        return tuple(first_input(data.for_calibration if data.test is None else data.test).shape)
    if not source.input_known:
        raise SpecError(
            "nothing says what the model is called with: give images, or example_inputs, like torch.randn(2, "
            "3, 224, 224)"
        )
    if data is not None:
        check_shapes(source, data)
    return source.spec.input_shape


def _preprocessed_as(source: Source, data: DataSplits) -> Source:
    """Take over what the data say of their preprocessing, where the model's own is of another size."""
    known, shape = source.spec.preprocessing, source.spec.input_shape
    if data.preprocessing is not None:
        known, said_by = data.preprocessing, "the data set's own"
    elif known is not None and (len(shape) != 3 or shape[0] != len(known.mean)):
        known, said_by = None, None
    else:
        said_by = source.preprocessing_from
    known = None if known is None else known.of_size(shape[1:])
    return replace(source, spec=replace(source.spec, preprocessing=known), preprocessing_from=said_by)


def _of_calibration(calibration: Calibration) -> Images:
    """Hold a part of the images out; what a model of several inputs is called with is known by its number."""
    if calibration.inputs is None:
        return Images.split(calibration.images)
    whole = Call.joined(calibration.calls)

    def called(numbers: Tensor) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        part = whole.part(numbers.long().cpu())
        return part.args, part.kwargs

    return Images.split(torch.arange(whole.batch_size).float(), inputs=called)


def planning_images(data: DataSplits, count: int, *, for_drop: bool, seed: int) -> Images:
    """Draw the images to fit on, the same that a conversion draws, and others to compare plans on.

    Args:
        data: gives them.
        count: number of images to fit on.
        for_drop: whether a limit on the drop is to be held, which takes more of the others.
        seed: chooses the images.

    Raises:
        DataError: no images.
    """
    part = data.for_calibration
    first = first_input(part)
    most = _HELD_OUT_FOR_DROP if for_drop else _HELD_OUT
    more = max(1, min(most, _HELD_OUT_BYTES // (4 * first.numel())))
    drawn = iterate_batches(
        part, min(count, 256), shuffle_seed=seed, limit=count + more, labelled=data.labelled
    )
    batches = list(drawn)
    images = torch.cat([batch for batch, _ in batches])
    labels = torch.cat([batch for _, batch in batches])
    # Of a test part the labels must not choose anything.
    labelled = data.labelled and data.train is not None and not bool((labels == UNLABELLED).any())
    if len(images) <= count:  # few images: a quarter of them is held out
        return Images.split(images, labels if labelled else None)
    return Images(images[:count], images[count:], labels[count:] if labelled else None)
