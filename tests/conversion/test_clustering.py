from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import groupify
from groupify.conversion.assignment import balanced_assignment
from groupify.conversion.clustering import Clustering, SiteScore, cluster
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.channels import Channels, channel_classes
from groupify.graph.permute import apply_orders
from groupify.planning.sites import describe
from groupify.stats.flow import norm_score
from groupify.structures import ConvShape, SiteRecipe, Structure
from tests.conversion.nets import SHAPE, Chain, Residual, images, make_block_diagonal, randomise


def total(value: np.ndarray, assigned: np.ndarray) -> float:
    return float(value[np.arange(len(assigned)), assigned].sum())


@settings(deadline=None)
@given(cells=st.integers(1, 3), per_cell=st.integers(1, 2), seed=st.integers(0, 10_000), ties=st.booleans())
def test_balanced_assignment_equals_brute_force(cells: int, per_cell: int, seed: int, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    start = generator.permutation(np.repeat(np.arange(cells), per_cell))
    value = generator.random((len(start), cells))
    value = np.round(3 * value) if ties else value
    assigned = balanced_assignment(value, np.full(cells, per_cell), start)
    best = max(total(value, np.array(p)) for p in set(itertools.permutations(start.tolist())))
    assert np.bincount(assigned, minlength=cells).tolist() == [per_cell] * cells
    assert total(value, assigned) >= best - 1e-6


@settings(deadline=None, max_examples=60)
@given(
    capacities=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    ties=st.booleans(),
)
def test_the_solvers_agree(capacities: list[int], seed: int, spread: float, ties: bool) -> None:
    from groupify.conversion import assignment

    generator = np.random.default_rng(seed)
    start = generator.permutation(np.repeat(np.arange(len(capacities)), capacities))
    value = generator.gamma(spread, size=(len(start), len(capacities)))
    value = np.round(value) if ties else value
    general = assignment._by_places(value, np.array(capacities))
    fast = np.argmax(value - assignment._prices(value, np.array(capacities)), axis=1)
    assignment._move_surplus(value, np.array(capacities), fast)
    assert np.bincount(fast, minlength=len(capacities)).tolist() == capacities
    np.testing.assert_allclose(total(value, fast), total(value, general), rtol=1e-9)


def test_ties_leave_everything_where_it_is() -> None:
    start = np.array([2, 0, 1, 1, 0, 2] * 8)
    assigned = balanced_assignment(np.ones((48, 3)), np.array([16, 16, 16]), start)
    assert assigned.tolist() == start.tolist()


def find(model: nn.Module) -> Channels:
    call = Call((torch.zeros(2, *SHAPE),))
    graph = capture(model, call).graph
    assert graph is not None
    return channel_classes(graph, call)


def cluster_by_norm(model: nn.Module, groups: dict[str, int], shuffle: bool = False) -> Clustering:
    scores = [
        SiteScore(SiteRecipe(name, Structure(groups=count), shuffle), norm_score(model.get_submodule(name)))
        for name, count in groups.items()
    ]
    return cluster(find(model), scores, restarts=4)


def share_inside(model: nn.Module, name: str, groups: int, shuffle: bool = False) -> float:
    score = norm_score(model.get_submodule(name))
    of_input = torch.arange(score.shape[1]) // (score.shape[1] // groups)
    rows = torch.arange(score.shape[0])
    of_output = rows % groups if shuffle else rows // (score.shape[0] // groups)
    inside = of_output[:, None] == of_input[None, :]
    return float(score[inside].sum() / score.sum())


def scrambled(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    channels = find(model)
    orders = {i: torch.randperm(c.size, generator=generator) for i, c in enumerate(channels.classes)}
    return apply_orders(model, channels, orders)


def test_scrambled_block_diagonal_convs_are_unscrambled() -> None:
    net = randomise(Chain()).eval()
    make_block_diagonal(net.conv1, 4)
    make_block_diagonal(net.conv2, 4)
    mixed = scrambled(net)
    found = cluster_by_norm(mixed, {"conv1": 4, "conv2": 4})
    assert found.kept_before < 0.6
    assert found.kept > 0.999
    sorted_again = apply_orders(mixed, find(mixed), found.orders)
    assert share_inside(sorted_again, "conv1", 4) > 0.999
    assert share_inside(sorted_again, "conv2", 4) > 0.999
    x = images(4)
    torch.testing.assert_close(sorted_again(x), net(x), rtol=1e-4, atol=1e-4)


def test_different_numbers_of_groups_in_one_class_nest() -> None:
    net = randomise(Chain()).eval()
    make_block_diagonal(net.conv1, 2)
    make_block_diagonal(net.conv2, 4)
    mixed = scrambled(net)
    found = cluster_by_norm(mixed, {"conv1": 2, "conv2": 4})
    sorted_again = apply_orders(mixed, find(mixed), found.orders)
    assert share_inside(sorted_again, "conv1", 2) > 0.999
    assert share_inside(sorted_again, "conv2", 4) > 0.999


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), shuffle=st.booleans(), groups=st.sampled_from([2, 4, 8]))
def test_the_score_inside_never_falls_and_is_what_the_reordered_weights_hold(
    seed: int, shuffle: bool, groups: int
) -> None:
    net = randomise(Residual(), seed).eval()
    sites = {"conv1": groups, "conv2": 2, "conv3": groups}
    found = cluster_by_norm(net, sites, shuffle)
    assert found.kept >= found.kept_before - 1e-6
    reordered = apply_orders(net, find(net), found.orders)

    def share(model: nn.Module) -> float:
        scores = {name: norm_score(model.get_submodule(name)) for name in sites}
        kept = [float(scores[n].sum()) * share_inside(model, n, g, shuffle) for n, g in sites.items()]
        return sum(kept) / sum(float(s.sum()) for s in scores.values())

    np.testing.assert_allclose([share(net), share(reordered)], [found.kept_before, found.kept], rtol=1e-4)


def test_no_score_at_all_changes_nothing() -> None:
    net = Chain().eval()
    score: Tensor = torch.zeros(16, 16)
    found = cluster(find(net), [SiteScore(SiteRecipe("conv1", Structure(groups=4)), score)], restarts=2)
    assert found.kept == found.kept_before == 0


def wide_to_narrow() -> nn.Sequential:
    """A 1×1 conv 64 → 31 whose inputs move the outputs in two directions for each half of them, shuffled."""
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 31, 1)).eval()
    generator = torch.Generator().manual_seed(0)
    blocks = [
        torch.randn(31, 2, generator=generator) @ torch.randn(2, 32, generator=generator) for _ in range(2)
    ]
    order = torch.randperm(64, generator=generator)
    net.get_parameter("2.weight").data.copy_(torch.cat(blocks, 1)[:, order, None, None])
    return net


def test_inputs_that_move_the_outputs_alike_stand_together_in_front_of_an_expand() -> None:
    net = wide_to_narrow()
    site = SiteRecipe("2", Structure(None, 2, 4))
    conv = net.get_submodule("2")
    entry = SiteScore.of(site, norm_score(conv), conv.get_parameter("weight"))
    found = cluster(find(net), [entry], restarts=4)
    assert found.kept_before < 0.9
    assert found.kept == pytest.approx(1)
    sorted_again = apply_orders(net, find(net), found.orders)
    parts = sorted_again.get_parameter("2.weight").flatten(1).split(32, 1)
    assert [int(torch.linalg.matrix_rank(part, rtol=1e-4)) for part in parts] == [2, 2]


def test_the_conversion_finds_these_groups() -> None:
    net = wide_to_narrow()
    made = describe(net, [SiteRecipe("2", Structure(None, 2, 4))], SHAPE, "any")
    clustered, plain = (
        groupify.convert(net, made, groupify.Calibration(images(64), clustering=clustering))
        for clustering in ("data", "none")
    )
    assert clustered.fits[0].error < 1e-4 < 0.01 < plain.fits[0].error


def test_only_orders_that_were_measured_to_matter_are_looked_for() -> None:
    pointwise, spatial = ConvShape(64, 16, (1, 1)), ConvShape(64, 16, (3, 3))
    assert Structure(None, 4, 8).minds_order(pointwise)
    assert not Structure(None, 4, 8).minds_order(spatial)
    assert Structure(groups=4).minds_order(spatial)
    assert not Structure(8, 4, 8).minds_order(spatial)
