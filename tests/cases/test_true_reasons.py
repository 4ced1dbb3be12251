"""A refusal to plan tells the true reason, and following its advice helps."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

import groupify
from tests.cases.nets import Straight, converted_names, planned, refusal
from tests.conftest import Run

SHAPE = (3, 8, 8)
NOTHING = "no convolution worth grouping among the "


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 2 * super().forward(x)
        return result


def chain(*convs: nn.Module) -> nn.Module:
    """Convs behind a stem, with ReLUs between."""
    first: Any = convs[0]
    layers: list[nn.Module] = [nn.Conv2d(3, first.in_channels, 1)]
    for conv in convs:
        layers += [nn.ReLU(), conv]
    return nn.Sequential(*layers)


def replaced_forward() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    plain = conv.forward
    object.__setattr__(conv, "forward", lambda x: 2 * plain(x))
    return chain(conv)


def hooked() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    return chain(conv)


class Spare(nn.Module):
    """A conv that inference does without, as heads for training are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spare = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.stem(x)
        return self.spare(result) if self.training else result


def tied() -> nn.Module:
    one, other = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
    other.weight = one.weight
    return chain(one, other)


def shortcut() -> nn.Module:
    return chain(nn.Conv2d(16, 16, 1, stride=2), nn.Conv2d(16, 16, 15, padding=7, groups=2))


PAIRS: dict[str, Any] = {"structures": ("grouped-pointwise",)}
STEM = "first conv: too few input channels (3) (1×)"
# What is planned, with what rules, and the reasons and the advice of the refusal.
REASONS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[str], str]] = {
    "subclasses": (
        lambda: chain(Scaled(16, 16, 3), Scaled(16, 16, 3)), {},
        ["a subclass of Conv2d (Scaled), whose forward may differ (2×)", STEM],
        "only plain nn.Conv2d layers are replaced: use them, and do what differs around them",
    ),
    "replaced forward": (
        replaced_forward, {},
        ["its forward was replaced on the layer itself, so it may differ from Conv2d's (1×)", STEM],
        "take the replacement off first (del conv.forward)",
    ),
    "computed weights": (
        lambda: chain(parametrizations.weight_norm(nn.Conv2d(16, 16, 3))), {},
        ["its weight is parametrized; first call torch.nn.utils.parametrize.remove_parametrizations(conv, "
         "'weight') (1×)", STEM],
        "",
    ),
    "hooks": (
        hooked, {}, ["a forward hook changes its output (1×)", STEM],
        "let the model call the layer itself, and do the rest in a module of its own",
    ),
    "one weight": (
        tied, {}, ["it shares its weight with '4.weight' (2×)", STEM],
        "give each layer a weight of its own",
    ),
    "only in training": (
        Spare, {}, ["never runs in inference (1×)", STEM], "give the part that runs in inference",
    ),
    "depthwise": (
        lambda: chain(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 3, groups=16)), {},
        ["depthwise already (2×)", STEM], "",
    ),
    "grouped": (
        lambda: chain(nn.Conv2d(16, 16, 3, groups=2)), {}, ["grouped already (2 groups) (1×)", STEM], "",
    ),
    "a stem alone": (lambda: nn.Sequential(nn.Conv2d(3, 64, 3)), {}, [STEM], ""),
    "a shortcut alone": (
        shortcut, {},
        ["shortcut with under 1% of the MACs: lets the groups mix; see --include (1×)",
         "grouped already (2 groups) (1×)", STEM],
        "--include NAME converts it all the same",
    ),
    "no common divisor": (
        lambda: chain(nn.Conv2d(16, 9, 3)), {},
        ["no number of groups from 2 to 4 divides 16 → 9 channels (1×)", STEM], "",
    ),
    "patterns": (
        Straight, {"exclude": ("*",)}, ["excluded (3×)"],
        "leave --include and --exclude out, or give other patterns",
    ),
    "pointwise convs": (
        lambda: chain(nn.Conv2d(16, 16, 1)), PAIRS,
        ["a 1×1 conv costs less than a grouped conv and a pointwise conv (1×)", STEM],
        "--structure grouped makes it a grouped conv alone",
    ),
    "pairs that cost more": (
        lambda: chain(nn.Conv2d(16, 16, (1, 2))), PAIRS | {"min_group_width": 8},
        ["2 groups and a pointwise conv would cost more than this conv (1×)", STEM],
        "--structure grouped makes it a grouped conv alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_the_true_one(name: str) -> None:
    make, rules, reasons, advice = REASONS[name]
    said = refusal(lambda: planned(make(), SHAPE, **rules))
    assert re.sub(r"\d+ convs: ", "", said) == NOTHING + "; ".join(filter(None, (", ".join(reasons), advice)))


def test_advice_on_the_width_of_groups_helps() -> None:
    net = chain(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 24, 3))
    said = refusal(lambda: planned(net, SHAPE, min_group_width=16))
    assert "groups narrower than 16 channels are slower; 16 → 16 channels are too few (2×)" in said
    (width,) = re.findall(r"--min-group-width (\d+) or less allows groups all the same$", said)
    assert converted_names(planned(net, SHAPE, min_group_width=int(width))) == ["2", "6"]


def test_advice_on_the_number_of_groups_helps() -> None:
    net = chain(nn.Conv2d(15, 25, 3))
    said = refusal(lambda: planned(net, SHAPE, groups=4))
    (groups,) = re.findall(
        r"no number of groups from 2 to 4 divides 15 → 25 .* try (\d+) groups or more$", said
    )
    assert converted_names(planned(net, SHAPE, groups=int(groups))) == ["2"]


def test_advice_on_speed_helps() -> None:
    net = chain(nn.Conv2d(64, 24, 3), nn.Conv2d(24, 24, 3))
    said = refusal(lambda: planned(net, SHAPE, min_group_width="auto", cpu="avx2", groups=2))
    assert "would be slower with them" in said or "narrower than" in said
    (width,) = re.findall(r"--min-group-width (\d+)", said)
    assert planned(net, SHAPE, min_group_width=int(width), groups=2).converted


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (nn.Flatten, "the model has no conv layer, so there is no convolution worth grouping"),
        (Functions, "; the model itself calls F.conv2d with a weight of shape (16, 3, 3, 3) (1×): not"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 16, 3)), "the model has no conv layer"),
    ],
)
def test_no_conv_layer(make: Callable[[], nn.Module], text: str) -> None:
    assert text in refusal(lambda: planned(make(), SHAPE))


@pytest.mark.parametrize("name", ["subclasses", "depthwise", "hooks", "one weight"])
def test_a_budget_has_the_same_reasons(name: str) -> None:
    make, _, reasons, advice = REASONS[name]
    rules = groupify.Rules(min_group_width=1)
    said = refusal(lambda: groupify.plan_for_budget(make(), SHAPE, "macs=50%", rules=rules))
    assert reasons[0] in said
    assert said.endswith(advice)


def test_a_budget_names_the_most_groups_that_were_tried() -> None:
    net, rules = chain(nn.Conv2d(16, 9, 3)), groupify.Rules(min_group_width=1, structures=("grouped",))
    said = refusal(lambda: groupify.plan_for_budget(net, SHAPE, "macs=50%", rules=rules))
    assert "no number of groups from 2 to 64 divides 16 → 9 channels" in said


# accuracies to compare -------------------------------------------------------------------------


def without_labels() -> dict[str, TensorDataset]:
    """A data set for the command line."""
    return {"train": TensorDataset(torch.zeros(8, 3, 8, 8)), "test": TensorDataset(torch.zeros(8, 3, 8, 8))}


def without_test() -> dict[str, TensorDataset]:
    """A data set for the command line."""
    return {"train": TensorDataset(torch.zeros(8, 3, 8, 8), torch.arange(8))}


@pytest.mark.parametrize(
    ("net", "data", "text"),
    [
        ("net", None, "give --data with labels and a test part"),
        ("segmenter", "tests.cli_nets:data", "gives no logits of shape (N, classes): leave it out"),
        ("net", "tests.cases.test_true_reasons:without_labels", "has no labels: give other --data"),
        ("net", "tests.cases.test_true_reasons:without_test", "has no test part: give other --data"),
    ],
)
def test_what_hinders_a_comparison_of_accuracies(run: Run, net: str, data: str | None, text: str) -> None:
    options = ("--input-size", "3,8,8", "--uniform", "2", *(() if data is None else ("--data", data)))
    outcome = run("convert", f"tests.cli_nets:{net}", "-g", 2, *options)
    assert outcome.code == 2
    assert "--uniform compares accuracies" in outcome.err
    assert text in " ".join(outcome.err.split())
