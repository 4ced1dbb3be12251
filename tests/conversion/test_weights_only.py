from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from groupify.conversion.by_part import refresh_batch_norms
from groupify.conversion.conversion import convert
from groupify.conversion.surgery import restructure
from groupify.conversion.weights_only import _Channels, _through, fit_from_statistics
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.structures import SiteRecipe, Structure
from tests.conversion.nets import SHAPE, Chain, images, plan_of, randomise


def rectified_gaussian(mean: float, deviation: float) -> tuple[float, float]:
    """Mean and variance of max(0, x) for a Gaussian x, in closed form."""
    ratio = mean / deviation
    density = math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    share = 0.5 * (1 + math.erf(ratio / math.sqrt(2)))
    first = mean * share + deviation * density
    second = (mean**2 + deviation**2) * share + mean * deviation * density
    return first, second - first**2


@pytest.mark.parametrize("mean", [-1.0, -0.2, 0.0, 0.7, 2.0])
@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.5])
def test_moments_behind_a_relu(mean: float, deviation: float) -> None:
    state = _Channels(torch.tensor([mean]), torch.tensor([deviation**2]))
    found = _through(nn.ReLU(), state)
    first, variance = rectified_gaussian(mean, deviation)
    # 32 quadrature points meet the kink of the ReLU to about 2% of the deviation.
    assert float(found.mean) == pytest.approx(first, abs=0.03 * deviation)
    assert float(found.variance) == pytest.approx(variance, abs=0.03 * deviation**2)


def test_moments_behind_a_smooth_function_are_exact() -> None:
    found = _through(torch.square, _Channels(torch.tensor([0.5]), torch.tensor([4.0])))
    assert float(found.mean) == pytest.approx(4.25, rel=1e-4)  # μ² + σ²
    assert float(found.variance) == pytest.approx(36.0, rel=1e-3)  # 2σ⁴ + 4μ²σ²


def trained_like() -> Chain:
    """Batch norms that hold the statistics of their own inputs, as after training."""
    net = randomise(Chain())
    refresh_batch_norms(net, [Call((images(256),))])
    return net.eval()


@torch.no_grad()
def statistics(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of the outputs of the two batch norms, shape (C,) each."""
    assert isinstance(net, Chain)
    x = torch.relu(net.stem(images(256)))
    first = net.bn1(net.conv1(x))
    second = net.bn2(net.conv2(torch.relu(first)))
    return [(values.mean((0, 2, 3)), values.std((0, 2, 3))) for values in (first, second)]


def test_correction_brings_the_actual_statistics_closer() -> None:
    net = trained_like()
    truncated = restructure(net, [SiteRecipe("conv2", Structure(groups=4))])
    corrected = restructure(net, [SiteRecipe("conv2", Structure(groups=4))])
    traced = capture(net, Call((torch.zeros(2, *SHAPE),)))
    assert traced.graph is not None
    named = {"conv2": SiteRecipe("conv2", Structure(groups=4))}
    assert fit_from_statistics(traced.graph.on(corrected), net, named) == ("bn2",)
    wanted = statistics(net)[1]
    for part in range(2):
        before = (statistics(truncated)[1][part] - wanted[part]).abs().mean()
        after = (statistics(corrected)[1][part] - wanted[part]).abs().mean()
        assert float(after) < 0.6 * float(before)


def test_without_truncation_there_is_nothing_to_correct() -> None:
    net = trained_like()
    kept = net.conv2.weight.data.clone()
    for group in range(4):
        own = slice(4 * group, 4 * group + 4)
        net.conv2.weight.data[own] = 0
        net.conv2.weight.data[own, own] = kept[own, own]
    student = restructure(net, [SiteRecipe("conv2", Structure(groups=4))])
    traced = capture(net, Call((torch.zeros(2, *SHAPE),)))
    assert traced.graph is not None
    fit_from_statistics(traced.graph.on(student), net, {"conv2": SiteRecipe("conv2", Structure(groups=4))})
    torch.testing.assert_close(student.get_buffer("bn2.running_mean"), net.bn2.running_mean)
    torch.testing.assert_close(student.get_buffer("bn2.running_var"), net.bn2.running_var)


@pytest.mark.parametrize("shuffle", [False, True])
def test_convert_without_images_says_that_accuracy_is_not_protected(shuffle: bool) -> None:
    net = trained_like()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    result = convert(net, plan_of(net, "conv1", "conv2", shuffle=shuffle))
    assert "accuracy is not protected" in result.notes[0]
    assert result.fits == ()
    assert result.kept is not None
    assert result.kept_before is not None
    assert result.kept > result.kept_before
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
