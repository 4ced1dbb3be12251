"""Models that people really have: shared modules, hidden convs, parametrised weights, untraceable ones."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

import groupify
from groupify.conversion.conversion import Calibration, Conversion
from groupify.conversion.site_fit import FitOptions
from groupify.errors import ConversionError, DataError, PlanError
from groupify.graph.forward import equal_outputs
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.stats.samples import SampleBudget
from groupify.structures import Plan
from tests.conversion.nets import SHAPE, Residual, images, make_block_diagonal, randomise, relative_error

ANY_WIDTH = groupify.Rules(min_group_width=1)
EXACT = FitOptions(ridge=1e-9, refit_ridge=1e-9)


def converted(
    net: nn.Module, *, groups: int = 4, fit: FitOptions = EXACT, shape: tuple[int, ...] = SHAPE
) -> tuple[Plan, Conversion]:
    found = groupify.plan(net, shape, groups=groups, rules=ANY_WIDTH)
    return found, groupify.convert(net, found, Calibration(images(64, shape), fit=fit))


class SharedBlock(nn.Module):
    """One block, registered under two names and run at both places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.second = self.first
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.second(self.first(torch.relu(self.stem(x)))).mean((2, 3)))
        return result


class Listed(nn.Module):
    """Convs in a list and in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.heads = nn.ModuleDict({"a": nn.Conv2d(16, 16, 1), "b": nn.Conv2d(16, 8, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.stem(x))
        for stage in self.stages:
            x = torch.relu(stage(x))
        return {name: head(x) for name, head in self.heads.items()}


class Choosing(nn.Module):
    """A root that cannot be traced around a backbone that can."""

    def __init__(self, backbone: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Identity() if head is None else head

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        features: Tensor = self.backbone(x)
        if float(features.sum()) > 1e9:
            features = features * 0
        result: Tensor = self.head(features)
        return result


def test_a_shared_block_keeps_being_shared() -> None:
    net = randomise(SharedBlock()).eval()
    make_block_diagonal(net.first[0], 4)  # type: ignore[arg-type]
    found, result = converted(net)
    assert [site.name for site in found.converted] == ["first.0"]
    again = result.model
    assert again.get_submodule("first") is again.get_submodule("second")
    assert again.get_submodule("first.0").groups == 4
    assert relative_error(again, net, images(seed=1)) < 1e-3


def test_convs_in_lists_and_dictionaries() -> None:
    net = randomise(Listed()).eval()
    found, result = converted(net)
    assert [s.name for s in found.converted] == ["stages.0", "stages.1", "heads.a", "heads.b"]
    x = images(seed=1)
    with torch.no_grad():
        ours, theirs = result.model(x), net(x)
    for name in theirs:
        assert float((ours[name] - theirs[name]).var() / theirs[name].var()) < 0.6
    assert all(fit.error < 0.9 for fit in result.fits)


class Functional(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Parameter(torch.randn(16, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.conv2d(self.stem(x), self.mixer))
        result: Tensor = self.fc(torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))
        return result


def test_functional_convs_are_reported() -> None:
    found, result = converted(randomise(Functional()).eval())
    note, slower = found.notes
    assert "expected to be slower" in slower
    assert note.startswith("the model itself calls F.conv2d with a weight of shape (16, 16, 1, 1) (1×)")
    assert "not convertible" in note
    assert [fit.name for fit in result.fits] == ["conv1"]


def test_convs_in_a_plain_list_are_reported() -> None:
    class Hidden(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Conv2d(16, 16, 1)]  # PyTorch itself does not see it either

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.hidden[0](self.stem(x)))
            result: Tensor = self.fc(torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))
            return result

    found, result = converted(randomise(Hidden()).eval())
    note = found.notes[0]
    assert "calls F.conv2d with a weight of shape (16, 16, 1, 1) (1×)" in note
    assert note.endswith("make it an nn.Conv2d, registered as a submodule")
    assert [fit.name for fit in result.fits] == ["conv1"]


def test_nothing_but_functional_convs() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight)

    with pytest.raises(PlanError, match=r"no conv layer.*; the model itself calls F.conv2d"):
        groupify.plan(Bare(), SHAPE, groups=4, rules=ANY_WIDTH)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (parametrizations.weight_norm, "remove_parametrizations"),
        (parametrizations.spectral_norm, "remove_parametrizations"),
        (torch.nn.utils.weight_norm, "remove_weight_norm"),
        (torch.nn.utils.spectral_norm, "remove_spectral_norm"),
    ],
)
def test_parametrized_convs_are_refused_with_the_remedy(
    wrap: Callable[[nn.Module], nn.Module], remedy: str
) -> None:
    net = randomise(Residual()).eval()
    wrap(net.conv2)
    found, result = converted(net)
    (site,) = [site for site in found.sites if site.name == "conv2"]
    assert not site.converted
    assert remedy in (site.reason or "")
    assert relative_error(result.model, net, images(seed=1)) < 0.5
    for conv in (net.conv1, net.conv3, net.skip):
        wrap(conv)
    with pytest.raises(PlanError, match=remedy):
        groupify.plan(net, SHAPE, groups=4, rules=ANY_WIDTH)


def test_lazy_layers_are_refused_until_they_have_run() -> None:
    net = nn.Sequential(nn.LazyConv2d(16, 3), nn.ReLU(), nn.LazyConv2d(16, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ConversionError, match=r"layer '0' is a LazyConv2d .* run the model once on an input"):
        groupify.plan(net, SHAPE, groups=4, rules=ANY_WIDTH)
    assert isinstance(net[0], nn.LazyConv2d)
    net.eval()(images(1))
    found, result = converted(net)
    assert [site.name for site in found.converted] == ["2"]
    assert result.fits[0].error < 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_and_channels_last(
    dtype: torch.dtype, layout: torch.memory_format, tmp_path: Path
) -> None:
    net = randomise(Residual()).eval().to(dtype=dtype)
    net.to(memory_format=layout)
    found, result = converted(net)
    conv = result.model.get_submodule("conv1")
    assert conv.weight.dtype == dtype
    spec = ModelSpec("tests.conversion.nets:Residual", {}, SHAPE, None)
    recipe = groupify.Recipe(spec, WeightsOrigin("random", 0), found.recipes)
    groupify.save(tmp_path / "out", result.model, recipe)
    again: Any = groupify.load(tmp_path / "out", model=net)
    assert again.get_submodule("conv1").weight.dtype == dtype
    if layout == torch.channels_last:
        assert again.get_submodule("stem").weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(again(images(2).to(dtype)), result.model.eval()(images(2).to(dtype)))


def test_a_model_on_the_meta_device_can_be_planned_but_not_converted() -> None:
    with torch.device("meta"):
        net = Residual().eval()
    found = groupify.plan(net, SHAPE, groups=4, rules=ANY_WIDTH)
    assert found.converted
    with pytest.raises(ConversionError, match=r"'stem.weight' is on the meta device and has no values"):
        groupify.convert(net, found, images())


def test_hooks_stay_where_they_are_and_see_one_image_of_the_conversion() -> None:
    net = randomise(Residual()).eval()
    seen: list[str] = []
    net.conv1.register_forward_hook(lambda *_: seen.append("forward"))
    net.register_forward_pre_hook(lambda *_: seen.append("before"))
    net.fc.register_full_backward_hook(lambda *_: seen.append("backward"))
    found = groupify.plan(net, SHAPE, groups=4, rules=ANY_WIDTH)
    seen.clear()
    result = groupify.convert(net, found, images())
    assert seen == ["before", "forward"]  # to see that the outputs do not depend on them
    seen.clear()
    net(images(1))
    assert seen == ["before", "forward"]
    seen.clear()
    result.model(images(1)).sum().backward()
    assert "before" in seen
    assert "backward" in seen


def test_hooks_that_the_outputs_depend_on_are_part_of_the_model() -> None:
    net = randomise(Residual()).eval()
    for conv in (net.conv1, net.conv2):
        make_block_diagonal(conv, 4)
    net.stem.register_forward_hook(lambda module, inputs, output: 3 * output.abs())
    found = groupify.plan(
        net, SHAPE, groups=4, rules=groupify.Rules(include=["conv1", "conv2"], min_group_width=1)
    )
    result = groupify.convert(net, found, Calibration(images(64), fit=EXACT))
    assert relative_error(result.model, net, images(seed=1)) < 1e-3


class Collecting(Residual):
    """Reads what its own hooks have collected, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.collected: list[Tensor] = []
        self.stem.register_forward_hook(self.collect)

    def collect(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.collected.append(output)

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        return result + self.collected.pop().mean()


def test_a_model_that_reads_what_its_hooks_collect() -> None:
    net = randomise(Collecting()).eval()
    found = groupify.plan(net, SHAPE, groups=4, rules=groupify.Rules(include=["conv1"], min_group_width=1))
    make_block_diagonal(net.conv1, 4)
    options = FitOptions(ridge=1e-9, refresh_batch_norm=False)
    result = groupify.convert(net, found, Calibration(images(64), fit=options))
    assert relative_error(result.model, net, images(seed=1)) < 1e-3


def test_outputs_of_a_class_of_one_s_own_are_compared() -> None:
    @dataclasses.dataclass
    class Output:
        scores: Tensor
        more: dict[str, Tensor]

    class Table(UserDict[str, Tensor]):
        pass

    one = Output(torch.ones(2), {"a": torch.ones(3)})
    assert equal_outputs(one, Output(torch.ones(2), {"a": torch.ones(3)}))
    assert not equal_outputs(one, Output(torch.ones(2), {"a": torch.zeros(3)}))
    assert not equal_outputs(one, Output(torch.zeros(2), {"a": torch.ones(3)}))
    assert not equal_outputs(Table(a=torch.ones(2)), Table(a=torch.zeros(2)))


def test_a_subclass_of_conv_is_left_alone() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, padding=1)

    net = Residual()
    net.conv1 = Standardised(16, 16, 3, padding=1, bias=False)
    found, result = converted(randomise(net).eval())
    reasons = {site.name: site.reason for site in found.sites}
    assert reasons["conv1"] == "a subclass of Conv2d (Standardised), whose forward may differ"
    assert type(result.model.get_submodule("conv1")) is Standardised


def test_a_subclass_that_only_builds_differently_is_a_plain_conv() -> None:
    class ThreeByThree(nn.Conv2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3, padding=1, bias=False)

    net = Residual()
    net.conv1 = ThreeByThree(16)
    randomise(net).eval()
    make_block_diagonal(net.conv1, 4)
    found = groupify.plan(net, SHAPE, groups=4, rules=groupify.Rules(include=["conv1"], min_group_width=1))
    result = groupify.convert(net, found, Calibration(images(64), fit=EXACT))
    again = result.model.get_submodule("conv1")
    assert isinstance(again, ThreeByThree)  # code may ask for it
    assert again.groups == 4
    assert relative_error(result.model, net, images(seed=1)) < 1e-3


def test_complex_inputs_and_weights_are_refused() -> None:
    net = randomise(Residual()).eval()
    found = groupify.plan(net, SHAPE, groups=4, rules=ANY_WIDTH)
    with pytest.raises(DataError, match=r"of type torch.complex64, expected floating point"):
        groupify.convert(net, found, images().to(torch.complex64))
    with pytest.raises(DataError, match=r"of type torch.uint8"):
        groupify.convert(net, found, images().to(torch.uint8))
    net.fc.weight = nn.Parameter(net.fc.weight.to(torch.complex64))
    with pytest.raises(ConversionError, match=r"'fc.weight' is complex"):
        groupify.convert(net, found, images())


# models that cannot be traced ------------------------------------------------------------------


def test_the_traceable_part_of_an_untraceable_model_gets_everything() -> None:
    backbone = randomise(Residual()).eval()
    found, result = converted(Choosing(backbone).eval(), fit=FitOptions())
    plan, whole = converted(backbone, fit=FitOptions())
    assert "only inside backbone" in found.notes[0]
    assert "cannot be exported as a whole" in found.notes[0]
    assert result.notes[0].startswith("the model cannot be exported as a whole")
    assert [site.name for site in found.converted] == [f"backbone.{site.name}" for site in plan.converted]
    ours, theirs = result.model.get_submodule("backbone").state_dict(), whole.model.state_dict()
    for name in theirs:  # the same in every bit as if the backbone had come alone: clustered, in order
        assert torch.equal(ours[name], theirs[name]), name
    assert result.fits[0].name == "backbone.conv1"


def test_convs_outside_the_parts_are_fitted_by_module() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    net = randomise(Choosing(backbone, nn.Conv2d(16, 16, 1))).eval()
    make_block_diagonal(net.backbone[2], 4)  # type: ignore[index]
    make_block_diagonal(net.head, 4)  # type: ignore[arg-type]
    found, result = converted(net)
    assert "only inside backbone; 1 convs outside are fitted one by one" in found.notes[0]
    assert {fit.name for fit in result.fits} == {"backbone.2", "head"}
    assert relative_error(result.model, net, images(seed=1)) < 1e-3
    truncated = groupify.convert(net, found)
    assert "only inside backbone" in truncated.notes[1]
    assert relative_error(truncated.model, net, images(seed=1)) < 1e-3


class Leaky(Choosing):
    """Uses the inside of its backbone behind the backbone's back."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        stem: Tensor = self.backbone.stem(x)  # type: ignore[operator]
        return super().forward(x) + stem.mean((1, 2, 3)).unsqueeze(1)


class Tied(Choosing):
    """Has a weight of its backbone for another purpose."""

    def __init__(self) -> None:
        super().__init__(Residual())
        self.reading = nn.Linear(16, 16, bias=False)
        self.reading.weight = nn.Parameter(torch.randn(16, 16))
        skip: Any = self.get_submodule("backbone").get_submodule("skip")
        skip.weight = nn.Parameter(self.reading.weight.data.view(16, 16, 1, 1))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        read: Tensor = self.reading(torch.ones(len(x), 16))
        return super().forward(x) + read.sum(1, keepdim=True)


@pytest.mark.parametrize("make", [lambda: Leaky(Residual()), Tied])
def test_what_is_used_from_outside_is_no_part(make: Callable[[], nn.Module]) -> None:
    net = randomise(make()).eval()
    for name in ("conv1", "conv2"):
        make_block_diagonal(net.get_submodule(f"backbone.{name}"), 4)  # type: ignore[arg-type]
    found = groupify.plan(
        net, SHAPE, groups=4, rules=groupify.Rules(include=["*.conv1", "*.conv2"], min_group_width=1)
    )
    assert "channels are not clustered" in found.notes[0]
    options = FitOptions(ridge=1e-9, refresh_batch_norm=False)
    result = groupify.convert(net, found, Calibration(images(64), fit=options))
    assert relative_error(result.model, net, images(seed=1)) < 1e-3


def test_a_detector_s_backbone_gets_everything() -> None:
    net = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    ).eval()
    found = groupify.plan(net, (3, 64, 64), groups=4, rules=groupify.Rules(min_group_width=4))
    assert "only inside backbone, " in found.notes[0]
    budget = SampleBudget(per_input=1, minimum=64, patches_per_input=1, patches_minimum=32)
    calibration = Calibration(images(2, (3, 64, 64)), restarts=0, budget=budget)
    with pytest.warns(groupify.GroupifyWarning, match="fewer samples than inputs"):
        result = groupify.convert(net, found, calibration)
    inside = [fit for fit in result.fits if fit.name.startswith("backbone.")]
    assert len(inside) > 10
    assert all("groups" not in note for note in result.notes)
    with torch.no_grad():
        (output,) = result.model(images(1, (3, 64, 64), seed=1))
    assert set(output) == {"boxes", "labels", "scores"}


def test_frozen_batch_norms_take_the_bias_of_the_fit() -> None:
    def net(norm: Callable[[int], nn.Module]) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), norm(16), nn.ReLU()
        )

    usual = randomise(net(nn.BatchNorm2d)).eval()
    frozen = net(FrozenBatchNorm2d).eval()
    frozen.load_state_dict({k: v for k, v in usual.state_dict().items() if "tracked" not in k})
    one, two = converted(usual)[1], converted(frozen)[1]
    x = images(seed=1)
    with torch.no_grad():
        torch.testing.assert_close(one.model(x), two.model(x), rtol=1e-4, atol=1e-4)


def test_a_way_that_no_image_takes_is_said() -> None:
    class Rare(Choosing):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            x = self.backbone(x)
            return self.head(x) if float(x.abs().max()) == 0 or len(x) == 1 else x

    backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    net = randomise(Rare(backbone, nn.Conv2d(16, 16, 1))).eval()
    result = converted(net)[1]
    assert "no calibration image reaches head: converted from the weights alone" in result.notes
