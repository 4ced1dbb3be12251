"""Hooks on a conv: those that look on stay on its replacement, with those that act the conv is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.errors import GroupifyWarning
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.planning.plan_file import PlanFile
from groupify.structures import GROUPED, GROUPED_POINTWISE
from tests.cases.nets import (
    Straight,
    assert_exact,
    converted,
    converted_names,
    grouped_already,
    noise,
    planned,
    reason_of,
    refusal,
)

OUTPUT = "a forward hook changes its output"
INPUT = "a forward pre-hook changes its input"


def rescaled(conv: nn.Module) -> None:
    conv.register_forward_hook(lambda module, inputs, output: output.abs() * 2)


def rescaled_in_place(conv: nn.Module) -> None:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.mul_(2)

    conv.register_forward_hook(hook)


def rescaled_with_names(conv: nn.Module) -> None:
    conv.register_forward_hook(lambda module, inputs, named, output: 2 * output, with_kwargs=True)


def clipped_always(conv: nn.Module) -> None:
    """Does nothing to the example, but to other images."""
    conv.register_forward_hook(lambda module, inputs, output: output.clamp(max=9), always_call=True)


def shifted_before(conv: nn.Module) -> None:
    conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2 - 1,))


def shifted_before_with_names(conv: nn.Module) -> None:
    conv.register_forward_pre_hook(lambda module, inputs, named: ((inputs[0] + 1,), named), with_kwargs=True)


def shifted_before_in_place(conv: nn.Module) -> None:
    def hook(module: nn.Module, inputs: Any) -> None:
        inputs[0].add_(1)

    conv.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (rescaled, OUTPUT),
        (rescaled_in_place, OUTPUT),
        (rescaled_with_names, OUTPUT),
        (clipped_always, OUTPUT),
        (shifted_before, INPUT),
        (shifted_before_with_names, INPUT),
        (shifted_before_in_place, INPUT),
    ],
)
def test_a_conv_whose_hook_acts_is_left_alone(add: Callable[[nn.Module], None], reason: str) -> None:
    net = grouped_already(Straight())
    add(net.c1)
    plan = planned(net)
    assert reason_of(plan, "c1") == reason
    assert converted_names(plan) == ["rest.0"]
    assert_exact(converted(net, plan=plan).model, net)


@pytest.mark.parametrize("family", [GROUPED, GROUPED_POINTWISE])
def test_a_hook_that_looks_on_stays_on_the_replacement(family: str) -> None:
    net = grouped_already(Straight())
    seen: list[tuple[str, int]] = []
    c1 = net.c1
    c1.register_forward_pre_hook(lambda *_: seen.append(("before", 2)))
    c1.register_forward_pre_hook(lambda *called: seen.append(("before", len(called))), with_kwargs=True)
    c1.register_forward_hook(lambda *called: seen.append(("behind", len(called))), with_kwargs=True)
    c1.register_full_backward_hook(lambda *_: seen.append(("backward", 3)))
    c1.register_full_backward_pre_hook(lambda *_: seen.append(("gradient", 2)))
    plan = planned(net, structures=(family,))
    assert converted_names(plan) == ["c1", "rest.0"]
    model = converted(net, plan=plan).model
    assert_exact(model, net)
    seen.clear()
    model(noise(1)).sum().backward()
    assert seen == [("before", 2), ("before", 3), ("behind", 4), ("gradient", 2), ("backward", 3)]


def test_hooks_see_few_images_of_a_conversion() -> None:
    """Nobody wants the activations of all calibration images in a list."""
    net = grouped_already(Straight())
    seen: list[int] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(len(output))

    net.c1.register_forward_hook(keep)
    plan = planned(net)
    seen.clear()
    converted(net, plan=plan)
    assert seen == [2]


class Reading(Straight):
    """Adds what its own hook has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.c1.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.kept.append(output)

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        return result + self.kept.pop().abs().mean()


def test_what_a_hook_keeps_for_the_model_is_part_of_it() -> None:
    net = grouped_already(Reading())
    model = converted(net).model
    assert_exact(model, net)
    assert not net.kept


def test_a_hook_that_uses_the_weight_leaves_the_conv_alone() -> None:
    net = grouped_already(Straight())
    kept: list[Tensor] = []

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append(module.get_parameter("weight").sum(1))  # another shape with groups

    net.c1.register_forward_hook(watch)
    assert reason_of(planned(net), "c1") == "its weight is used outside of its own call, in the model itself"


def test_state_hooks_leave_the_conv_alone() -> None:
    net = grouped_already(Straight())
    register: Any = net.c1.register_state_dict_post_hook
    register(lambda module, state, prefix, local: None)
    assert "state-dict hooks" in (reason_of(planned(net), "c1") or "")
    assert_exact(converted(net).model, net)


def test_a_state_hook_of_the_whole_is_no_obstacle() -> None:
    net = grouped_already(Straight())

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, local: Any) -> None:
        for key in list(state):
            state[f"net.{key}"] = state.pop(key)

    register: Any = net.register_state_dict_post_hook
    register(rename)
    model = converted(net).model
    assert_exact(model, net)
    assert "net.c1.weight" in model.state_dict()


def test_a_forward_replaced_on_the_conv_leaves_it_alone() -> None:
    net = grouped_already(Straight())
    c1 = net.c1

    def doubled(self: nn.Conv2d, x: Tensor) -> Tensor:
        return 2 * nn.Conv2d.forward(self, x)

    object.__setattr__(c1, "forward", doubled.__get__(c1))
    plan = planned(net)
    assert reason_of(plan, "c1") == (
        "its forward was replaced on the layer itself, so it may differ from Conv2d's"
    )
    assert_exact(converted(net, plan=plan).model, net)
    object.__setattr__(net.rest[0], "forward", doubled.__get__(net.rest[0]))
    assert "take the replacement off first (del conv.forward)" in refusal(lambda: planned(net))


def closed_over(conv: nn.Conv2d) -> None:
    plain = conv.forward
    object.__setattr__(conv, "forward", lambda x: 2 * plain(x))


def hooked_over(conv: nn.Conv2d) -> None:
    weight = conv.weight
    conv.register_forward_hook(lambda module, inputs, output: output + weight.mean())


@pytest.mark.parametrize("add", [closed_over, hooked_over])
def test_a_function_that_holds_on_to_the_model_itself_is_refused(add: Callable[[nn.Conv2d], None]) -> None:
    """Every copy of the model would compute with the weights of the original."""
    net = grouped_already(Straight())
    add(net.c1)
    assert "still computes with 'c1.weight' of the model given" in refusal(lambda: converted(net))


def test_a_hook_that_acts_since_the_plan_was_made_is_noticed() -> None:
    net = grouped_already(Straight())
    plan = planned(net)
    saved = PlanFile.of("net", plan)
    rescaled(net.c1)
    assert "a hook on it changes what it computes; plan again" in refusal(lambda: converted(net, plan=plan))
    assert "layer 'c1' cannot be replaced as planned: a forward hook changes its output" in refusal(
        lambda: saved.apply(net, (3, 16, 16))
    )


def test_hooks_that_are_lost_between_saving_and_loading_are_named(tmp_path: Path) -> None:
    net = grouped_already(Straight())
    rescaled(net.stem)
    plan = planned(net)
    model = converted(net, plan=plan).model
    spec = ModelSpec("tests.cases.nets:Straight", {}, (3, 16, 16), None)
    groupify.save(tmp_path / "out", model, groupify.Recipe(spec, WeightsOrigin("factory"), plan.recipes))
    assert_exact(groupify.load(tmp_path / "out", model=net), model)
    with pytest.warns(GroupifyWarning, match=r"or a forward of its own, on 'stem', which are not saved"):
        groupify.load(tmp_path / "out", trust=True)


def test_hooks_of_the_layers_around_stay_where_they_are() -> None:
    net = grouped_already(Straight())
    net.stem.register_forward_hook(lambda module, inputs, output: 3 * output.abs())
    net.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))
    model = converted(net).model
    assert_exact(model, net)
    assert len(model.get_submodule("stem")._forward_hooks) == 1


def test_a_budget_leaves_the_same_convs_alone() -> None:
    net = grouped_already(Straight(32))
    rescaled(net.c1)
    rules = groupify.Rules(min_group_width=1)
    found = groupify.plan_for_budget(net, (3, 16, 16), "macs=80%", rules=rules)
    assert reason_of(found.plan, "c1") == OUTPUT
    assert converted_names(found.plan) == ["rest.0"]


def test_training_modes_and_flags_are_those_of_the_conv() -> None:
    net = grouped_already(Straight()).to(memory_format=torch.channels_last)
    net.c1.train()
    net.c1.weight.requires_grad_(False)
    again: Any = converted(net).model.get_submodule("c1")
    assert again.groups == 4
    assert again.training
    assert (again.weight.requires_grad, again.bias.requires_grad) == (False, True)
    assert again.weight.is_contiguous(memory_format=torch.channels_last)
