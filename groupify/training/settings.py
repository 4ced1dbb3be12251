"""What a fine-tune is asked to do, and the learning rate that follows from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from groupify.errors import SpecError

AMP_DTYPES = (None, "bfloat16")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "one-cycle")
DISTILLATIONS = ("logits", "attention", "none")
# For each schedule, the share of the steps in which the peak learning rate is reached.
_WARMUP_FRACTIONS = {"cosine": 0.1, "one-cycle": 0.3}
# The first learning rate of a one-cycle schedule, as a share of the peak.
_ONE_CYCLE_START = 1 / 25
_SGD_RATE = 0.02
# Of AdamW: relative to the weights, and times the square root of what was lost.
_RELATIVE_RATE = 0.003
_RATE_OF_LOST, _HIGHEST_RATE, _LOWEST_RATE = 0.02, 0.01, 0.0005
# Nats, or relative error of the outputs: the statistics of the batch norms are not to be trusted then.
_MUCH_LOST = 0.3


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune; the defaults are gentle, since a careless fine-tune makes a fitted model worse.

    Attributes:
        epochs: passes over the training part, also fractions of one.
        batch_size: images per step, those of all processes and accumulated parts together.
        accumulate: in how many parts a batch goes through the model; the gradients are summed, so that
            a large batch fits in memory. Batch norms see the parts.
        optimizer: "adamw" (Loshchilov and Hutter, 2019), or "sgd" with Nesterov's momentum.
        learning_rate: peak learning rate. Of AdamW it is relative to the root mean square of each tensor of
            weights as given, at least 0.001 (Shazeer and Stern, "Adafactor", 2018): factors that stand one
            behind the other train as one, however their sizes are divided. None: 0.02 for SGD; for AdamW as
            much as was lost asks for, 0.0005 to 0.01; see ``resolved``.
        schedule: "cosine": linear warm-up, then a half cosine to zero. "one-cycle": from a 25th of the
            peak up and down to zero, both along a half cosine (Smith and Topin, 2019).
        weight_decay: for weights of two or more dimensions; none for biases and norms.
        momentum: of SGD with Nesterov's momentum, 0 = plain SGD; the first beta of AdamW.
        distill: what is learned from the teacher: "logits", "attention" (the logits, and where in the
            image the layers respond; see ``attention_loss``) or "none".
        distillation_weight: share of the logits' distillation loss, 0 to 1; the rest is cross-entropy.
        attention_weight: factor of the attention loss, which is added to the others.
        temperature: softens both distributions of the distillation loss.
        label_smoothing: of the cross-entropy, 0 to 1.
        warmup_fraction: share of the steps in which the learning rate rises; None = 0.1 for the cosine,
            0.3 for one-cycle.
        ema_decay: the weights that are validated and returned are an exponential moving average of the
            trained ones, with this decay for each step (less in the first steps); 0 = the trained ones.
        validation_fraction: share of the training images that is held out to choose the best weights; at
            most 5,000 images, of a stream 2,048.
        validations_per_epoch: how often the held-out images are evaluated; at the end as well.
        augment: whether to use the data set's augmentation; it pays in long runs only, since it moves the
            batch norm statistics away from those of plain images.
        freeze_batch_norms: batch norms keep their statistics and normalise with them in training too. None:
            with AdamW, unless so much was lost that the statistics are not to be trusted.
        labels: False = distil only, and choose the weights by agreement with the teacher. None: True where
            there are labels that something learns from: class numbers, or any with a loss for them.
        amp: "bfloat16" = mixed precision; None = the model's own.
        channels_last: train in the channels-last memory format, which some processors prefer.
        images_per_epoch: for data of unknown length: how many images make an epoch.
        seed: of the held-out part, the order of the images, the augmentation and dropout.

    Raises:
        SpecError: a value is out of range.
    """

    epochs: float = 1.0
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float | None = None
    schedule: str = "cosine"
    weight_decay: float = 1e-4
    momentum: float = 0.9
    distill: str = "logits"
    distillation_weight: float = 0.9
    attention_weight: float = 1.0
    temperature: float = 4.0
    label_smoothing: float = 0.0
    warmup_fraction: float | None = None
    ema_decay: float = 0.0
    validation_fraction: float = 0.1
    validations_per_epoch: int = 4
    augment: bool = False
    freeze_batch_norms: bool | None = None
    labels: bool | None = None
    amp: str | None = None
    channels_last: bool = False
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
        within("accumulate", 1, 1_000_000)
        within("weight_decay", 0, math.inf)
        within("attention_weight", 0, math.inf)
        within("temperature", 0, math.inf, above_low=True)
        within("validation_fraction", 0, 0.9, above_low=True)
        within("validations_per_epoch", 1, 1_000_000)
        for name in ("momentum", "distillation_weight", "label_smoothing"):
            within(name, 0, 1)
        if self.learning_rate is not None:
            within("learning_rate", 0, math.inf, above_low=True)
        if self.warmup_fraction is not None:
            within("warmup_fraction", 0, 1)
        if self.images_per_epoch is not None:
            within("images_per_epoch", 1, math.inf)
        if not 0 <= self.ema_decay < 1:
            raise SpecError(f"ema_decay is {self.ema_decay}; expected a number at least 0 and below 1")
        if self.amp not in AMP_DTYPES:
            raise SpecError(f"amp is {self.amp!r}; expected 'bfloat16' or None")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("distill", DISTILLATIONS)):
            if getattr(self, name) not in known:
                raise SpecError(
                    f"{name} is {getattr(self, name)!r}; expected {' or '.join(map(repr, known))}"
                )

    @property
    def is_resolved(self) -> bool:
        """Whether nothing depends on what was lost."""
        return self.learning_rate is not None and self.freeze_batch_norms is not None

    def resolved(self, lost: float | None) -> FinetuneSettings:
        """Return the settings with all that depends on what a conversion has lost.

        Args:
            lost: KL divergence of the student's class probabilities from the teacher's, nats, mean over the
                images; without classes the relative error of the outputs; None = not known.
        """
        adamw = self.optimizer == "adamw"
        rate, frozen = self.learning_rate, self.freeze_batch_norms
        if rate is None:
            rate = _SGD_RATE if not adamw else _RELATIVE_RATE if lost is None else _rate_for(lost)
        if frozen is None:
            frozen = adamw and lost is not None and lost < _MUCH_LOST
        return dataclasses.replace(self, learning_rate=rate, freeze_batch_norms=frozen)

    def as_recipe(self) -> dict[str, Any]:
        """Return what a recipe keeps of it, as JSON values."""
        return dataclasses.asdict(self)


def _rate_for(lost: float) -> float:
    return min(max(_RATE_OF_LOST * math.sqrt(max(lost, 0.0)), _LOWEST_RATE), _HIGHEST_RATE)


def learning_rate_at(step: int, steps: int, settings: FinetuneSettings) -> float:
    """Return the learning rate of step 0 ≤ ``step`` < ``steps``.

    "cosine" is the schedule of Loshchilov and Hutter (2017) without restarts, behind a linear warm-up;
    "one-cycle" that of Smith and Topin (2019), with cosine slopes and without the cycle of the momentum.
    """
    peak, fraction = settings.resolved(None).learning_rate, settings.warmup_fraction
    assert peak is not None
    warmup = math.ceil((_WARMUP_FRACTIONS[settings.schedule] if fraction is None else fraction) * steps)
    if step >= warmup:
        return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
    if settings.schedule == "one-cycle":
        rise = (1 - math.cos(math.pi * step / warmup)) / 2
        return peak * (_ONE_CYCLE_START + (1 - _ONE_CYCLE_START) * rise)
    return peak * (step + 1) / (warmup + 1)
