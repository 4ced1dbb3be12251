"""A forward that runs without gradients, in whole or in part: decorated, detached, or with a frozen part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import groupify
from groupify.conversion.in_order import Calibration
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.data.splits import DataSplits
from groupify.errors import GroupifyWarning
from groupify.planning.search import SearchOptions
from groupify.structures import Plan
from groupify.training.finetuning import FinetuneResult
from tests.cases.nets import EXACT, assert_exact, converted, grouped_already, noise, planned, refusal

SHAPE = (3, 8, 8)
SETTINGS = groupify.FinetuneSettings(epochs=0.5, batch_size=16)


class Plain(nn.Module):
    """Two stages, of which each may run without gradients, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.c1 = nn.Conv2d(16, 16, 3, padding=1)
        self.c2 = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.c1(torch.relu(self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.c2(self.features(x))).mean((2, 3)))
        return result


class FrozenPart(Plain):
    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().features(x)


class Detached(Plain):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x).detach()


class NoGrad(Plain):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Inference(Plain):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


ALL = (FrozenPart, Detached, NoGrad, Inference)


@pytest.mark.parametrize("make", ALL)
def test_it_converts(make: type[Plain]) -> None:
    net = grouped_already(make())
    assert_exact(converted(net, noise(32, SHAPE)).model, net, noise(8, SHAPE, 9))


@pytest.mark.parametrize("make", ALL)
def test_a_budget_weighs_all_outputs_the_same_and_says_so(make: type[Plain]) -> None:
    net = grouped_already(make())
    with pytest.warns(GroupifyWarning, match=r"runs without gradients.*all outputs of a conv weigh the same"):
        found = budgeted(net)
    with pytest.warns(GroupifyWarning):
        assert found.recipes == budgeted(grouped_already(NoGrad())).recipes  # wherever the gradients end


def budgeted(net: nn.Module) -> Plan:
    rules, options = groupify.Rules(min_group_width=1), SearchOptions(verify=False)
    images = noise(16, SHAPE)
    return groupify.plan_for_budget(net, SHAPE, "macs=60%", images, rules=rules, options=options).plan


def tuned(student: nn.Module, teacher: nn.Module, settings: groupify.FinetuneSettings) -> FinetuneResult:
    labels = torch.randint(0, 4, (96,), generator=torch.Generator().manual_seed(1))
    data = DataSplits("case", TensorDataset(noise(96, SHAPE), labels), None, 4, None, True)
    return groupify.finetune(student, data, teacher=teacher, settings=settings)


@pytest.mark.parametrize("make", [NoGrad, Inference])
def test_fine_tuning_what_has_no_gradients_is_refused(make: type[Plain]) -> None:
    net = grouped_already(make())
    assert refusal(lambda: tuned(net, net, SETTINGS)).startswith(
        "the loss has no gradient: the model's forward"
    )


@pytest.mark.parametrize("make", [FrozenPart, Detached])
def test_a_part_without_gradients_stays_as_it_is_in_fine_tuning(make: type[Plain]) -> None:
    net = grouped_already(make())
    last: Any = tuned(net, net, SETTINGS).last_model
    assert torch.equal(last.c1.weight, net.c1.weight)
    assert not torch.equal(last.c2.weight, net.c2.weight)


@pytest.mark.parametrize("distill", ["logits", "attention"])
def test_a_teacher_may_run_in_inference_mode(distill: str) -> None:
    settings = groupify.FinetuneSettings(epochs=0.5, batch_size=16, distill=distill)
    tuned(grouped_already(Plain()), grouped_already(Inference()), settings)


def freeze_all(net: nn.Module) -> None:
    net.requires_grad_(False)


def freeze_first(net: nn.Module) -> None:
    net.get_submodule("c1").requires_grad_(False)


@pytest.mark.parametrize("freeze", [freeze_all, freeze_first])
def test_frozen_weights_are_fitted_and_reconstructed_and_stay_frozen(freeze: Callable[[Plain], None]) -> None:
    net = grouped_already(Plain())
    freeze(net)
    images = noise(32, SHAPE)
    calibration = Calibration(images, fit=EXACT, reconstruction=ReconstructionOptions(steps=3))
    model = groupify.convert(net, planned(net, SHAPE), calibration).model
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
