"""What a fine-tune is asked to do, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from groupify.errors import SpecError

AMP_DTYPES = (None, "bfloat16")


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune; the defaults are gentle, since a careless fine-tune makes a fitted model worse.

    Attributes:
        epochs: passes over the training part, also fractions of one.
        batch_size: images per step.
        learning_rate: peak learning rate, after the warm-up.
        weight_decay: for weights of two or more dimensions; none for biases and norms.
        momentum: of SGD with Nesterov's momentum; 0 = plain SGD.
        distillation_weight: share of the distillation loss, 0 to 1; the rest is cross-entropy.
        temperature: softens both distributions of the distillation loss.
        label_smoothing: of the cross-entropy, 0 to 1.
        warmup_fraction: share of the steps in which the learning rate rises linearly; a half cosine
            takes it to zero in the remaining ones.
        validation_fraction: share of the training images that is held out to choose the best weights.
        validations_per_epoch: how often the held-out images are evaluated; at the end as well.
        augment: whether to use the data set's augmentation; it pays in long runs only, since it moves the
            batch norm statistics away from those of plain images.
        labels: False = distil only, and choose the weights by agreement with the teacher.
        amp: "bfloat16" = mixed precision; None = the model's own.
        images_per_epoch: for data of unknown length: how many images make an epoch.
        seed: of the held-out part, the order of the images, the augmentation and dropout.

    Raises:
        SpecError: a value is out of range.
    """

    epochs: float = 1.0
    batch_size: int = 64
    learning_rate: float = 0.02
    weight_decay: float = 1e-4
    momentum: float = 0.9
    distillation_weight: float = 0.9
    temperature: float = 4.0
    label_smoothing: float = 0.0
    warmup_fraction: float = 0.1
    validation_fraction: float = 0.1
    validations_per_epoch: int = 4
    augment: bool = False
    labels: bool = True
    amp: str | None = None
    images_per_epoch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        def within(name: str, low: float, high: float, *, above_low: bool = False) -> None:
            value = getattr(self, name)
            valid = math.isfinite(value) and low <= value <= high and not (above_low and value == low)
            if not valid:
                limits = f"above {low:g}" if above_low else f"at least {low:g}"
                upper = "" if math.isinf(high) else f" and at most {high:g}"
                raise SpecError(f"{name} is {value}; expected a number {limits}{upper}")

        within("epochs", 0, 100_000, above_low=True)
        within("batch_size", 2, 1_000_000)
        within("learning_rate", 0, math.inf, above_low=True)
        within("weight_decay", 0, math.inf)
        within("temperature", 0, math.inf, above_low=True)
        within("validation_fraction", 0, 0.9, above_low=True)
        within("validations_per_epoch", 1, 1_000_000)
        for name in ("momentum", "distillation_weight", "label_smoothing", "warmup_fraction"):
            within(name, 0, 1)
        if self.images_per_epoch is not None:
            within("images_per_epoch", 1, math.inf)
        if self.amp not in AMP_DTYPES:
            raise SpecError(f"amp is {self.amp!r}; expected 'bfloat16' or None")


def learning_rate_at(step: int, steps: int, settings: FinetuneSettings) -> float:
    """Return the learning rate of step 0 ≤ ``step`` < ``steps``: linear warm-up, then a half cosine to 0.

    A cosine without restarts is the schedule of Loshchilov and Hutter (2017).
    """
    warmup = math.ceil(settings.warmup_fraction * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return settings.learning_rate * (1 + math.cos(math.pi * done)) / 2
