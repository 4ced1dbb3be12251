"""How far a converted model is from the dense one, on images that its fit has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groupify.scores.accuracy import evaluating
from groupify.stats.fisher import class_scores


@dataclass(frozen=True)
class Judgement:
    """What was measured.

    Attributes:
        divergence: KL divergence of the converted model's class probabilities from the dense model's,
            nats, mean over the images.
        drop: percentage points of accuracy lost; without labels the share of images whose class is
            another one, which is never less.
    """

    divergence: float
    drop: float


class Judge:
    """The dense model's answers on held-out images.

    Args:
        dense: the dense model; left untouched.
        images: shape (N, C, H, W).
        labels: class numbers, shape (N,); None = unlabelled.
        batch_size: images per step.

    Raises:
        DataError: the model's outputs are no class scores.
    """

    def __init__(
        self, dense: nn.Module, images: Tensor, labels: Tensor | None = None, *, batch_size: int = 64
    ) -> None:
        self._images = images
        self._batch_size = batch_size
        self._log_chances = self._run(dense)
        self._classes = self._log_chances.argmax(1)
        self._labels = labels if labels is not None and self._log_chances.dim() == 2 else None

    @property
    def labelled(self) -> bool:
        """Whether the drop is one of accuracy."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._images)

    def judge(self, model: nn.Module) -> Judgement:
        """Measure one converted model."""
        log_chances = self._run(model)
        divergence = F.kl_div(log_chances, self._log_chances, reduction="none", log_target=True).sum(1).mean()
        classes = log_chances.argmax(1)
        if self._labels is None:
            lost = (classes != self._classes).float().mean()
        else:
            lost = (self._classes == self._labels).float().mean() - (classes == self._labels).float().mean()
        return Judgement(float(divergence), 100 * float(lost))

    def _run(self, model: nn.Module) -> Tensor:
        parameter = next(model.parameters(), torch.empty(0))
        with evaluating(model), torch.no_grad():
            scores = [
                class_scores(model(batch.to(parameter))).float().log_softmax(1).cpu()
                for batch in self._images.split(self._batch_size)
            ]
        return torch.cat(scores)
