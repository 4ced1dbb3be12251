from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from groupify.errors import SpecError
from groupify.training.settings import FinetuneSettings, learning_rate_at


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", -1),
        ("epochs", math.nan),
        ("epochs", math.inf),
        ("batch_size", 1),
        ("learning_rate", 0),
        ("learning_rate", math.inf),
        ("weight_decay", -1e-4),
        ("momentum", 1.5),
        ("distillation_weight", -0.1),
        ("distillation_weight", 1.1),
        ("temperature", 0),
        ("label_smoothing", 2),
        ("warmup_fraction", -1),
        ("validation_fraction", 0),
        ("validation_fraction", 1),
        ("validations_per_epoch", 0),
        ("images_per_epoch", 0),
        ("amp", "float16"),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=f"{name} is {value!r}; expected") as raised:
        FinetuneSettings(**{name: value})
    assert "\n" not in str(raised.value)


def test_settings_are_json() -> None:
    settings = FinetuneSettings(epochs=0.1, amp="bfloat16")
    assert FinetuneSettings(**json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_the_learning_rate_rises_then_follows_a_cosine() -> None:
    settings = FinetuneSettings(learning_rate=0.8, warmup_fraction=0.2)
    rates = [learning_rate_at(step, 20, settings) for step in range(20)]
    # Four warm-up steps towards the peak at step 4, then 16 steps of a half cosine.
    assert rates[:5] == pytest.approx([0.16, 0.32, 0.48, 0.64, 0.8])
    assert rates[12] == pytest.approx(0.4)
    assert rates[8] == pytest.approx(0.4 * (1 + math.sqrt(0.5)))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_short_runs_have_a_positive_learning_rate(steps: int, warmup: float) -> None:
    settings = FinetuneSettings(learning_rate=1.0, warmup_fraction=warmup)
    assert all(0 < learning_rate_at(step, steps, settings) <= 1 for step in range(steps))
