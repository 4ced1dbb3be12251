from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from groupify.planning.layer_error import LayerMoments
from groupify.stats.fisher import observe_sites
from groupify.stats.flow import fitted_error
from groupify.stats.moments import principal_maps
from groupify.stats.output_metrics import score_directions
from groupify.stats.samples import SiteSamples
from groupify.structures import SiteRecipe, Structure
from groupify.tasks import class_scores


def correlated(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=generator)


def layer(outputs: int = 8, inputs: int = 8, taps: int = 3) -> tuple[Tensor, Tensor, LayerMoments]:
    """A dense weight, samples of its inputs, and their moments."""
    weight = torch.randn(outputs, inputs, taps, generator=torch.Generator().manual_seed(1))
    samples = correlated(4000, inputs * taps)
    return weight, samples, LayerMoments(weight, torch.cov(samples.T, correction=0))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_the_error_from_moments_is_that_of_the_fit_to_samples(groups: int, shuffle: bool) -> None:
    weight, samples, moments = layer()
    site = SiteRecipe("", Structure(groups=groups), shuffle)
    given = SiteSamples(
        patches=[samples.reshape(-1, 8, 3)], patch_outputs=[samples @ weight.flatten(1).T], calls=1
    )
    assert moments.error(site).relative == pytest.approx(fitted_error(site, given, nn.Identity()), rel=1e-3)


def test_the_error_is_weighted_by_importance_and_turns_with_the_order() -> None:
    _, _, moments = layer()
    site = SiteRecipe("", Structure(groups=4))
    error = moments.error(site)
    assert error.weighted(torch.eye(8)) == pytest.approx(float(error.covariance.trace()))
    gradients = torch.randn(5, 8, dtype=torch.float64)
    expected = sum(float(g @ error.covariance @ g) for g in gradients)
    assert error.weighted(gradients.T @ gradients) == pytest.approx(expected)
    order = torch.tensor([3, 1, 2, 0, 7, 5, 6, 4])
    turned = moments.error(site, order, order)
    assert turned.relative != pytest.approx(error.relative, rel=1e-3)
    same_groups = torch.tensor([1, 0, 3, 2, 4, 5, 7, 6])
    assert moments.error(site, same_groups, same_groups).relative == pytest.approx(error.relative)


def test_more_groups_lose_more_and_a_block_diagonal_map_loses_nothing() -> None:
    _, _, moments = layer()
    errors = [moments.error(SiteRecipe("", Structure(groups=groups))).relative for groups in (2, 4, 8)]
    assert errors == sorted(errors)
    blocks = torch.zeros(8, 8, 1)
    blocks[:4, :4], blocks[4:, 4:] = torch.randn(4, 4, 1), torch.randn(4, 4, 1)
    own = LayerMoments(blocks, torch.eye(8))
    assert own.error(SiteRecipe("", Structure(groups=2))).relative < 1e-3
    assert own.error(SiteRecipe("", Structure(groups=4))).relative > 0.01


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_the_pointwise_conv_behind_a_grouped_one_takes_the_best_of_its_features(groups: int) -> None:
    weight, samples, moments = layer()
    flat = weight.flatten(1)
    width = samples.shape[1] // groups
    covariance = torch.cov(samples.T, correction=0)
    maps = principal_maps(
        flat.reshape(8, groups, width).transpose(0, 1).double(),
        torch.stack([covariance[i : i + width, i : i + width] for i in range(0, 24, width)]).double(),
        8 // groups,
    )
    features = torch.einsum("grd,ngd->ngr", maps, samples.double().reshape(-1, groups, width)).flatten(1)
    outputs = samples.double() @ flat.T.double()
    centred = features - features.mean(0), outputs - outputs.mean(0)
    solution = torch.linalg.lstsq(*centred).solution
    left = (centred[1] - centred[0] @ solution).square().mean(0) / centred[1].square().mean(0)
    site = SiteRecipe("", Structure(None, groups, 8))
    assert moments.error(site).relative == pytest.approx(float(left.mean()), rel=0.02, abs=1e-4)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(6, 4, 2), (4, 6, 2), (9, 3, 5)])
def test_principal_maps_keep_the_most_variance(outputs: int, inputs: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, outputs, inputs, generator=generator, dtype=torch.float64)
    root = torch.randn(2, inputs, inputs, generator=generator, dtype=torch.float64)
    covariance = root @ root.transpose(1, 2)
    maps = principal_maps(weight, covariance, rank)
    assert maps.shape == (2, rank, inputs)
    share = weight @ torch.linalg.cholesky(covariance)
    for group in range(2):
        kept = maps[group] @ covariance[group] @ maps[group].T
        expected = torch.linalg.svdvals(share[group]).square()[:rank]
        found = torch.linalg.eigvalsh(kept).flip(0)[: len(expected)]
        assert torch.allclose(found, expected, rtol=1e-6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), *pooled)
    model.eval()
    return model


def test_the_importance_is_the_fisher_information() -> None:
    """Against the exact Fisher information, summed over the classes, at every position."""
    model, images = net(), torch.randn(60, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    seen = [observe_sites(model, images, ["2"], ["2"], seed=seed)["2"].importance for seed in range(40)]
    estimate = torch.stack([found for found in seen if found is not None]).mean(0)
    value = model[:2](images)
    outputs = model[2](value).detach().requires_grad_()
    scores = model[3:](outputs)
    exact = torch.zeros(4, 4, dtype=torch.float64)
    for kind in range(4):
        (gradient,) = torch.autograd.grad(scores.log_softmax(1)[:, kind].sum(), outputs, retain_graph=True)
        chance = scores.softmax(1)[:, kind].detach()
        flat = gradient.transpose(0, 1).flatten(1)
        exact += ((flat * chance.repeat_interleave(9)) @ flat.T).double() / len(images)
    assert torch.allclose(estimate, exact, atol=0.08 * float(exact.diagonal().max()))


def test_moments_are_those_of_all_patches() -> None:
    model, images = net(), torch.randn(30, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    found = observe_sites(model, images, ["0", "2"], ["2"], importance=False, batch_size=7)
    patches = torch.nn.functional.unfold(model[:2](images).detach(), 3).transpose(1, 2).flatten(0, 1)
    covariance = torch.cov(patches.T.double(), correction=0)
    assert found["2"].importance is None
    assert torch.allclose(found["2"].moments.input_covariance()[0], covariance, atol=1e-5)
    blocks = found["0"].moments.input_covariance()
    first = torch.nn.functional.unfold(images, 3).transpose(1, 2).flatten(0, 1)
    expected = torch.cov(first.T.double(), correction=0)
    assert torch.allclose(blocks[1], expected[9:18, 9:18], atol=1e-5)


def test_directions_have_the_covariance_of_a_class_drawn_from_the_scores() -> None:
    scores = torch.tensor([[2.0, 0.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([score_directions(scores, generator) for _ in range(4000)])
    chances = scores.softmax(1)[0]
    expected = torch.diag(chances) - chances[:, None] * chances
    assert torch.allclose(drawn.T @ drawn / len(drawn), expected, atol=0.01)
    assert class_scores({"out": scores}) is scores
