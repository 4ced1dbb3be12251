"""A student on held-out images: how it does, what it has gained, how far it is from its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groupify.data.batches import Data, check_labels
from groupify.data.calls import Inputs, iterate_calls
from groupify.data.ranks import ALONE, Ranks
from groupify.data.splits import Augment
from groupify.devices import device_of
from groupify.documents import Measured
from groupify.graph.call import Call
from groupify.tasks import CLASSES, class_scores
from groupify.training.goal import Goal
from groupify.training.objective import as_input, autocast
from groupify.training.output_errors import Spread, float_outputs, relative_errors
from groupify.training.settings import FinetuneSettings

_IMAGES_FOR_DISTANCE = 1000
_VIEWS = 4


@dataclass(frozen=True)
class Validation:
    """How a model does on held-out images.

    Attributes:
        top1: share of the images whose top class is the label, or the teacher's top class; None without
            classes.
        loss: mean loss against the same, see ``Goal``: the cross-entropy, the user's own, or the relative
            error of the outputs.
        images: number of images.
        classes: number of the model's class scores; 0 without.
    """

    top1: float | None
    loss: Measured
    images: int
    classes: int


@dataclass(frozen=True)
class Gain:
    """How much less the loss on held-out images is than before the training.

    Attributes:
        mean: over the images, in the units of the loss; above 0 = better.
        error: standard error of the mean, from the differences image by image.
    """

    mean: Measured
    error: Measured


def gain_of(first: Tensor, losses: Tensor, ranks: Ranks = ALONE) -> Gain:
    """Return how much less the losses of the same images are than before the training.

    Args:
        first: before, of this rank's images, shape (n,).
        losses: now, shape (n,).
        ranks: the processes that share the images.
    """
    gains = (first - losses).cpu().double()
    sums = (float(gains.sum()), float(gains.square().sum()), len(gains))
    total, squares, images = ranks.sums(*sums, device=losses.device)
    mean = total / images
    variance = max(0.0, squares / images - mean**2) / max(1.0, images - 1)
    return Gain(mean, math.sqrt(variance))


@torch.no_grad()
def validate(
    model: nn.Module,
    data: Data,
    settings: FinetuneSettings,
    teacher: nn.Module | None,
    ranks: Ranks = ALONE,
    inputs: Inputs | None = None,
    augment: Augment | None = None,
    goal: Goal = Goal(),
) -> tuple[Validation, Tensor]:
    """Evaluate ``model`` on held-out images, divided among the ranks; it is left in eval mode.

    With an augmentation the loss is that of several augmented views of each image, the same ones in each
    validation: images that the teacher, or the fit, has seen favour weights near to the teacher.

    Returns:
        What all ranks found, and the loss of each of this rank's images, shape (n,).

    Raises:
        SpecError: images without labels where the goal has them, or a loss that fails.
        DataError: bad images or labels.
    """
    model.eval()
    correct = decided = classes = 0
    losses: list[Tensor] = []
    generator = torch.Generator().manual_seed(settings.seed + ranks.rank)
    share = (ranks.rank, ranks.world)
    for call, labels in iterate_calls(data, settings.batch_size, inputs, share=share, labelled=goal.reads):
        with autocast(device_of(model), settings):
            outputs = as_input(call, model, settings).apply(model)
            if goal.task == CLASSES:
                classes = class_scores(outputs).shape[1]
            targets = _targets(goal, call, labels, teacher, device_of(model), classes)
            of_views = [outputs]
            if augment is not None:
                views = [Call((augment(call.tensors[0], generator),)) for _ in range(_VIEWS)]
                of_views = [as_input(view, model, settings).apply(model) for view in views]
        right = goal.right(outputs, targets)
        if right is not None:
            correct, decided = correct + int(right.sum()), decided + len(right)
        losses.append(torch.stack([goal.losses(one, targets).float() for one in of_views]).mean(0))
    device = next((parameter.device for parameter in model.parameters()), None)
    every = torch.cat(losses) if losses else torch.zeros(0, device=device)
    sums = (correct, decided, float(every.sum()), len(every))
    all_correct, all_decided, all_loss, all_images = ranks.sums(*sums, device=device)
    if ranks.world > 1:  # a rank may have had no images
        classes = int(ranks.gather(torch.tensor([classes], device=device)).max())
    top1 = all_correct / all_decided if all_decided else None
    return Validation(top1, all_loss / all_images, int(all_images), classes), every


def _targets(
    goal: Goal, call: Call, labels: Tensor, teacher: nn.Module | None, device: torch.device, classes: int
) -> Any:
    """Return what the model is to give for a batch."""
    theirs = None
    if teacher is not None and not goal.labels:
        theirs = goal.compared(as_input(call, teacher).apply(teacher))
    targets = goal.targets(labels, theirs, device)
    if goal.labels and goal.loss is None:
        check_labels(labels, classes)
    return targets


@torch.no_grad()
def variances_of(
    teacher: nn.Module, data: Data, settings: FinetuneSettings, ranks: Ranks = ALONE,
    inputs: Inputs | None = None,
) -> tuple[float, ...]:  # fmt: skip
    """Return the variance of each of a teacher's outputs on held-out images, divided among the ranks.

    Args:
        teacher: in eval mode.
        data, settings, ranks, inputs: as for :func:`validate`.
    """
    spread = Spread()
    share = (ranks.rank, ranks.world)
    for call, _ in iterate_calls(data, settings.batch_size, inputs, share=share, labelled=False):
        spread.add(float_outputs(as_input(call, teacher).apply(teacher)))
    sums = torch.tensor(spread.sums, dtype=torch.float64).reshape(-1, 3)
    if ranks.world > 1:  # a rank may have had no images
        outputs = int(ranks.gather(torch.tensor([len(sums)])).max())
        sums = ranks.sum(sums if len(sums) else sums.new_zeros(outputs, 3))
    return Spread.variances(sums.tolist())


@torch.no_grad()
def distance(
    model: nn.Module, teacher: nn.Module, data: Data, settings: FinetuneSettings, ranks: Ranks = ALONE,
    inputs: Inputs | None = None, goal: Goal = Goal(),
) -> float:  # fmt: skip
    """Return how far a model is from its teacher, mean over the images.

    It is the KL divergence of the class probabilities, in nats, or without classes the relative error of the
    outputs.

    Args:
        model: in eval mode.
        teacher: in eval mode.
        data: held-out images; the first 1,000 tell enough.
        settings: batch size, memory format and precision.
        ranks: the processes that share the images.
        inputs: a batch of the data → what the models are called with; None = its images.
        goal: what the outputs are.
    """
    total, images = 0.0, 0
    few = iterate_calls(
        data, settings.batch_size, inputs, limit=_IMAGES_FOR_DISTANCE, share=(ranks.rank, ranks.world),
        labelled=False,
    )  # fmt: skip
    for call, _ in few:
        compared = []
        for one in (teacher, model):
            fitting = as_input(call, one, settings)
            with autocast(fitting.tensors[0].device, settings):
                compared.append(goal.compared(fitting.apply(one)))
        total += float(_distances(compared[0], compared[1], goal).sum())
        images += call.batch_size
    device = next((parameter.device for parameter in model.parameters()), None)
    all_total, all_images = ranks.sums(total, images, device=device)
    return all_total / all_images


def _distances(theirs: Any, ours: Any, goal: Goal) -> Tensor:
    """Return how far outputs are from the teacher's, image by image, shape (n,)."""
    if goal.task != CLASSES:
        return relative_errors(ours, theirs, goal.variances)
    right, chances = (scores.float().log_softmax(1) for scores in (theirs, ours))
    return F.kl_div(chances, right, reduction="none", log_target=True).sum(1)
