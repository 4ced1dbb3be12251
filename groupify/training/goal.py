"""What a training is for: class scores or other outputs, by labels, the teacher, or the user's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from groupify.data.batches import UNLABELLED
from groupify.data.items import Labelled
from groupify.data.splits import DataSplits
from groupify.errors import SpecError, WrongTypeError
from groupify.tasks import CLASSES, class_scores, describe_outputs, task_of
from groupify.training.output_errors import float_outputs, relative_errors
from groupify.training.own_loss import Loss, loss_name, loss_of_batch, losses_of_images
from groupify.training.settings import FinetuneSettings


@dataclass(frozen=True)
class Goal:
    """What makes a student better than it is.

    Attributes:
        task: ``"classes"`` or ``"outputs"``, see ``groupify.tasks``.
        labels: whether it learns from labels; False = from its teacher alone.
        loss: the user's, for labels of any form; None = the cross-entropy of classes, or, without labels, how
            far it is from its teacher.
        variances: of the teacher's outputs where they are no classes, see ``relative_errors``.
        reads: how the labels of the data are read.
    """

    task: str = CLASSES
    labels: bool = True
    loss: Loss | None = None
    variances: tuple[float, ...] = ()
    reads: Labelled = True

    @property
    def loss_name(self) -> str | None:
        """What the user's loss is called."""
        return None if self.loss is None else loss_name(self.loss)

    def compared(self, outputs: Any) -> Any:
        """Return what of the outputs is compared with the teacher's: class scores, or all that are floats."""
        return class_scores(outputs) if self.task == CLASSES else float_outputs(outputs)

    def targets(self, labels: Tensor, theirs: Any, device: torch.device) -> Any:
        """Return what a student is to give for a batch: the labels, or what the teacher says.

        Args:
            labels: shape (n, …).
            theirs: what of the teacher's outputs is ``compared``; not looked at where there are labels.
            device: of the student.

        Raises:
            SpecError: labels are to be learned from, and there are none.
        """
        if not self.labels:
            return theirs.argmax(1).to(device) if self.task == CLASSES else theirs
        if not labels.is_floating_point() and labels.dim() == 1:
            missing = labels == UNLABELLED
            # A loss of the user's own may have this very number for what it leaves out.
            if bool(missing.any() if self.loss is None else missing.all()):
                raise SpecError(
                    "the training images have no labels: distil only, with labels 'none' (labels=False)"
                )
        return labels.to(device)

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return how wrong the outputs are, image by image, shape (n,)."""
        if self.loss is not None:
            return losses_of_images(self.loss, outputs, targets)
        if self.task == CLASSES:
            return F.cross_entropy(class_scores(outputs).float(), targets, reduction="none")
        return relative_errors(float_outputs(outputs), targets, self.variances)

    def supervised(self, outputs: Any, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean loss of a batch by its labels, a number."""
        if self.loss is not None:
            return loss_of_batch(self.loss, outputs, labels).mean()
        return F.cross_entropy(class_scores(outputs).float(), labels, label_smoothing=label_smoothing)

    def right(self, outputs: Any, targets: Any) -> Tensor | None:
        """Return which images have the right class, boolean (n,); None where that cannot be said."""
        if self.task != CLASSES or targets.dim() != 1 or targets.is_floating_point():
            return None
        return cast(Tensor, class_scores(outputs).detach().argmax(1) == targets)


def make_goal(
    outputs: Any, data: DataSplits, settings: FinetuneSettings, *, task: str, loss: Loss | None, taught: bool
) -> Goal:
    """Return what a student is to get better at.

    Args:
        outputs: what it gives.
        data: whether there are class numbers.
        settings: whether to learn from labels; None = where there are such as it can learn from.
        task: what the outputs are taken for, see ``groupify.tasks``.
        loss: the user's; None = none.
        taught: whether there is a teacher.

    Raises:
        WrongTypeError: the loss is no function.
        SpecError: there is nothing to learn from, or what is asked for contradicts itself.
    """
    task = task_of(outputs, task)
    labels = settings.labels
    if labels is None:
        labels = loss is not None or (data.labelled and task == CLASSES)
    if loss is not None:
        _check_loss(loss, data, settings, task)
    elif labels:
        _check_labels(outputs, data, task)
    if not labels and (not taught or settings.distill == "none"):
        what = "" if data.labelled else f"data {data.spec!r} has no labels that are class numbers: "
        raise SpecError(f"{what}neither labels nor a teacher: fine-tuning needs one of them")
    of_classes = data.labelled and task == CLASSES
    return Goal(task, labels, loss, reads="any" if loss is not None else of_classes)


def _check_loss(loss: Loss, data: DataSplits, settings: FinetuneSettings, task: str) -> None:
    if not callable(loss):
        raise WrongTypeError(
            f"loss is a {type(loss).__name__}: expected a function of outputs and labels that returns a "
            "tensor"
        )
    name = loss_name(loss)
    if settings.labels is False:
        raise SpecError(
            f"the loss {name!r} is for labels, and none are to be used (labels=False, --labels none): leave "
            "out one of the two"
        )
    if settings.augment and data.augment is not None and not (data.labelled and task == CLASSES):
        raise SpecError(
            f"the augmentation changes images and not what the loss {name!r} compares them with: set "
            "augment=False, and let the data set augment both"
        )


def _check_labels(outputs: Any, data: DataSplits, task: str) -> None:
    if task != CLASSES:
        raise SpecError(
            f"labels are asked for, and the task is {task!r} ({describe_outputs(outputs)}): give a loss for "
            "them (loss=function, --loss module:function), or learn from the dense model alone "
            "(labels=False, --labels none)"
        )
    if not data.labelled:
        raise SpecError(f"data {data.spec!r} has no labels: distil only (labels=False)")
