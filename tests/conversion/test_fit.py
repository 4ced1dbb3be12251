from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from groupify.conversion.conversion import Calibration, Conversion, convert
from groupify.conversion.layer_samples import Part, Target
from groupify.conversion.relaxed_fit import GroupedSamples
from groupify.conversion.site_fit import FitOptions, fit_site
from groupify.conversion.surgery import restructure
from groupify.planning.sites import describe
from groupify.stats.moments import GroupedFit
from groupify.stats.samples import SampleBudget
from groupify.structures import SiteRecipe, Structure
from tests.conversion.nets import SHAPE, Chain, Residual, images, plan_of, randomise, relative_error

PLAIN = FitOptions(ridge=1e-6, relu_iterations=0, refit_dense=False, refresh_batch_norm=False)


def converted(net: nn.Module, *names: str, options: FitOptions) -> Conversion:
    budget = SampleBudget(minimum=16384)  # all positions of these images
    calibration = Calibration(images(256), clustering="none", fit=options, budget=budget)
    return convert(net, plan_of(net, *names), calibration)


def error_on_other_images(net: nn.Module, result: Conversion) -> float:
    return relative_error(result.model, net, images(64, seed=1))


def outputs_before_relu(net: Residual, x: Tensor) -> Tensor:
    stem = torch.relu(net.stem(x))
    y = torch.relu(net.bn1(net.conv1(stem)))
    result: Tensor = net.bn2(net.conv2(y)) + stem
    return result


def test_fitting_in_order_beats_fitting_on_the_dense_inputs() -> None:
    net = randomise(Chain(norm=False, bias=True)).eval()
    errors = [
        error_on_other_images(
            net, converted(net, "conv1", "conv2", options=dataclasses.replace(PLAIN, in_order=order))
        )
        for order in (True, False)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_a_branch_makes_good_for_the_error_of_the_other_branch() -> None:
    # In the strided block, conv3 and skip are the two terms of a sum; skip is converted first.
    net = randomise(Residual()).eval()
    x = images(64, seed=1)

    def error_of_the_sum(compensate: bool) -> float:
        options = dataclasses.replace(PLAIN, compensate_residual=compensate)
        student = converted(net, "skip", "conv3", options=options).model
        assert isinstance(student, Residual)
        with torch.no_grad():
            inputs = torch.relu(outputs_before_relu(net, x))
            wanted = net.conv3(inputs) + net.skip(inputs)
            got = student.conv3(inputs) + student.skip(inputs)
        return float((got - wanted).square().mean() / wanted.var())

    assert error_of_the_sum(True) < 0.9 * error_of_the_sum(False)


def test_the_bias_goes_into_the_batch_norm_behind() -> None:
    net = randomise(Chain()).eval()
    result = converted(net, "conv1", options=PLAIN)
    student = result.model
    assert isinstance(student, Chain)
    assert student.conv1.bias is None
    assert set(student.state_dict()) == set(net.state_dict())
    x = images(256)
    with torch.no_grad():
        stem = torch.relu(net.stem(x))
        wanted, got = (m.bn1(m.conv1(stem)) for m in (net, student))
    # All positions were sampled (256 images of 8×8), so the mean over them is met.
    torch.testing.assert_close(got.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    assert float((wanted.mean((0, 2, 3))).abs().max()) > 0.1


def test_without_batch_norm_or_bias_nothing_is_lost_to_a_missing_mean() -> None:
    net = randomise(Chain(norm=False, bias=False)).eval()
    result = converted(net, "conv1", options=PLAIN)
    assert result.fits[0].error < 1
    assert error_on_other_images(net, result) < 1


def test_batch_norms_get_the_statistics_of_the_student() -> None:
    net = randomise(Chain()).eval()
    options = dataclasses.replace(PLAIN, refresh_batch_norm=True)
    student = converted(net, "conv1", "conv2", options=options).model
    assert isinstance(student, Chain)
    with torch.no_grad():
        values = student.conv1(torch.relu(student.stem(images(256))))
    assert student.bn1.running_mean is not None
    assert student.bn1.running_var is not None
    torch.testing.assert_close(student.bn1.running_mean, values.mean((0, 2, 3)), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(student.bn1.running_var, values.var((0, 2, 3)), rtol=1e-2, atol=1e-3)


def test_batch_norms_of_large_maps_need_no_more_than_a_part_of_the_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = randomise(Chain()).eval()
    options = dataclasses.replace(PLAIN, refresh_batch_norm=True)
    whole = converted(net, "conv1", options=options).model.get_submodule("bn1")
    monkeypatch.setattr("groupify.conversion.fit._NORM_POSITIONS", 4000)
    part = converted(net, "conv1", options=options).model.get_submodule("bn1")
    assert isinstance(whole, nn.BatchNorm2d)
    assert isinstance(part, nn.BatchNorm2d)
    assert whole.running_mean is not None
    assert part.running_mean is not None
    assert not torch.equal(part.running_mean, whole.running_mean)
    torch.testing.assert_close(part.running_mean, whole.running_mean, rtol=0.1, atol=0.1)
    torch.testing.assert_close(part.running_var, whole.running_var, rtol=0.2, atol=0.05)


def test_relaxing_in_front_of_a_relu_lowers_the_error_behind_it() -> None:
    net = randomise(Chain()).eval()
    x = images(64, seed=1)

    def error_behind_the_relu(iterations: int) -> float:
        options = dataclasses.replace(PLAIN, relu_iterations=iterations)
        student = converted(net, "conv1", options=options).model
        assert isinstance(student, Chain)
        with torch.no_grad():
            stem = torch.relu(net.stem(x))
            wanted, got = (torch.relu(m.bn1(m.conv1(stem))) for m in (net, student))
        return float((got - wanted).square().mean() / wanted.var())

    assert error_behind_the_relu(5) < 0.98 * error_behind_the_relu(0)


def test_relaxed_targets() -> None:
    # A ReLU behind y − 1 is off below 1. With weight 1 the prediction is the input.
    outputs, predicted = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[-5.0, 2.0, -5.0]])
    samples = GroupedSamples(predicted.unsqueeze(1), outputs.unsqueeze(1), torch.ones(1, 1, 3))
    identity = GroupedFit(torch.eye(3).unsqueeze(0), torch.zeros(1, 3), torch.zeros(1, 3))
    relaxed = samples.relaxed(samples.predicted(identity))
    assert relaxed.tolist() == [[[-5.0, 1.0, 3.0]]]
    assert samples.squared_error(identity, relaxed=True) == 1 + 8**2
    assert samples.squared_error(identity, relaxed=False) == 5**2 + 2**2 + 8**2
    # With a negative scale it is off above; mirrored, it is off below again.
    mirrored = Target(-outputs, -torch.ones(1, 3), -torch.ones(3)).mirrored()
    assert mirrored.thresholds is not None
    assert mirrored.outputs.tolist() == outputs.tolist()
    assert mirrored.thresholds.tolist() == [[1.0, 1.0, 1.0]]


def test_a_batch_norm_with_a_negative_scale_changes_nothing() -> None:
    net = randomise(Chain()).eval()
    mirrored = copy.deepcopy(net)
    mirrored.conv1.weight.data[::2] *= -1
    for tensor in (mirrored.get_buffer("bn1.running_mean"), mirrored.get_parameter("bn1.weight").data):
        tensor[::2] *= -1
    options = dataclasses.replace(PLAIN, relu_iterations=3)
    results = [converted(model, "conv1", options=options) for model in (net, mirrored)]
    x = images(64, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(results[0].model(x), results[1].model(x), rtol=1e-3, atol=1e-3)


def test_refitting_the_classifier_makes_good_for_what_is_left() -> None:
    net = randomise(Chain()).eval()
    plain = converted(net, "conv1", "conv2", options=PLAIN)
    refitted = converted(net, "conv1", "conv2", options=dataclasses.replace(PLAIN, refit_dense=True))
    assert error_on_other_images(net, refitted) < error_on_other_images(net, plain)
    assert not torch.equal(refitted.model.get_parameter("fc.weight"), net.fc.weight)


def test_grouped_pointwise_is_exact_where_the_rank_allows_it() -> None:
    # With 16 outputs and 4 groups each group has 4 directions: a weight of that rank is met exactly.
    net = randomise(Chain(norm=False, bias=True)).eval()
    generator = torch.Generator().manual_seed(5)
    weight = torch.zeros(16, 16, 3, 3)
    for group in range(4):
        left, right = torch.randn(16, 4, generator=generator), torch.randn(4, 36, generator=generator) / 6
        weight[:, group * 4 : group * 4 + 4] = (left @ right).reshape(16, 4, 3, 3) / 4
    net.conv1.weight.data = weight
    recipe = SiteRecipe("conv1", Structure(None, 4, 16))
    options = dataclasses.replace(PLAIN, ridge=1e-8)
    calibration = Calibration(images(256), clustering="none", fit=options)
    result = convert(net, describe(net, [recipe], SHAPE, "any"), calibration)
    assert result.fits[0].error < 1e-4
    assert error_on_other_images(net, result) < 1e-4


@pytest.mark.parametrize("shuffle", [False, True])
def test_fit_of_one_site_equals_least_squares_by_hand(shuffle: bool) -> None:
    dense = randomise(nn.Conv2d(4, 4, 1))
    module = restructure(nn.Sequential(dense), [SiteRecipe("0", Structure(groups=2), shuffle)]).get_submodule(
        "0"
    )
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(50, 4, 1, generator=generator)
    targets = torch.randn(50, 4, generator=generator)
    before = copy.deepcopy(dense.state_dict())
    with torch.no_grad():
        parts = [Part(patches, Target(targets))]
        fit = fit_site(module, dense, SiteRecipe("0", Structure(groups=2), shuffle), parts, None, PLAIN)
    assert fit.samples == 50
    assert fit.inputs == 2
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())
    ones = torch.ones(50, 1)
    for group, rows in enumerate([[0, 2], [1, 3]] if shuffle else [[0, 1], [2, 3]]):
        inputs = torch.cat([patches[:, 2 * group : 2 * group + 2, 0], ones], 1)
        solution = torch.linalg.lstsq(inputs.double(), targets[:, rows].double()).solution
        own = slice(2 * group, 2 * group + 2)
        weight = module.get_parameter("weight")[own].flatten(1).double()
        torch.testing.assert_close(weight, solution[:2].T, rtol=1e-3, atol=1e-4)
        bias = module.get_parameter("bias")[own].double()
        torch.testing.assert_close(bias, solution[2], rtol=1e-3, atol=1e-4)
