"""A student on held-out images: how it does, what it has gained, how far it is from its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groupify.data.batches import UNLABELLED, Data, check_labels
from groupify.data.calls import Inputs, iterate_calls
from groupify.data.ranks import ALONE, Ranks
from groupify.data.splits import Augment
from groupify.documents import Measured
from groupify.errors import SpecError
from groupify.graph.call import Call
from groupify.tasks import class_scores
from groupify.training.objective import as_input, autocast
from groupify.training.settings import FinetuneSettings

_IMAGES_FOR_DIVERGENCE = 1000
_VIEWS = 4


@dataclass(frozen=True)
class Validation:
    """How a model does on held-out images.

    Attributes:
        top1: share of the images whose top class is the label, or the teacher's top class.
        loss: mean cross-entropy against the same.
        images: number of images.
        classes: number of the model's outputs.
    """

    top1: float
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

    @property
    def is_real(self) -> bool:
        """Whether it is more than its standard error."""
        return self.mean > self.error


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
) -> tuple[Validation, Tensor]:
    """Evaluate ``model`` on held-out images, divided among the ranks; it is left in eval mode.

    With an augmentation the loss is that of several augmented views of each image, the same ones in each
    validation: images that the teacher, or the fit, has seen favour weights near to the teacher.

    Returns:
        What all ranks found, and the loss of each of this rank's images, shape (n,).

    Raises:
        SpecError: images without labels while ``settings.labels`` is set.
        DataError: bad images or labels.
    """
    model.eval()
    correct = classes = 0
    losses: list[Tensor] = []
    generator = torch.Generator().manual_seed(settings.seed + ranks.rank)
    for call, labels in iterate_calls(data, settings.batch_size, inputs, share=(ranks.rank, ranks.world)):
        fitting = as_input(call, model, settings)
        with autocast(fitting.tensors[0].device, settings):
            logits = class_scores(fitting.apply(model)).float()
            classes = logits.shape[1]
            if settings.labels:
                targets = _checked(labels, classes).to(logits.device)
            elif teacher is not None:
                targets = class_scores(as_input(call, teacher).apply(teacher)).argmax(1).to(logits.device)
            scores = [logits]
            if augment is not None:
                views = [Call((augment(call.tensors[0], generator),)) for _ in range(_VIEWS)]
                scores = [
                    class_scores(as_input(view, model, settings).apply(model)).float() for view in views
                ]
        correct += int((logits.argmax(1) == targets).sum())
        of_views = [F.cross_entropy(one, targets, reduction="none") for one in scores]
        losses.append(torch.stack(of_views).mean(0))
    device = next((parameter.device for parameter in model.parameters()), None)
    every = torch.cat(losses) if losses else torch.zeros(0, device=device)
    all_correct, all_loss, all_images = ranks.sums(correct, float(every.sum()), len(every), device=device)
    if ranks.world > 1:  # a rank may have had no images
        classes = int(ranks.gather(torch.tensor([classes], device=device)).max())
    return Validation(all_correct / all_images, all_loss / all_images, int(all_images), classes), every


@torch.no_grad()
def divergence(
    model: nn.Module, teacher: nn.Module, data: Data, settings: FinetuneSettings, ranks: Ranks = ALONE,
    inputs: Inputs | None = None,
) -> float:  # fmt: skip
    """Return how far a model's class probabilities are from its teacher's: the mean KL divergence, nats.

    Args:
        model: in eval mode.
        teacher: in eval mode.
        data: held-out images; the first 1,000 tell enough.
        settings: batch size, memory format and precision.
        ranks: the processes that share the images.
        inputs: a batch of the data → what the models are called with; None = its images.
    """
    total, images = 0.0, 0
    few = iterate_calls(
        data, settings.batch_size, inputs, limit=_IMAGES_FOR_DIVERGENCE, share=(ranks.rank, ranks.world)
    )
    for call, _ in few:
        log_chances = []
        for one in (teacher, model):
            fitting = as_input(call, one, settings)
            with autocast(fitting.tensors[0].device, settings):
                log_chances.append(class_scores(fitting.apply(one)).float().log_softmax(1))
        total += float(F.kl_div(log_chances[1], log_chances[0], reduction="sum", log_target=True))
        images += call.batch_size
    device = next((parameter.device for parameter in model.parameters()), None)
    all_total, all_images = ranks.sums(total, images, device=device)
    return all_total / all_images


def _checked(labels: Tensor, classes: int) -> Tensor:
    if bool((labels == UNLABELLED).any()):
        raise SpecError("the training images have no labels: distil only, with labels 'none' (labels=False)")
    check_labels(labels, classes)
    return labels
