"""The loss of a fine-tune: cross-entropy, distillation and attention transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from groupify.training.settings import FinetuneSettings


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the batch.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015); the factor T²
    keeps the size of the gradients when the temperature changes.

    Args:
        logits: the student's, shape (N, classes).
        teacher_logits: shape (N, classes).
        temperature: T > 0.
    """
    student = F.log_softmax(logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the squared distance of the attention maps, averaged over batch and layers.

    The attention map of a layer is the mean of its squared channels, scaled to length 1: where in the
    image it responds, whatever the order and number of its channels. Zagoruyko and Komodakis, "Paying
    More Attention to Attention" (2017).

    Args:
        student: features of some layers, each of shape (N, C, H, W).
        teacher: features of the same layers, each of shape (N, C', H, W).
    """

    def attention(features: Tensor) -> Tensor:
        return F.normalize(features.float().square().mean(1).flatten(1), dim=1)

    distances = [
        (attention(ours) - attention(theirs)).square().sum(1).mean()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(distances).mean()


def recovery_loss(
    logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None, settings: FinetuneSettings
) -> Tensor:
    """Return the weighted sum of cross-entropy and distillation; whichever is absent has no weight.

    Args:
        logits: the student's, shape (N, classes).
        labels: class numbers, shape (N,); None = distil only.
        teacher_logits: shape (N, classes); None = cross-entropy only.
        settings: weights, temperature and label smoothing.
    """
    weight = 1.0 if labels is None else settings.distillation_weight
    if teacher_logits is None:
        weight = 0.0
    loss = torch.zeros((), device=logits.device)
    if teacher_logits is not None and weight > 0:
        loss = loss + weight * distillation_loss(logits, teacher_logits, settings.temperature)
    if labels is not None and weight < 1:
        entropy = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
        loss = loss + (1 - weight) * entropy
    return loss
