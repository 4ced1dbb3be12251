"""Conversions to structures of several convs, all the way."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.artefact import read_recipe
from groupify.conversion import held_out, in_order
from groupify.conversion.conversion import Calibration, Conversion, convert
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.conversion.site_fit import FitOptions
from groupify.conversion.surgery import conv_shape, restructure
from groupify.graph.plain_layers import Conv, conv_of
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from groupify.onnx.python_file import python_file
from groupify.planning.plan_file import PlanFile
from groupify.planning.sites import describe
from groupify.structures import Plan, SiteRecipe, Structure
from tests.conversion.nets import (
    SHAPE,
    CalledTwice,
    Chain,
    Residual,
    Untraceable,
    images,
    randomise,
    relative_error,
)
from tests.decomposition.problems import random_factors

PLAIN = FitOptions(
    ridge=1e-9, relu_iterations=0, refit_dense=False,
    refresh_batch_norm=False,
)  # fmt: skip
STRUCTURES = [
    Structure(6),
    Structure(8, 4),
    Structure(None, 1, 6),
    Structure(None, 4, 16),
    Structure(6, 1, 8),
    Structure(8, 4, 12),
    Structure(8, 8, 8),
]


def plan_file(net: nn.Module, sites: Mapping[str, Structure], shape: tuple[int, ...] = SHAPE) -> Plan:
    """The plan, through a file."""
    recipes = tuple(SiteRecipe(name, structure) for name, structure in sites.items())
    return PlanFile.loads(PlanFile("net", "any", recipes).dumps()).apply(net, shape)


def converted(
    net: nn.Module,
    sites: Mapping[str, Structure],
    x: Tensor | None = None,
    *,
    fit: FitOptions = PLAIN,
    **how: Any,
) -> Conversion:
    given = images(64) if x is None else x
    plan = plan_file(net, sites, tuple(given.shape[1:]))
    return convert(net, plan, Calibration(given, fit=fit, **how))


def plant(conv: Conv, structure: Structure, seed: int = 0) -> None:
    """Give a conv a weight that the structure computes."""
    scale = float(conv.weight.detach().std())
    weight = random_factors(conv_shape(conv), structure, seed).weight()
    conv.weight.data = (weight * (scale / weight.std())).to(conv.weight)


@torch.no_grad()
def outputs_of(net: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a layer gives while the net runs."""
    found: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda *called: found.append(called[2]))
    net(x)
    handle.remove()
    return found[0]


def measured(result: nn.Module, net: nn.Module, name: str, x: Tensor) -> float:
    """Mean squared error of a layer ÷ the variance of what it should give, over all channels."""
    ours, wanted = outputs_of(result, name, x), outputs_of(net, name, x)
    spread = wanted - wanted.mean((0, *range(2, wanted.dim())), keepdim=True)
    return float((ours - wanted).square().sum() / spread.square().sum())


# ---- the error


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_the_error_that_is_reported_is_that_on_the_calibration_images(
    norm: bool, structure: Structure
) -> None:
    """Where a batch norm follows, behind it: an output that it shrinks counts less."""
    net, x = randomise(Chain(norm=norm, bias=not norm)).eval(), images(96)
    result = converted(net, {"conv1": structure, "conv2": structure}, x, clustering="none")
    assert [fit.name for fit in result.fits] == ["conv1", "conv2"]
    for fit, layer in zip(result.fits, ("bn1", "bn2") if norm else ("conv1", "conv2"), strict=True):
        found = measured(result.model, net, layer, x)
        assert fit.error == pytest.approx(found, rel=0.01, abs=1e-4)
        assert 0.01 < found < 0.9
        assert fit.samples == 96 * 64
        assert fit.inputs == 16 * 9  # all factors are fitted together, so to all inputs


def test_the_error_of_a_conv_with_groups_of_its_own_is_over_all_its_groups() -> None:
    net, x = randomise(Chain(norm=False, bias=True)).eval(), images(96)
    net.conv1 = randomise(nn.Conv2d(16, 16, 3, padding=1, groups=2))
    result = converted(net, {"conv1": Structure(8, 4, 8)}, x)
    (fit,) = result.fits
    assert fit.error == pytest.approx(measured(result.model, net, "conv1", x), rel=0.01, abs=1e-4)
    assert 0.01 < fit.error < 0.9
    assert fit.inputs == 8 * 9


def test_a_fit_on_the_dense_inputs_reports_its_error_there() -> None:
    net, x = randomise(Chain(norm=False, bias=True)).eval(), images(32)
    sites = {"conv1": Structure(8, 4, 8), "conv2": Structure(8, 4, 8)}
    result = converted(net, sites, x, fit=dataclasses.replace(PLAIN, in_order=False))
    with torch.no_grad():
        inputs, wanted = outputs_of(net, "conv1", x).relu(), outputs_of(net, "conv2", x)
        ours = result.model.get_submodule("conv2")(inputs)
    spread = wanted - wanted.mean((0, 2, 3), keepdim=True)
    assert result.fits[1].error == pytest.approx(
        float((ours - wanted).square().sum() / spread.square().sum()), rel=0.05
    )


@pytest.mark.parametrize("structure", [Structure(8, 4, 12), Structure(None, 1, 6)], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_means_are_kept(norm: bool, structure: Structure) -> None:
    net, x = randomise(Chain(norm=norm, bias=not norm)).eval(), images(64)
    result = converted(net, {"conv1": structure}, x)
    layer = "bn1" if norm else "conv1"
    means = [outputs_of(model, layer, x).mean((0, 2, 3)) for model in (result.model, net)]
    torch.testing.assert_close(*means, rtol=1e-3, atol=1e-3)


def test_more_latents_leave_less_error_and_factors_fitted_together_beat_truncation() -> None:
    net, x = randomise(Chain()).eval(), images(64)
    fitted = [
        relative_error(converted(net, {"conv1": Structure(rank, 1, rank)}, x).model, net, x)
        for rank in (4, 8, 12)
    ]
    assert fitted == sorted(fitted, reverse=True)
    recipe = [SiteRecipe("conv1", Structure(12, 1, 12))]
    assert fitted[2] < 0.5 * relative_error(restructure(net, recipe), net, x)


def test_fitting_in_order_makes_good_for_the_error_in_front() -> None:
    net, fresh = randomise(Chain(norm=False, bias=True)).eval(), images(64, seed=1)
    sites = {"conv1": Structure(8, 4, 8), "conv2": Structure(8, 4, 8)}
    errors = [
        relative_error(
            converted(net, sites, fit=dataclasses.replace(PLAIN, in_order=order)).model, net, fresh
        )
        for order in (True, False)
    ]
    assert errors[0] < 0.95 * errors[1]


def test_a_branch_makes_good_for_the_error_of_the_other_branch() -> None:
    net, x = randomise(Residual()).eval(), images(64)
    sites = {"conv3": Structure(8, 4, 8), "skip": Structure(6)}

    def error_of_the_sum(compensate: bool) -> float:
        student = converted(
            net, sites, x, fit=dataclasses.replace(PLAIN, compensate_residual=compensate)
        ).model
        ours, wanted = (
            outputs_of(model, "conv3", x) + outputs_of(model, "skip", x) for model in (student, net)
        )
        return float((ours - wanted).square().mean() / wanted.var())

    assert error_of_the_sum(True) < 0.98 * error_of_the_sum(False)


@pytest.mark.parametrize("structure", [Structure(8, 4, 8), Structure(6), Structure(None, 4, 8)], ids=str)
def test_relaxing_in_front_of_a_relu_lowers_the_error_behind_it(structure: Structure) -> None:
    net, fresh = randomise(Chain()).eval(), images(64, seed=1)

    def error_behind_the_relu(iterations: int) -> float:
        options = dataclasses.replace(PLAIN, relu_iterations=iterations)
        student = converted(net, {"conv1": structure}, images(256), fit=options, clustering="none").model
        ours, wanted = (outputs_of(model, "bn1", fresh).relu() for model in (student, net))
        return float((ours - wanted).square().mean() / wanted.var())

    assert error_behind_the_relu(3) < 0.98 * error_behind_the_relu(0)


# ---- what a structure can compute, it computes


class Branched(nn.Module):
    """Convs of all sizes behind batch norms, in residual sums and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 24, 3, padding=1, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.down = nn.Conv2d(16, 24, 1, stride=2)
        self.wide = nn.Conv2d(24, 10, (1, 3), padding=(0, 1))
        self.tall = nn.Conv2d(24, 12, (4, 1), padding=(2, 0), dilation=(2, 1), bias=False)
        self.own = nn.Conv2d(22, 20, 3, padding=1, groups=2)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.bn1(self.conv1(x)) + self.down(x))
        tall = self.tall(x)
        x = torch.cat([self.wide(x)[:, :, : tall.shape[2]], torch.tanh(tall)], 1)
        result: Tensor = self.head(torch.relu(self.own(x)).mean((2, 3)))
        return result


PLANTED: dict[str, Structure] = {
    "conv1": Structure(8, 1, 12),
    "down": Structure(5),
    "wide": Structure(None, 4, 8),
    "tall": Structure(6, 3),
    "own": Structure(6, 2, 8),
}
SEVERAL: dict[str, tuple[Callable[[], nn.Module], dict[str, Structure]]] = {
    "behind batch norms": (Chain, {"conv1": Structure(6, 1, 8), "conv2": Structure(None, 4, 12)}),
    "without batch norms": (
        lambda: Chain(norm=False, bias=True), {"conv1": Structure(6), "conv2": Structure(None, 1, 5)},
    ),
    "without batch norms and biases": (
        lambda: Chain(norm=False), {"conv1": Structure(6), "conv2": Structure(5)},
    ),
    "residual sums": (
        Residual,
        {"conv1": Structure(6, 1, 8), "conv2": Structure(None, 1, 6), "conv3": Structure(6),
         "skip": Structure(5)},
    ),
    "called twice": (CalledTwice, {"conv": Structure(3, 1, 4)}),
    "by module": (Untraceable, {"conv": Structure(3, 1, 4)}),
    "all of it": (Branched, PLANTED),
}  # fmt: skip


def with_planted(name: str, *, ordered: bool = True) -> tuple[nn.Module, dict[str, Structure]]:
    """``ordered``: whether it may matter which inputs stand together; without images that is a guess."""
    make, sites = SEVERAL[name]
    net = randomise(make()).eval()
    if not ordered:
        sites = {
            site: Structure(None, 1, 6)
            if structure.minds_order(conv_shape(conv_of(net, site)))
            else structure
            for site, structure in sites.items()
        }
    for seed, (site, structure) in enumerate(sites.items()):
        plant(conv_of(net, site), structure, seed)
    return net, sites


@pytest.mark.parametrize("name", SEVERAL)
def test_what_the_structures_compute_exactly_comes_out_exactly(name: str) -> None:
    net, sites = with_planted(name)
    result = converted(net, sites)
    assert {fit.name: fit.error for fit in result.fits} == pytest.approx(dict.fromkeys(sites, 0), abs=1e-4)
    assert relative_error(result.model, net, images(32, seed=1)) < 1e-3
    parts = {key.rpartition(".")[0] for key in result.model.state_dict() if key.count(".") == 2}
    assert parts == {
        f"{site}.{part}"
        for site, structure in sites.items()
        for part in ("reduce", "core", "expand")
        if part == "core" or getattr(structure, part) is not None
    }


@pytest.mark.parametrize("name", ["behind batch norms", "residual sums", "all of it"])
def test_the_default_options_keep_what_is_exact(name: str) -> None:
    net, sites = with_planted(name)
    result = converted(net, sites, images(256), fit=FitOptions())
    assert relative_error(result.model, net, images(32, seed=1)) < 2e-3


@pytest.mark.parametrize("name", ["behind batch norms", "residual sums", "by module"])
def test_on_the_dense_inputs_too(name: str) -> None:
    net, sites = with_planted(name)
    result = converted(net, sites, fit=dataclasses.replace(PLAIN, in_order=False))
    assert relative_error(result.model, net, images(32, seed=1)) < 1e-3


class Choosing(nn.Module):
    """Cannot be traced whole, around a part that can, and a conv beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Chain()
        self.body.fc = nn.Identity()  # type: ignore[assignment]
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        if float(features.sum()) > 1e9:
            features = features * 0
        result: Tensor = self.last(features[:, :, None, None]).flatten(1)
        return result


def test_a_model_in_parts_gets_everything() -> None:
    net = randomise(Choosing()).eval()
    sites = {"body.conv1": Structure(6, 1, 8), "body.conv2": Structure(None, 4, 12), "last": Structure(4)}
    for name, structure in sites.items():
        plant(conv_of(net, name), structure)
    result = converted(net, sites, images(256))
    assert {fit.name for fit in result.fits} == set(sites)
    assert result.notes[0].startswith("the model cannot be exported as a whole")
    assert relative_error(result.model, net, images(32, seed=1)) < 1e-3


@pytest.mark.parametrize("dims", [1, 3])
def test_in_one_and_three_dimensions(dims: int) -> None:
    kind: Any = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    net = nn.Sequential(
        kind(3, 8, 3, padding=1), nn.ReLU(), kind(8, 12, 2, stride=2), nn.ReLU(), kind(12, 6, 1), nn.Flatten()
    )
    net = randomise(net).eval()
    sites = {"2": Structure(4, 1, 6), "4": Structure(3)}
    for name, structure in sites.items():
        plant(conv_of(net, name), structure)
    shape = (3, *[6] * dims)
    result = converted(net, sites, images(128, shape))
    assert relative_error(result.model, net, images(16, shape, seed=1)) < 1e-3


def test_where_groups_do_not_divide_the_outputs_the_inputs_are_clustered_all_the_same() -> None:
    """Each group of inputs feeds all outputs, so that there are no groups of outputs to speak of."""
    net = randomise(Chain(norm=False, bias=True)).eval()
    net.conv2 = randomise(nn.Conv2d(16, 10, 3, padding=1))
    net.fc = randomise(nn.Linear(10, 5))
    plant(net.conv2, Structure(None, 4, 8))
    assert relative_error(converted(net, {"conv2": Structure(None, 4, 8)}).model, net, images(seed=1)) < 1e-3
    scrambled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for conv in (net.conv1,):
        conv.weight.data = conv.weight.data[scrambled]
        conv.bias.data = conv.bias.data[scrambled]  # type: ignore[union-attr]
    net.conv2.weight.data = net.conv2.weight.data[:, scrambled]
    for calibration in (images(64), None):
        result = convert(net, plan_file(net, {"conv2": Structure(None, 4, 8)}), calibration)
        assert bool(result.model(images(2)).isfinite().all())


def test_batch_norms_that_switch_channels_off_or_mirror_them() -> None:
    net, sites = with_planted("behind batch norms")
    bn: Any = net.get_submodule("bn1")
    bn.weight.data[:3] = 0
    bn.weight.data[3:6] *= -1
    bn.running_var[7] = 1e-12
    result = converted(net, sites)
    assert relative_error(result.model, net, images(32, seed=1)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    net, sites = with_planted("behind batch norms")
    net = net.to(dtype)
    result = converted(net, sites, images(64).to(dtype))
    assert {value.dtype for value in result.model.parameters()} == {dtype}
    x = images(32, seed=1).to(dtype)
    assert relative_error(result.model, net, x) < (1e-3 if dtype == torch.float64 else 5e-3)
    without = convert(net, plan_file(net, sites))
    assert {value.dtype for value in without.model.parameters()} == {dtype}


def test_the_same_seed_gives_the_same_weights() -> None:
    net = randomise(Chain()).eval()
    sites = {"conv1": Structure(8, 4, 12), "conv2": Structure(8, 8, 8)}
    one, two = (converted(net, sites, images(48), fit=FitOptions()).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[key], value) for key, value in two.items())


def test_the_given_model_is_left_untouched() -> None:
    net = randomise(Chain()).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    result = converted(net, {"conv1": Structure(8, 4, 12)})
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(module.training for module in result.model.modules())


def test_grouped_convs_and_structures_of_several_in_one_model() -> None:
    net = randomise(Residual()).eval()
    sites = {"conv1": Structure(groups=4), "conv2": Structure(8, 4, 8), "conv3": Structure(None, 4, 16)}
    result = converted(net, sites, images(128), fit=FitOptions())
    assert [site.structure for site in result.sites] == list(sites.values())
    fresh = images(32, seed=1)
    assert relative_error(result.model, net, fresh) < 0.5 * relative_error(
        convert(net, plan_file(net, sites)).model, net, fresh
    )


# ---- without images


@pytest.mark.parametrize("name", ["behind batch norms", "without batch norms", "residual sums", "all of it"])
def test_what_is_exact_needs_no_images(name: str) -> None:
    net, sites = with_planted(name, ordered=False)
    result = convert(net, plan_file(net, sites))
    assert result.fits == ()
    assert "accuracy is not protected" in result.notes[0]
    assert relative_error(result.model, net, images(32, seed=1)) < 1e-3


@pytest.mark.parametrize("name", ["by module", "parts"])
def test_nor_does_a_model_that_cannot_be_traced(name: str) -> None:
    if name == "parts":
        net: nn.Module = randomise(Choosing()).eval()
        sites = {"body.conv1": Structure(6, 1, 8), "last": Structure(4)}
        for site, structure in sites.items():
            plant(conv_of(net, site), structure)
    else:
        net, sites = with_planted(name)
    result = convert(net, plan_file(net, sites))
    assert relative_error(result.model, net, images(32, seed=1)) < 1e-3


def test_from_the_weights_alone_it_is_better_than_truncation() -> None:
    net, x = randomise(Chain()).eval(), images(64)
    sites = {"conv1": Structure(8, 4, 12), "conv2": Structure(6, 1, 8)}
    plan = plan_file(net, sites)
    truncated = relative_error(restructure(net, plan.recipes), net, x)
    assert relative_error(convert(net, plan).model, net, x) < 0.7 * truncated


# ---- few images


class ByValue(nn.Module):
    """Cannot be traced whole, so that it is converted by its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = wide()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y if bool(y.abs().sum() > 0) else -y


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1))


@pytest.mark.filterwarnings("ignore::groupify.errors.GroupifyWarning")  # fewer samples than inputs
@pytest.mark.parametrize("make", [wide, ByValue])
def test_few_images_are_not_learned_by_heart(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four positions an image, of 1152 inputs each."""
    net, shape = randomise(make()).eval(), (3, 2, 2)
    sites = {"2" if isinstance(net, nn.Sequential) else "body.2": Structure(32, 2, 64)}
    x, fresh = images(32, shape), images(128, shape, seed=9)
    result = converted(net, sites, x, fit=FitOptions())
    (check,) = (fit.held_out for fit in result.fits)
    assert check is not None
    assert check.overfitted
    assert check.held_out > 2 * check.in_sample
    assert check.ridge > 0
    assert check.gain < 1
    assert any("too few calibration images" in note for note in result.notes)
    monkeypatch.setattr(held_out, "_LADDER", ())
    without = converted(net, sites, x, fit=FitOptions())
    errors = [relative_error(found.model, net, fresh) for found in (result, without)]
    assert errors[0] < 0.97 * errors[1]


def test_with_enough_images_the_ridge_stays() -> None:
    net = randomise(Chain()).eval()
    result = converted(net, {"conv1": Structure(8, 4, 12)}, images(128), fit=FitOptions())
    (check,) = (fit.held_out for fit in result.fits)
    assert check is not None
    assert not check.overfitted
    assert (check.ridge, check.gain) == (0, 1)
    assert check.in_sample < check.held_out < 1.5 * check.in_sample
    assert not any("too few" in note for note in result.notes)


def test_what_is_exact_is_no_overfitting() -> None:
    net, sites = with_planted("behind batch norms")
    for fit in converted(net, sites, images(64)).fits:
        assert fit.held_out is not None
        assert not fit.held_out.overfitted
        assert fit.held_out.held_out < 1e-3


@pytest.mark.filterwarnings("ignore::groupify.errors.GroupifyWarning")
@pytest.mark.parametrize("count", [1, 2, 15])
def test_with_too_few_images_to_hold_any_out_it_is_fitted_all_the_same(count: int) -> None:
    net = randomise(Chain()).eval()
    result = converted(
        net, {"conv1": Structure(8, 4, 12), "conv2": Structure(5)}, images(count), fit=FitOptions()
    )
    assert all(fit.held_out is None for fit in result.fits)
    assert bool(result.model(images(2)).isfinite().all())


@pytest.mark.filterwarnings("ignore::groupify.errors.GroupifyWarning")
def test_images_that_are_all_the_same_give_finite_weights() -> None:
    net = randomise(Chain()).eval()
    for x in (torch.zeros(16, *SHAPE), torch.full((16, *SHAPE), 0.5)):
        result = converted(net, {"conv1": Structure(8, 4, 12)}, x, fit=FitOptions())
        assert all(bool(value.isfinite().all()) for value in result.model.state_dict().values())
        assert relative_or_absolute(result.model, net, x) < 1e-2


def relative_or_absolute(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = reference(x)
        return float((model(x) - wanted).square().mean() / wanted.square().mean())


# ---- what is done with a converted model


@pytest.fixture(scope="module")
def branched() -> tuple[nn.Module, Conversion]:
    net = randomise(Branched()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return net, converted(net, PLANTED, images(64), fit=FitOptions())


SPEC = ModelSpec("tests.conversion.test_factor_fit:Branched", {}, SHAPE, None)


def test_it_is_saved_loaded_and_rebuilt_without_groupify(
    branched: tuple[nn.Module, Conversion], tmp_path: Path
) -> None:
    _, result = branched
    x = images(8, seed=1)
    recipe = groupify.Recipe(SPEC, WeightsOrigin("random", 0), result.sites)
    recipe = groupify.save(tmp_path / "folder", result.model, recipe)
    assert read_recipe(tmp_path / "folder").sites == result.sites
    again = groupify.load(tmp_path / "folder", trust=True)
    names: dict[str, Any] = {}
    exec(compile(python_file(recipe, stem="net", trust=True), "net.py", "exec"), names)
    assert names["SITES"]["conv1"] == (8, 1, 12, False)
    rebuilt = names["load"](tmp_path / "folder" / "model.safetensors")
    assert list(rebuilt.state_dict()) == list(result.model.state_dict())
    with torch.no_grad():
        expected = result.model(x)
        assert torch.equal(again(x), expected)
        assert torch.equal(rebuilt(x), expected)


def test_onnx_computes_the_same(branched: tuple[nn.Module, Conversion], tmp_path: Path) -> None:
    _, result = branched
    exported = export_onnx(result.model, tmp_path / "net.onnx", input_shape=SHAPE)
    assert check_parity(result.model, exported.path, input_shape=SHAPE).max_rel_diff < 5e-4


def test_a_plan_of_the_recipe_says_what_it_costs(branched: tuple[nn.Module, Conversion]) -> None:
    net, result = branched
    plan = describe(net, result.sites, SHAPE, "any")
    assert (
        sum(value.numel() for value in result.model.parameters())
        - sum(value.numel() for value in net.parameters())
        == plan.params.grouped - plan.params.dense
    )
    assert {site.name: site.structure for site in plan.converted} == PLANTED


def test_factors_are_balanced_so_that_all_are_trained_alike() -> None:
    net = randomise(Chain()).eval()
    model = converted(net, {"conv1": Structure(8, 4, 12)}).model
    reduce, core, expand = (
        model.get_parameter(f"conv1.{part}.weight") for part in ("reduce", "core", "expand")
    )
    written = torch.linalg.vector_norm(reduce.flatten(1), dim=1)
    read = torch.linalg.vector_norm(core.reshape(4, 3, 2, 9), dim=(1, 3)).flatten()
    torch.testing.assert_close(written, read, rtol=1e-3, atol=1e-4)
    written = torch.linalg.vector_norm(core.flatten(1), dim=1)
    torch.testing.assert_close(
        written, torch.linalg.vector_norm(expand.flatten(1), dim=0), rtol=1e-3, atol=1e-4
    )


def test_a_step_of_training_lowers_the_loss_and_reaches_every_factor(
    branched: tuple[nn.Module, Conversion],
) -> None:
    net, result = branched
    model = groupify.convert(net, describe(net, result.sites, SHAPE, "any")).model.train()
    x = images(16)
    with torch.no_grad():
        wanted = net(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        assert all(value.grad is not None and bool(value.grad.any()) for value in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_block_reconstruction_trains_factors_too() -> None:
    net, fresh = randomise(Residual()).eval(), images(64, seed=1)
    sites = {"conv1": Structure(8, 4, 8), "conv2": Structure(6), "conv3": Structure(None, 1, 6)}
    steps, fit = ReconstructionOptions(steps=200, batch_size=32), dataclasses.replace(PLAIN, metric=False)
    plain = converted(net, sites, images(256), fit=fit)
    trained = converted(net, sites, images(256), fit=fit, reconstruction=steps)
    ours, before = trained.model.state_dict(), plain.model.state_dict()
    for part in ("reduce", "core", "expand"):
        assert not torch.equal(ours[f"conv1.{part}.weight"], before[f"conv1.{part}.weight"]), part
    assert relative_error(trained.model, net, fresh) < relative_error(plain.model, net, fresh)


def test_what_the_outputs_mind_is_fitted_better() -> None:
    """The next layer hardly reads half of a conv's outputs."""
    torch.manual_seed(0)
    last = nn.Conv2d(16, 6, 1)
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), last).eval()
    with torch.no_grad():
        last.weight[:, 8:] *= 0.001
    seen, others = images(300, (16, 8, 8))[:200], images(300, (16, 8, 8))[200:]
    errors = []
    for metric in (False, True):
        fit = dataclasses.replace(PLAIN, metric=metric)
        model = converted(net, {"0": Structure(8, 4, 8)}, seen, fit=fit).model
        errors.append(relative_error(model, net, others))
    assert errors[1] < 0.8 * errors[0]


class NotDifferentiable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.head(self.conv(x)).round()
        return value


def test_gradients_of_zero_leave_the_scales_to_decide() -> None:
    torch.manual_seed(0)
    net = NotDifferentiable().eval()
    fits = [dataclasses.replace(PLAIN, metric=metric) for metric in (False, True)]
    seen, sites = images(64, (16, 8, 8)), {"conv": Structure(8, 4, 8)}
    one, other = (converted(net, sites, seen, fit=fit) for fit in fits)
    for ours, wanted in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, wanted)


def test_a_model_without_gradients_is_converted_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("derivative for aten::round_to_one is not implemented")

    monkeypatch.setattr(in_order, "output_metrics", fail)
    net = randomise(Chain()).eval()
    conversion = converted(net, {"conv2": Structure(8, 4, 8)})
    assert any(
        "cannot be differentiated (derivative for aten::round_to_one" in note for note in conversion.notes
    )
