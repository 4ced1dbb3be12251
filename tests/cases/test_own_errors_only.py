"""Whatever a model does, only groupify's own errors leave the API and the command line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.errors import GroupifyError
from tests.cases.bad_nets import MESSAGE, Failing, HungryError, Odd, Unfinished
from tests.cases.nets import grouped_already, noise
from tests.cases.small import PAIRS, TINY, Between, convert_small, right_or_refused, situations
from tests.conftest import Run

RULES = groupify.Rules(min_group_width=1)


def labelled(count: int = 16) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(noise(count, TINY), torch.arange(count) % 5)


def plan(net: nn.Module, folder: Path) -> object:
    return groupify.plan(net, TINY, groups=PAIRS, rules=RULES)


def good_plan() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return groupify.plan(Between(torch.relu).eval(), TINY, groups=PAIRS, rules=RULES)


def convert(net: nn.Module, folder: Path) -> object:
    return groupify.convert(net, good_plan(), noise(16, TINY))


def convert_from_weights(net: nn.Module, folder: Path) -> object:
    return groupify.convert(net, good_plan())


def plan_for_budget(net: nn.Module, folder: Path) -> object:
    return groupify.plan_for_budget(net, TINY, "macs=90%", noise(16, TINY), rules=RULES)


def export(net: nn.Module, folder: Path) -> object:
    return groupify.export(net, folder / "m.onnx", input_shape=TINY)


def evaluate(net: nn.Module, folder: Path) -> object:
    return groupify.evaluate(net, labelled())


CALLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "plan": plan,
    "convert": convert,
    "convert from weights": convert_from_weights,
    "plan for a budget": plan_for_budget,
    "export": export,
    "evaluate": evaluate,
}


@pytest.mark.filterwarnings("ignore::groupify.GroupifyWarning")
@pytest.mark.parametrize("call", situations(CALLS))
def test_what_a_model_raises_is_the_cause_of_the_refusal(
    call: Callable[[nn.Module, Path], object], tmp_path: Path
) -> None:
    with pytest.raises(GroupifyError, match=MESSAGE[:13]) as refused:
        call(Failing().eval(), tmp_path)
    assert "\n" not in str(refused.value)
    cause: BaseException | None = refused.value
    while cause is not None and not isinstance(cause, HungryError):
        cause = cause.__cause__
    assert cause is not None


@pytest.mark.filterwarnings("ignore::groupify.GroupifyWarning")
@pytest.mark.parametrize(
    "call",
    situations({k: v for k, v in CALLS.items() if k in ("convert", "evaluate")}),
)
def test_what_a_model_raises_later_is_the_cause_too(
    call: Callable[[nn.Module, Path], object], tmp_path: Path
) -> None:
    with pytest.raises(GroupifyError, match=MESSAGE[:13]):
        call(Failing("many images").eval(), tmp_path)


@pytest.mark.parametrize("result", [None, "text", 3, (), {}, object()])
def test_a_model_without_a_tensor_as_result_is_converted_or_refused(result: Any) -> None:
    net = grouped_already(Odd(result))
    right_or_refused(lambda: convert_small(net))


def test_a_model_without_forward_is_refused() -> None:
    with pytest.raises(GroupifyError, match="forward"):
        groupify.plan(Unfinished(), (16, 8, 8), groups=2)


def test_an_interruption_is_none_of_our_business() -> None:
    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        groupify.plan(Between(interrupt), TINY, groups=PAIRS)


COMMANDS = {
    "plan": "plan tests.cases.bad_nets:failing --input-size 3,8,8",
    "convert": "convert tests.cases.bad_nets:failing --input-size 3,8,8 --data tests.cli_nets:data -o out",
    "many images": "convert tests.cases.bad_nets:failing_on_many_images --input-size 3,8,8"
    " --min-group-width 1 -g 2 --data tests.cli_nets:data -o out -q",
}


@pytest.mark.parametrize("command", situations(COMMANDS))
def test_the_command_line_says_what_the_model_raised_in_one_line(command: str, run: Run) -> None:
    outcome = run(*command.split())
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert MESSAGE in outcome.err
    assert outcome.out == ""
