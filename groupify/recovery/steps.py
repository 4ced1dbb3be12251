"""One training step and one validation, apart from any loop, process group or log."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groupify.data import UNLABELLED, Data, check_labels, iterate_batches
from groupify.errors import SpecError
from groupify.evaluation import class_logits
from groupify.recovery.loss import recovery_loss
from groupify.recovery.settings import FinetuneSettings


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
    loss: float
    images: int
    classes: int


def make_optimizer(model: nn.Module, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """Return SGD with weight decay on weights of two or more dimensions alone.

    Raises:
        SpecError: no parameter requires gradients.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise SpecError("no parameter of the model requires gradients: there is nothing to train")
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )


def train_step(
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor | None,
    settings: FinetuneSettings,
) -> Tensor:
    """Do one step on one batch and return its loss, detached.

    Args:
        model: in train mode, also wrapped for data parallelism.
        teacher: in eval mode; None = cross-entropy only.
        optimizer: of the model's parameters.
        images: shape (N, C, H, W), on the model's device.
        labels: shape (N,); None = distil only.
        settings: the loss and the precision.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, settings):
        teacher_logits = None
        if teacher is not None and (labels is None or settings.distillation_weight > 0):
            with torch.no_grad():
                teacher_logits = class_logits(teacher(as_input(images, teacher))).to(images.device)
        loss = recovery_loss(class_logits(model(images)), labels, teacher_logits, settings)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def validate(
    model: nn.Module, data: Data, settings: FinetuneSettings, teacher: nn.Module | None
) -> Validation:
    """Evaluate ``model`` on held-out images; it is left in eval mode.

    Raises:
        SpecError: images without labels while ``settings.labels`` is set.
        DataError: bad images or labels.
    """
    model.eval()
    correct = total = classes = 0
    loss = 0.0
    for images, labels in iterate_batches(data, settings.batch_size):
        inputs = as_input(images, model)
        with autocast(inputs.device, settings):
            logits = class_logits(model(inputs)).float()
            if settings.labels:
                if bool((labels == UNLABELLED).any()):
                    raise SpecError(
                        "the training images have no labels: distil only, with labels 'none' (labels=False)"
                    )
                check_labels(labels, logits.shape[1])
                targets = labels.to(logits.device)
            elif teacher is not None:
                targets = class_logits(teacher(as_input(images, teacher))).argmax(1).to(logits.device)
        classes = logits.shape[1]
        correct += int((logits.argmax(1) == targets).sum())
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        total += len(images)
    return Validation(top1=correct / total, loss=loss / total, images=total, classes=classes)


def as_input(images: Tensor, model: nn.Module) -> Tensor:
    """Return ``images`` on the device and in the precision of ``model``."""
    parameter = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return images if parameter is None else images.to(parameter.device, parameter.dtype)


def autocast(device: torch.device, settings: FinetuneSettings) -> contextlib.AbstractContextManager[object]:
    """Return the context of mixed precision, if the settings ask for it."""
    if settings.amp is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
