from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn

from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.site_fit import FitOptions
from groupify.errors import ConversionError, DataError, GroupifyWarning
from groupify.stats.flow import fitted_error
from groupify.stats.samples import SampleBudget, SiteSamples
from groupify.structures import SiteRecipe
from tests.conversion.nets import (
    CalledTwice,
    Chain,
    Residual,
    Untraceable,
    images,
    make_block_diagonal,
    plan_of,
    randomise,
    relative_error,
)

# The nets have 16 channels: a small ridge, so that what can be recovered is.
EXACT = FitOptions(ridge=1e-9, refit_ridge=1e-9)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def convs(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3]


@pytest.mark.parametrize("net", [Residual(), Chain(), Chain(norm=False, bias=True), Chain(norm=False)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_given_model_is_left_untouched(net: nn.Module, shuffle: bool) -> None:
    randomise(net).train()
    calls: list[int] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(1)

    handle = net.get_submodule("fc").register_forward_hook(hook)
    net.get_submodule("conv1").eval()
    before, modes = snapshot(net), {name: m.training for name, m in net.named_modules()}
    dense_plan = plan_of(net, "conv1", "conv2", shuffle=shuffle)
    calls.clear()
    result = convert(net, dense_plan, Calibration(images(), budget=SampleBudget(minimum=512)))
    assert calls == [1]  # one image tells whether the outputs depend on the hook
    calls.clear()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert {name: m.training for name, m in net.named_modules()} == modes
    assert {name: m.training for name, m in result.model.named_modules()} == modes
    assert set(result.model.state_dict()) == set(before)
    assert [fit.name for fit in result.fits] == ["conv1", "conv2"]
    result.model(images(2))
    assert calls == [1]  # the caller's hooks are on the converted model
    handle.remove()


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("clustering", ["data", "norm", "none"])
def test_a_net_that_is_grouped_already_is_recovered(in_order: bool, clustering: str) -> None:
    net = randomise(Chain()).eval()
    make_block_diagonal(net.conv1, 4)
    make_block_diagonal(net.conv2, 4)
    options = dataclasses.replace(EXACT, in_order=in_order, refresh_batch_norm=False)
    calibration = Calibration(images(64), clustering=clustering, fit=options)
    result = convert(net, plan_of(net, "conv1", "conv2"), calibration)
    assert max(fit.error for fit in result.fits) < 1e-4
    assert relative_error(result.model, net, images(seed=1)) < 1e-4


def test_recovery_with_a_shuffle_and_scrambled_channels() -> None:
    net = randomise(Residual()).eval()
    for conv in (net.conv1, net.conv2):
        make_block_diagonal(conv, 4)
    x = images(64)
    calibration = Calibration(x, fit=EXACT, restarts=4)
    shuffled = convert(net, plan_of(net, "conv1", shuffle=True), calibration)
    # Inputs and outputs of conv1 are two classes, so any order that the shuffle asks for can be had.
    assert relative_error(shuffled.model, net, images(seed=1)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    net = randomise(Residual()).eval()
    half = randomise(Residual()).eval().to(dtype)
    result = convert(half, plan_of(half, "conv1", "conv2"), images())
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    full = convert(net, plan_of(net, "conv1", "conv2"), images())
    x = images(seed=1)
    assert relative_error(result.model.float(), full.model, x) < 0.05


def test_a_conv_that_runs_twice() -> None:
    net = randomise(CalledTwice()).eval()
    make_block_diagonal(net.conv, 2)
    result = convert(net, plan_of(net, "conv", groups=2), Calibration(images(64), fit=EXACT))
    assert relative_error(result.model, net, images(seed=1)) < 1e-3


def test_an_untraceable_model_is_fitted_by_module() -> None:
    net = randomise(Untraceable()).eval()
    before = snapshot(net)
    make_block_diagonal(net.conv, 2)
    before["conv.weight"] = net.conv.weight.detach().clone()
    result = convert(net, plan_of(net, "conv", groups=2), Calibration(images(64), fit=EXACT))
    assert "cannot be exported as a whole" in result.notes[0]
    assert "by module" in result.method
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert result.fits[0].error < 1e-4
    truncated = convert(net, plan_of(net, "conv", groups=2))
    assert truncated.method == "from the weights alone: truncation"
    assert "accuracy is not protected" in truncated.notes[0]


@pytest.mark.parametrize("norm", [True, False])
def test_the_fit_beats_truncation(norm: bool) -> None:
    net = randomise(Chain(norm=norm)).eval()
    dense_plan = plan_of(net, "conv1", "conv2")
    x = images(seed=1)
    fitted = relative_error(convert(net, dense_plan, images(64)).model, net, x)
    assert fitted < 0.5 * relative_error(convert(net, dense_plan).model, net, x)


@pytest.mark.parametrize("name", ["conv2.weight", "bn1.running_var"])
def test_weights_that_are_nan_are_refused_by_name(name: str) -> None:
    net = randomise(Chain())
    net.state_dict()[name].reshape(-1)[3] = float("nan")
    with pytest.raises(ConversionError, match=f"'{name}' holds NaN"):
        convert(net, plan_of(net, "conv1"), images())


def test_activations_that_overflow_are_refused_by_name() -> None:
    net = randomise(Chain(norm=False))
    net.stem.weight.data *= 1e30
    net.conv1.weight.data *= 1e30
    with pytest.raises(ConversionError, match="layer 'conv1' gives NaN or infinite outputs"):
        convert(net, plan_of(net, "conv1"), images())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((2, 3, 8, 8), float("nan")), "hold NaN"),
        (torch.zeros(0, 3, 8, 8), "of shape \\(0, 3, 8, 8\\)"),
        (torch.zeros(3, 8, 8), "of shape \\(3, 8, 8\\)"),
    ],
)
def test_unusable_images_are_refused(bad: Tensor, message: str) -> None:
    net = randomise(Chain())
    with pytest.raises(DataError, match=message):
        convert(net, plan_of(net, "conv1"), bad)


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(ConversionError, match="no layer 'skip'"):
        convert(Chain(), plan_of(Residual(), "skip"), images())


def test_too_few_images_warn_once_and_one_image_works() -> None:
    net = randomise(Residual()).eval()
    dense_plan = plan_of(net, "conv1", "conv3", groups=2)
    with pytest.warns(GroupifyWarning, match="fewer samples than inputs per group") as caught:
        result = convert(net, dense_plan, images(1))
    assert len(caught) == 1
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())


def test_one_image_of_one_pixel() -> None:
    net = randomise(Chain()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GroupifyWarning)
        result = convert(net, plan_of(net, "conv1", "conv2"), images(1, (3, 1, 1)))
    assert all(bool(torch.isfinite(t).all()) for t in result.model.state_dict().values())


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    net = randomise(Residual()).eval()
    dense_plan = plan_of(net, "conv1", "conv2", "conv3")
    calibration = Calibration(images(), budget=SampleBudget(minimum=300))
    state = torch.get_rng_state()
    one = convert(net, dense_plan, calibration, seed=3).model.state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    two = convert(net, dense_plan, calibration, seed=3).model.state_dict()
    other = convert(net, dense_plan, calibration, seed=4).model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_clustering_is_never_worse_than_identity_on_the_fitted_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import groupify.conversion.in_order as module

    errors: list[float] = []

    def watched(site: SiteRecipe, samples: SiteSamples, conv: nn.Module) -> float:
        errors.append(fitted_error(site, samples, conv))
        return errors[-1]

    monkeypatch.setattr(module, "fitted_error", watched)
    net = randomise(Chain()).eval()
    dense_plan = plan_of(net, "conv1", "conv2")
    improved = convert(net, dense_plan, images(64))
    assert errors[2] + errors[3] < errors[0] + errors[1]
    assert improved.kept is not None
    assert improved.kept_before is not None
    assert improved.kept > improved.kept_before

    # A net whose blocks are whole already: nothing to gain, so nothing is moved.
    make_block_diagonal(net.conv1, 4)
    make_block_diagonal(net.conv2, 4)
    same = convert(net, dense_plan, Calibration(images(64), fit=EXACT))
    torch.testing.assert_close(same.model.get_parameter("stem.weight"), net.stem.weight)


def test_a_plain_tensor_and_a_calibration_are_the_same() -> None:
    net = randomise(Chain()).eval()
    dense_plan = plan_of(net, "conv1")
    one = convert(net, dense_plan, images()).model.state_dict()
    two = convert(net, dense_plan, Calibration(images())).model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_unknown_clustering_is_refused() -> None:
    net = Chain()
    with pytest.raises(ConversionError, match="unknown clustering 'best'"):
        convert(net, plan_of(net, "conv1"), Calibration(images(), clustering="best"))
