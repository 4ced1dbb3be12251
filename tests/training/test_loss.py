from __future__ import annotations

import math

import pytest
import torch

from groupify.training.objective import distillation_loss, recovery_loss
from groupify.training.settings import FinetuneSettings

# softmax([0, ln 3]) = (1/4, 3/4); softmax([0, 0]) = (1/2, 1/2).
TEACHER = torch.tensor([[0.0, math.log(3)]])
STUDENT = torch.zeros(1, 2)
# KL = 1/4 ln(1/2) + 3/4 ln(3/2)
KL = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
ENTROPY = math.log(2)


def test_distillation_by_hand() -> None:
    assert distillation_loss(STUDENT, TEACHER, 1.0).item() == pytest.approx(KL, rel=1e-5)


def test_temperature_divides_the_logits_and_multiplies_the_loss() -> None:
    assert distillation_loss(STUDENT, 2 * TEACHER, 2.0).item() == pytest.approx(4 * KL, rel=1e-5)


def test_distillation_is_averaged_over_the_batch_and_zero_at_the_teacher() -> None:
    students = torch.cat([STUDENT, TEACHER])
    teachers = torch.cat([TEACHER, TEACHER])
    assert distillation_loss(students, teachers, 1.0).item() == pytest.approx(KL / 2, rel=1e-5)
    assert distillation_loss(TEACHER, TEACHER, 3.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "teacher", "expected"),
    [
        (True, True, 0.75 * KL + 0.25 * ENTROPY),
        (True, False, ENTROPY),
        (False, True, KL),
    ],
)
def test_what_is_absent_has_no_weight(labels: bool, teacher: bool, expected: float) -> None:
    settings = FinetuneSettings(distillation_weight=0.75, temperature=1.0)
    loss = recovery_loss(
        STUDENT, torch.tensor([1]) if labels else None, TEACHER if teacher else None, settings
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_by_hand() -> None:
    # Targets (0.1, 0.9) against (1/4, 3/4).
    settings = FinetuneSettings(distillation_weight=0, label_smoothing=0.2)
    loss = recovery_loss(TEACHER, torch.tensor([1]), TEACHER, settings)
    assert loss.item() == pytest.approx(-0.1 * math.log(0.25) - 0.9 * math.log(0.75), rel=1e-5)
