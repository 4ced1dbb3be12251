"""Wrappers for parallelism and compilation are looked through; models without layers are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import groupify
from groupify.errors import CheckpointError, SpecError
from groupify.models.sources import load_model
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.models.weights import load_state
from groupify.models.wrappers import unwrapped
from groupify.structures import Plan
from tests.cases.nets import (
    SHAPE,
    Straight,
    assert_exact,
    converted,
    converted_names,
    grouped_already,
    noise,
    planned,
    refusal,
)


class Outer(nn.Module):
    """A part in a wrapper, perhaps, and a head."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda body: body) -> None:
        super().__init__()
        self.body = wrap(Straight())
        self.again = [self.body]
        self.head = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.again[0](x)))
        return result


def compiled(net: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(net, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def compiled_in_parallel(net: nn.Module) -> nn.Module:
    return nn.DataParallel(compiled(net))


WRAPPERS = [nn.DataParallel, compiled, compiled_in_place, compiled_in_parallel]
NAMES = ["body.c1", "body.rest.0"]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("whole", [True, False])
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module], whole: bool) -> None:
    plain = grouped_already(Outer())
    net = wrap(Outer()) if whole else Outer(wrap)
    load_state(net, _wrapped_state(net, plain), "plain")
    net.eval()
    plan = planned(net)
    assert converted_names(plan) == NAMES
    assert not any("convertible" in note for note in plan.notes)
    model = converted(net, plan=plan).model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any("torch._dynamo" in type(module).__module__ for module in model.modules())
    assert_exact(model, plain)


def _wrapped_state(net: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    return dict(zip(net.state_dict(), plain.state_dict().values(), strict=True))


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
def test_a_budget_and_a_plan_file_look_through_them_too(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = grouped_already(Straight())
    rules, options = groupify.Rules(min_group_width=1), groupify.SearchOptions(verify=False)
    images = noise(16)
    found = groupify.plan_for_budget(wrap(net), SHAPE, "macs=80%", images, rules=rules, options=options)
    assert found.plan.converted
    saved = groupify.PlanFile.of("net", found.plan)
    assert saved.apply(wrap(net), SHAPE).recipes == found.plan.recipes


def test_what_is_in_a_wrapper_and_beside_it_stays_one() -> None:
    net = Outer(nn.DataParallel)
    inner = net.body.get_submodule("module")
    net.beside = inner.get_submodule("c1")
    again: Any = unwrapped(net)
    assert again.beside is again.body.c1
    assert again.beside is not net.beside
    assert again.again[0] is again.body


def test_nothing_to_look_through_is_the_model_itself() -> None:
    net = Outer()
    assert unwrapped(net) is net
    assert unwrapped(nn.DataParallel(net)) is net


def test_a_model_of_several_processes_is_looked_through() -> None:
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        net = grouped_already(Straight())
        assert unwrapped(DistributedDataParallel(net)) is net
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_weights_are_refused() -> None:
    from torch.distributed import HashStore  # type: ignore[attr-defined]
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        net = Straight()
        mesh = init_device_mesh("cpu", (1,))
        net.c1.weight = nn.Parameter(distribute_tensor(net.c1.weight.detach(), mesh))
        assert "sharded over processes (DTensor)" in refusal(lambda: planned(net))
    finally:
        torch.distributed.destroy_process_group()


def test_hooks_on_a_wrapper_would_be_lost() -> None:
    net = nn.DataParallel(Straight())
    net.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert "register them on the module inside" in refusal(lambda: planned(net))


def scripted(net: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.jit.trace(net, noise(1))


def exported(net: nn.Module) -> Any:
    return torch.export.export(net, (noise(1),)).module()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (scripted, "is a TorchScript module"),
        (exported, "is the module of an exported program"),
        (lambda net: torch.export.export(net, (noise(1),)), "is a ExportedProgram, expected an nn.Module"),
        (lambda net: net.state_dict(), "build the model and load the state dict into it"),
        (lambda net: net.forward, "expected an nn.Module: give the network itself"),
    ],
)
def test_what_has_no_layers_is_refused(make: Callable[[nn.Module], Any], words: str) -> None:
    net = grouped_already(Straight())
    plan, thing = planned(net), make(net)
    assert words in refusal(lambda: planned(thing))
    assert words in refusal(lambda: groupify.convert(thing, plan))
    assert words in refusal(lambda: groupify.plan_for_budget(thing, SHAPE, "macs=50%"))
    assert words in refusal(lambda: groupify.export(thing, "net.onnx", input_shape=SHAPE))


def test_a_scripted_part_is_named() -> None:
    inner = grouped_already(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()))
    net = nn.Sequential(scripted(inner), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
    notes = planned(net).notes
    assert any(
        note.startswith("0 is a TorchScript module (torch.jit): convs in it are left") for note in notes
    )
    alone = nn.Sequential(scripted(inner))
    assert "0 is a TorchScript module" in refusal(lambda: planned(alone))


def test_an_exported_part_is_refused() -> None:
    net = nn.Sequential(exported(Straight().eval()), nn.Linear(5, 5))
    assert refusal(lambda: planned(net)).startswith("0 is the module of an exported program (torch.export)")


def test_a_factory_may_return_a_wrapped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrapped_nets.py").write_text(
        "import torch\nfrom torch import nn\nfrom tests.cases.nets import Straight\n"
        "def parallel(): return nn.DataParallel(Straight())\n"
        "def part(): return nn.Sequential(nn.DataParallel(Straight()))\n"
        "def program(): return torch.export.export(Straight(), (torch.zeros(1, 3, 16, 16),)).module()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = load_model("wrapped_nets:parallel", input_shape=SHAPE)
    assert type(source.model) is Straight
    assert "0.c1.weight" in load_model("wrapped_nets:part", input_shape=SHAPE).model.state_dict()
    with pytest.raises(SpecError, match="'wrapped_nets:program': the model is the module of an exported"):
        load_model("wrapped_nets:program", input_shape=SHAPE)


def test_weights_that_were_saved_with_a_part_in_a_wrapper_fit() -> None:
    net, plain = Outer(nn.DataParallel), grouped_already(Outer())
    load_state(plain, net.state_dict(), "the file")
    assert torch.equal(plain.get_parameter("body.c1.weight"), net.get_parameter("body.module.c1.weight"))
    with pytest.raises(CheckpointError):
        load_state(plain, {f"other.{key}": value for key, value in net.state_dict().items()}, "the file")


def test_a_wrapped_model_is_saved_and_loaded_as_what_is_in_it(tmp_path: Path) -> None:
    net = grouped_already(Straight())
    plan: Plan = planned(net)
    model = converted(net, plan=plan).model.eval()
    recipe = groupify.Recipe(
        ModelSpec("tests.cases.nets:Straight", {}, SHAPE, None), WeightsOrigin("factory"), plan.recipes
    )
    groupify.save(tmp_path / "out", nn.DataParallel(model), recipe)
    for dense in (net, nn.DataParallel(net)):
        again = groupify.load(tmp_path / "out", model=dense)
        with torch.no_grad():
            assert torch.equal(again(noise(2)), model(noise(2)))
