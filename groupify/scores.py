"""A model on data: its accuracy, how far its outputs are from another's, and what it costs to run.

Costs are parameters, multiply-accumulates (MACs), weight and activation bytes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from groupify.data.batches import UNLABELLED, Data, check_labels, is_map_style
from groupify.data.calls import Inputs, iterate_calls, model_inputs
from groupify.data.ranks import ALONE, Ranks
from groupify.devices import double
from groupify.errors import DataError, SpecError
from groupify.graph.call import Call
from groupify.graph.forward import evaluating, output_tensors, run_once
from groupify.paired import CONFIDENCE, Answers, Paired, images_for
from groupify.tasks import AUTO, CLASSES, class_scores, task_of

Metric: TypeAlias = Callable[[nn.Module], float]
"""A model, in eval mode, → how well it does; higher is better."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy, a fraction, and the number of images it was measured on.

    Attributes:
        top1, images: the two.
        answers: which images are right, to compare two models image by image; None = not kept.
    """

    top1: float
    images: int
    answers: Answers | None = field(default=None, repr=False, compare=False)


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 256,
    limit: int | None = None,
    inputs: Inputs | None = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Accuracy:
    """Return the top-1 accuracy of a classifier.

    The model runs in eval mode on its own device, and every module gets its training mode back.

    Args:
        model: maps images (N, C, H, W) to logits (N, classes), or to a dict or named tuple with the
            entry ``logits`` or ``out``.
        data: labelled images.
        batch_size: images per batch.
        limit: measure on the first images only.
        inputs: for a model that takes more than images, a batch, as the data gives it, → positional and
            keyword arguments. Labels are then the last entry of a batch, or under ``labels`` in a dict.
        progress: show a bar on stderr.
        ranks: the processes that divide the images among themselves; each gets the accuracy of all.

    Example:
        >>> labels = torch.tensor([0, 1, 2, 2])
        >>> images = torch.nn.functional.one_hot(labels, 3).float()[:, :, None, None]
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 2, 0]))
        >>> groupify.evaluate(torch.nn.Flatten(), data)
        Accuracy(top1=0.75, images=4)

    Raises:
        DataError: data without labels, labels out of range, NaN, no images; or outputs that are no logits.
    """
    correct = images_seen = 0
    total = len(cast(Any, data)) if is_map_style(data) else None
    if total is not None and limit is not None:
        total = min(total, limit)
    batches = iterate_calls(data, batch_size, inputs, limit=limit, share=(ranks.rank, ranks.world))
    right, known = [torch.empty(0, dtype=torch.bool)], [torch.empty(0, dtype=torch.int64)]
    with (
        evaluating(model),
        torch.inference_mode(),
        tqdm(
            total=total, desc="evaluate", unit="images", disable=None if progress else True, leave=False
        ) as bar,
    ):
        for call, labels in batches:
            if bool((labels == UNLABELLED).any()):
                raise DataError("the images have no labels: accuracy needs a labelled data set")
            logits = class_scores(call.on(model).run_for_good(model))
            check_labels(labels, logits.shape[1])
            right.append(logits.argmax(1).cpu() == labels)
            known.append(labels)
            correct += int(right[-1].sum())
            images_seen += len(labels)
            bar.update(ranks.world * len(labels))
    correct, images_seen = (int(value) for value in ranks.sums(correct, images_seen))
    return Accuracy(correct / images_seen, images_seen, Answers(torch.cat(right), torch.cat(known)))


def metric_name(metric: Metric) -> str:
    """Return what a metric is called."""
    return str(getattr(metric, "__name__", type(metric).__name__))


def measure_metric(metric: Metric, model: nn.Module) -> float:
    """Return what a user's metric says of a model, which is in eval mode meanwhile, without gradients.

    Raises:
        SpecError: it gives no finite number, or fails.
    """
    name = metric_name(metric)
    try:
        with evaluating(model), torch.no_grad():
            value = float(metric(model))
    except Exception as error:  # any Python code may run here
        raise SpecError(f"the metric {name!r} fails: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise SpecError(f"the metric {name!r} is {value}: expected a finite number, higher for better models")
    return value


class OutputErrors:
    """Squared errors of outputs, relative to the variance of the dense model's; the mean over all tensors.

    Integers, such as labels, have no part in it. An output that never changes counts only if it is missed:
    then as wholly wrong.
    """

    def __init__(self) -> None:
        self._count: list[float] = []
        self._sums: list[tuple[float, float]] = []  # of the values and of their squares
        self._missed: dict[str, list[float]] = {}

    def add_dense(self, outputs: Sequence[Tensor]) -> None:
        """Count what is right for a batch."""
        for number, values in enumerate(_floats(outputs)):
            if number == len(self._count):
                self._count.append(0.0)
                self._sums.append((0.0, 0.0))
            total, squares = self._sums[number]
            self._count[number] += values.numel()
            self._sums[number] = total + float(values.sum()), squares + float(values.square().sum())

    def add(self, name: str, dense: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Count what a converted model, of any name, gives for that batch.

        Raises:
            DataError: outputs of other shapes, or none that could be compared.
        """
        right, found = _floats(dense), _floats(outputs)
        if [values.shape for values in right] != [values.shape for values in found] or not right:
            raise DataError(
                "the shapes of the model's outputs depend on their values, or none is floating point: they "
                "cannot be compared; plan without images, or hand out what is computed before that"
            )
        missed = [float((own - other).square().sum()) for own, other in zip(found, right, strict=True)]
        before = self._missed.get(name, [0.0] * len(missed))
        self._missed[name] = [one + other for one, other in zip(before, missed, strict=True)]

    def relative(self, name: str) -> float:
        """Return the mean relative error of what was counted under a name."""
        shares = []
        for count, (total, squares), missed in zip(self._count, self._sums, self._missed[name], strict=True):
            energy = squares - total * total / max(count, 1.0)
            shares.append(missed / energy if energy > 1e-9 * squares else float(missed > 1e-9 * squares))
        return sum(shares) / len(shares)


def _floats(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [double(values.detach()) for values in outputs if values.is_floating_point()]


@dataclass(frozen=True)
class Judgement:
    """What was measured.

    Attributes:
        divergence: KL divergence of the converted model's class probabilities from the dense model's,
            nats, mean over the images; without class scores the relative error of the outputs.
        drop: percentage points of accuracy lost; without labels the share of images whose class is
            another one, which is never less. With a metric, how much less that is, in its units. None
            without class scores and metric.
        changed: the images that were lost and gained; None where the drop was not counted on images.
        metric: name of the metric that the drop is in units of; None = percentage points.
    """

    divergence: float
    drop: float | None
    changed: Paired | None = None
    metric: str | None = None

    @property
    def unit(self) -> str:
        """What the drop is counted in."""
        return "points" if self.metric is None else f"of {self.metric}"

    def loses_at_most(self, confidence: float = CONFIDENCE) -> float:
        """Return what the drop on other images does not exceed, at a one-sided confidence.

        Infinite where no drop was measured; the drop itself where its error is not known.
        """
        if self.changed is not None:
            return self.changed.at_most(confidence)
        return math.inf if self.drop is None else self.drop


class Judge:
    """The dense model's answers on held-out images.

    Args:
        dense: the dense model; left untouched.
        images: shape (N, C, H, W).
        labels: class numbers, shape (N,); None = unlabelled.
        inputs: a batch of images → what the model is called with; None = the images.
        batch_size: images per step.
        task: what the model is taken for, see :func:`groupify.tasks.task_of`.
        metric: tells the drop in the place of the accuracy.

    Raises:
        DataError: the model has no outputs that can be compared.
        SpecError: the outputs are not what the task says, or the metric gives no number.
    """

    def __init__(
        self,
        dense: nn.Module,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        inputs: Inputs | None = None,
        batch_size: int = 64,
        task: str = AUTO,
        metric: Metric | None = None,
    ) -> None:
        self._images = images
        self._inputs = inputs
        self._batch_size = batch_size
        self._dense = list(self._run(dense))
        self.classes = all(task_of(output, task) == CLASSES for output in self._dense)
        self._metric = metric
        self._dense_metric = None if metric is None else measure_metric(metric, dense)
        self._labels = labels.cpu() if self.classes and labels is not None else None

    @property
    def labelled(self) -> bool:
        """Whether the drop is one of accuracy."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._images)

    def images_for(self, drop: float, confidence: float = CONFIDENCE) -> int | None:
        """Return how many images it takes to tell a drop; None where these are enough."""
        needed = images_for(drop, confidence) if self.classes and self._metric is None else 0
        return needed if needed > len(self) else None

    def judge(self, model: nn.Module) -> Judgement:
        """Measure one converted model."""
        found = self._compare(model)
        if self._metric is None or self._dense_metric is None:
            return found
        drop = self._dense_metric - measure_metric(self._metric, model)
        return Judgement(found.divergence, drop, metric=metric_name(self._metric))

    def _compare(self, model: nn.Module) -> Judgement:
        if not self.classes:
            errors = OutputErrors()
            for dense, found in zip(self._dense, self._run(model), strict=True):
                errors.add_dense(output_tensors(dense))
                errors.add("converted", output_tensors(dense), output_tensors(found))
            return Judgement(errors.relative("converted"), None)
        right, chances = (_log_chances(outputs) for outputs in (self._dense, self._run(model)))
        divergence = F.kl_div(chances, right, reduction="none", log_target=True).sum(1).mean()
        classes, dense_classes = chances.argmax(1), right.argmax(1)
        labels = dense_classes if self._labels is None else self._labels
        changed = Answers(dense_classes == labels, labels).against(Answers(classes == labels, labels))
        return Judgement(float(divergence), None if changed is None else changed.drop, changed)

    def _run(self, model: nn.Module) -> Iterator[Any]:
        parameter = next(model.parameters(), torch.empty(0))
        with evaluating(model), torch.no_grad():
            for batch in self._images.split(self._batch_size):
                outputs = self._call(batch, parameter).apply(model)
                yield pytree.tree_map_only(Tensor, lambda values: values.cpu(), outputs)

    def _call(self, batch: Tensor, parameter: Tensor) -> Call:
        call = Call((batch,)) if self._inputs is None else model_inputs(batch, self._inputs)
        return call.map(lambda x: x.to(parameter) if x.is_floating_point() else x.to(parameter.device))


def _log_chances(outputs: Iterable[Any]) -> Tensor:
    return torch.cat([class_scores(output).float().log_softmax(1) for output in outputs])


@dataclass(frozen=True)
class ModelCost:
    """Cost of one forward pass over one image.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates of convs, linears and matrix products.
        weight_bytes: bytes of parameters and buffers.
        activation_bytes: largest sum of tensors alive at the same time during the pass, weights
            excluded, as eager PyTorch runs it in inference.
    """

    params: int
    macs: int
    weight_bytes: int
    activation_bytes: int


def conv_params(
    in_channels: int, out_channels: int, kernel_size: tuple[int, ...], groups: int, bias: bool
) -> int:
    """Count the parameters of a conv: in/groups × out × kernel, and a bias each.

    >>> conv_params(8, 6, (1, 1), groups=2, bias=True)
    30
    """
    area = 1
    for size in kernel_size:
        area *= size
    return in_channels // groups * out_channels * area + (out_channels if bias else 0)


def measure_cost(model: nn.Module, example: Call | Tensor) -> ModelCost:
    """Count what one forward pass costs.

    Args:
        model: any module; run once in inference mode, then put back into its training mode.
        example: how it is called with one example; a tensor has shape (1, C, H, W).

    Raises:
        ConversionError: the model does not run on such inputs.
    """
    tensors = [*model.parameters(), *model.buffers()]
    peak = _PeakActivations(Call.of(example).tensors, ignored=tensors)
    counter = FlopCounterMode(display=False)
    with counter, peak:
        run_once(model, example, copy=False)
    return ModelCost(
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        activation_bytes=peak.peak_bytes,
    )


class _PeakActivations(TorchDispatchMode):
    """Follows which tensors are alive, by storage, and keeps the largest sum; the inputs count too."""

    def __init__(self, inputs: Sequence[Tensor], ignored: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}  # views of weights
        self._alive: dict[int, list[int]] = {}  # storage address → [bytes, number of tensors]
        self._bytes = 0
        self.peak_bytes = 0
        for tensor in inputs:
            self._follow(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._ignored:
            return
        entry = self._alive.get(address)
        if entry is None:
            entry = self._alive[address] = [storage.nbytes(), 0]
            self._bytes += entry[0]
        entry[1] += 1
        weakref.finalize(tensor, self._forget, address)

    def _forget(self, address: int) -> None:
        entry = self._alive.get(address)
        if entry is None:
            return
        entry[1] -= 1
        if entry[1] == 0:
            self._bytes -= entry[0]
            del self._alive[address]
