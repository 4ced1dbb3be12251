"""The parts of a training step and a validation, apart from any loop or log."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groupify.data.batches import UNLABELLED, Data, check_labels, iterate_batches
from groupify.data.ranks import ALONE, Ranks
from groupify.errors import SpecError
from groupify.scores.accuracy import class_logits
from groupify.training.attention import Features, attention_layers
from groupify.training.loss import attention_loss, recovery_loss
from groupify.training.settings import FinetuneSettings


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
    """Return SGD or AdamW with weight decay on weights of two or more dimensions alone.

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
    used = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(used, lr=settings.peak_learning_rate, betas=(settings.momentum, 0.999))
    return torch.optim.SGD(
        used,
        lr=settings.peak_learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )


def freeze_batch_norms(model: nn.Module) -> None:
    """Put the batch norms that keep statistics in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.eval()


class Objective:
    """The loss of a batch, with what the teacher says about it.

    Args:
        model: the student, unwrapped.
        teacher: in eval mode; None = cross-entropy only.
        settings: the loss and the precision.
        example: some images, to find the layers whose attention is compared.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, settings: FinetuneSettings, example: Tensor
    ) -> None:
        self.settings = settings
        self.teacher = None if settings.distill == "none" else teacher
        layers: tuple[str, ...] = ()
        if settings.distill == "attention" and teacher is not None:
            layers = attention_layers(teacher, model, as_input(example, teacher))
        self._student_features = Features(model, layers)
        self._teacher_features = Features(teacher, layers) if teacher is not None else None
        self._layers = layers

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss and how many images the model classifies as the labels, or the teacher, do.

        Args:
            model: in train mode, also wrapped for data parallelism.
            images: shape (N, C, H, W), on the model's device.
            labels: shape (N,); None = distil only.
        """
        settings = self.settings
        with contextlib.ExitStack() as stack:
            stack.enter_context(autocast(images.device, settings))
            if self._layers and self._teacher_features is not None:
                stack.enter_context(self._student_features)
                stack.enter_context(self._teacher_features)
            teacher_logits = None
            if self.teacher is not None and (
                labels is None or settings.distillation_weight > 0 or self._layers
            ):
                with torch.no_grad():
                    inputs = as_input(images, self.teacher)
                    teacher_logits = class_logits(self.teacher(inputs)).to(images.device)
            logits = class_logits(model(images))
            loss = recovery_loss(logits, labels, teacher_logits, settings)
            if self._layers and self._teacher_features is not None:
                theirs = [value.to(images.device) for value in self._teacher_features.values]
                attention = attention_loss(self._student_features.values, theirs)
                loss = loss + settings.attention_weight * attention
        targets = labels
        if targets is None:
            assert teacher_logits is not None
            targets = teacher_logits.argmax(1)
        return loss, (logits.detach().argmax(1) == targets).sum()


class AveragedWeights:
    """The exponential moving average of a model's weights and buffers, as a model of its own.

    The decay of the first steps is less, (1 + step) / (10 + step), so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights behind step 1, 2, …."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        new = model.state_dict()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name], share)
            else:
                value.copy_(new[name])


@torch.no_grad()
def validate(
    model: nn.Module,
    data: Data,
    settings: FinetuneSettings,
    teacher: nn.Module | None,
    ranks: Ranks = ALONE,
) -> Validation:
    """Evaluate ``model`` on held-out images, divided among the ranks; it is left in eval mode.

    Raises:
        SpecError: images without labels while ``settings.labels`` is set.
        DataError: bad images or labels.
    """
    model.eval()
    correct = total = classes = 0
    loss = 0.0
    share = (ranks.rank, ranks.world)
    for images, labels in iterate_batches(data, settings.batch_size, share=share):
        inputs = as_input(images, model, settings)
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
    device = next((parameter.device for parameter in model.parameters()), None)
    all_correct, all_loss, all_images = ranks.sums(correct, loss, total, device=device)
    if ranks.world > 1:  # a rank may have had no images
        classes = int(ranks.gather(torch.tensor([classes], device=device)).max())
    return Validation(
        top1=all_correct / all_images, loss=all_loss / all_images, images=int(all_images), classes=classes
    )


def as_input(images: Tensor, model: nn.Module, settings: FinetuneSettings | None = None) -> Tensor:
    """Return ``images`` on the device, in the precision and the memory format of ``model``."""
    parameter = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if parameter is not None:
        images = images.to(parameter.device, parameter.dtype)
    if settings is not None and settings.channels_last and images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return images


def autocast(device: torch.device, settings: FinetuneSettings) -> contextlib.AbstractContextManager[object]:
    """Return the context of mixed precision, if the settings ask for it."""
    if settings.amp is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
