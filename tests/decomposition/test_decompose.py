"""Factors fitted to moments: as good as they can be, whatever the conv."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupify.decomposition.decompose import Decomposer, OutputMetric, decompose
from groupify.decomposition.factors import Factors
from groupify.decomposition.moments import Moments
from groupify.errors import ConversionError, PlanError
from groupify.structures import ConvShape, Structure
from tests.decomposition.problems import covariance, left_over, planted, problem, random, run

CONV = ConvShape(12, 16, (3, 3))
POINTWISE = ConvShape(12, 16, (1, 1))
OWN_GROUPS = ConvShape(12, 16, (3,), groups=2)

MEMBERS = [
    (CONV, Structure(6, 1, 8)),
    (CONV, Structure(8, 4, 8)),
    (CONV, Structure(8, 4, 16)),
    (CONV, Structure(18, 6, 18)),
    (CONV, Structure(8, 8, 8)),
    (CONV, Structure(4, 4, 8)),
    (CONV, Structure(6, 1, None)),
    (CONV, Structure(8, 4, None)),
    (CONV, Structure(None, 1, 5)),
    (CONV, Structure(None, 4, 8)),
    (CONV, Structure(None, 4, None)),
    (CONV, Structure()),
    (POINTWISE, Structure(5, 1, None)),
    (POINTWISE, Structure(None, 4, 8)),
    (POINTWISE, Structure(8, 4, None)),
    (POINTWISE, Structure(None, 2, None)),
    (OWN_GROUPS, Structure(4, 2, 4)),
    (OWN_GROUPS, Structure(8, 4, 8)),
    (OWN_GROUPS, Structure(None, 4, 8)),
    (OWN_GROUPS, Structure(None, 2, None)),
    (OWN_GROUPS, Structure(None, 4, None)),
    (ConvShape(6, 8, (2, 1, 2)), Structure(4, 2, 4)),
]
FEW = [Structure(8, 4, 8), Structure(None, 4, 8), Structure(8, 4, None)]


@pytest.mark.parametrize(("conv", "structure"), MEMBERS, ids=str)
def test_the_error_is_that_of_the_convs(conv: ConvShape, structure: Structure) -> None:
    moments, weight = problem(conv)
    scale = random(conv.out_channels, seed=7)
    factors = decompose(moments, conv, structure, scale, evaluations=20)
    assert factors.error == pytest.approx(left_over(factors.weight(), weight, moments, scale), abs=1e-5)
    assert factors.error < 1
    width = conv.in_channels // conv.groups
    reads, writes = structure.reduce or conv.in_channels, structure.expand or conv.out_channels
    assert factors.core.shape == (writes, reads // structure.groups, *conv.kernel_size)
    assert (factors.reduce is None) == (structure.reduce is None)
    assert (factors.expand is None) == (structure.expand is None)
    images = random(2, conv.in_channels, *[4] * len(conv.kernel_size), seed=3)
    whole = replace(factors, reduce=None, core=factors.weight(), expand=None, groups=conv.groups)
    assert whole.core.shape == (conv.out_channels, width, *conv.kernel_size)
    torch.testing.assert_close(run(factors, images), run(whole, images))


@pytest.mark.parametrize(("conv", "structure"), MEMBERS, ids=str)
def test_what_a_structure_computes_it_finds(conv: ConvShape, structure: Structure) -> None:
    """Exactly, or nearly: block terms of such small convs have local minima."""
    width = conv.in_channels // conv.groups
    weight = planted(conv, structure, 20)
    moments = Moments.of_weight(weight, covariance(width * conv.positions, 25, conv.groups))
    between = structure.reduce is not None and structure.expand is not None
    error = decompose(moments, conv, structure, evaluations=100).error
    assert error < (0.03 if between and structure.groups > conv.groups else 1e-4)


def test_a_planted_block_term_is_found_exactly() -> None:
    weight = planted(CONV, Structure(8, 4, 8), 20)
    moments = Moments.of_weight(weight, covariance(108, 25))
    assert decompose(moments, CONV, Structure(8, 4, 8), evaluations=100).error < 1e-5


@pytest.mark.parametrize(("conv", "structure"), MEMBERS, ids=str)
def test_more_evaluations_are_never_worse(conv: ConvShape, structure: Structure) -> None:
    decomposer = Decomposer(problem(conv)[0], conv)
    errors = [decomposer.fit(structure, evaluations).error for evaluations in (1, 5, 20)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "structure", [Structure(8, 4, 8), Structure(None, 4, 8), Structure(6, 1, None)], ids=str
)
def test_repeats_itself(structure: Structure, dtype: torch.dtype) -> None:
    moments, _ = problem(CONV)
    moments = Moments(moments.covariance.to(dtype), moments.cross.to(dtype), moments.energy.to(dtype))
    one, two = (decompose(moments, CONV, structure) for _ in range(2))
    assert one.core.dtype == dtype
    assert one.error == two.error
    assert torch.equal(one.core, two.core)


def test_single_precision_is_enough() -> None:
    moments, _ = problem(CONV)
    single = Moments(moments.covariance.float(), moments.cross.float(), moments.energy.float())
    for structure in (Structure(8, 4, 8), Structure(None, 4, 8), Structure(None, 1, 5)):
        error = decompose(moments, CONV, structure).error
        assert decompose(single, CONV, structure).error == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(
    "structure", [Structure(8, 4, 8), Structure(6, 1, 8), Structure(12, 12, 12)], ids=str
)
def test_order_and_units_of_channels_do_not_matter(structure: Structure) -> None:
    moments, weight = problem(CONV)
    error = decompose(moments, CONV, structure, evaluations=100).error
    generator = torch.Generator().manual_seed(1)
    inputs, outputs = (torch.randperm(n, generator=generator) for n in (12, 16))
    order = (inputs[:, None] * 9 + torch.arange(9)).flatten()
    shuffled = Moments.of_weight(weight[outputs][:, inputs], moments.covariance[:, order][:, :, order])
    assert decompose(shuffled, CONV, structure, evaluations=100).error == pytest.approx(error, rel=0.05)
    units = torch.logspace(-1, 1, 12, dtype=torch.float64)
    factor = units.repeat_interleave(9)
    scaled = Moments.of_weight(weight / units[:, None, None], moments.covariance * factor * factor[:, None])
    assert decompose(scaled, CONV, structure, evaluations=100).error == pytest.approx(error, rel=0.05)


def test_units_of_the_outputs_are_those_of_the_scale() -> None:
    moments, weight = problem(CONV)
    units = torch.logspace(-1, 1, 16, dtype=torch.float64)
    scaled = Moments.of_weight(weight * units[:, None, None, None], moments.covariance)
    plain = decompose(moments, CONV, Structure(8, 4, 8))
    same = decompose(scaled, CONV, Structure(8, 4, 8), 1 / units)
    assert same.error == pytest.approx(plain.error, rel=1e-6)
    torch.testing.assert_close(
        same.weight(), plain.weight() * units[:, None, None, None], rtol=1e-4, atol=1e-4
    )


def test_low_rank_is_reduced_rank_regression() -> None:
    for conv in (POINTWISE, ConvShape(16, 12, (1, 1))):
        moments, weight = problem(conv)
        root = torch.linalg.cholesky(moments.covariance[0])
        values = torch.linalg.svdvals(weight.flatten(1) @ root).square()
        factors = decompose(moments, conv, Structure(5, 1, None))
        assert factors.error == pytest.approx(float(values[5:].sum() / values.sum()), rel=1e-5)
    moments, weight = problem(CONV)
    values = torch.linalg.svdvals(weight.flatten(1) @ torch.linalg.cholesky(moments.covariance[0])).square()
    factors = decompose(moments, CONV, Structure(None, 1, 5))
    assert factors.error == pytest.approx(float(values[5:].sum() / values.sum()), rel=1e-5)


def test_one_group_is_tucker_2() -> None:
    weight = random(16, 12, 3, 3, seed=0)
    moments = Moments.of_weight(weight, torch.eye(108, dtype=torch.float64)[None])
    assert decompose(moments, CONV, Structure(6, 1, 8)).error <= _alternating_tucker(weight, 6, 8) + 1e-4


def _alternating_tucker(weight: Tensor, reduce: int, expand: int) -> float:
    """Higher-order orthogonal iteration: exact where the inputs are white."""
    maps = weight.flatten(2)
    up = torch.linalg.svd(maps.flatten(1))[0][:, :expand]
    for _ in range(50):
        seen = torch.einsum("oik,os->iks", maps, up).flatten(1)
        down = torch.linalg.svd(seen, full_matrices=False)[0][:, :reduce]
        seen = torch.einsum("oik,ir->okr", maps, down).flatten(1)
        up = torch.linalg.svd(seen, full_matrices=False)[0][:, :expand]
    kept = torch.einsum("oik,ir,os->rsk", maps, down, up).square().sum()
    return float(1 - kept / maps.square().sum())


def test_finer_structures_of_equal_size_come_out_no_worse_than_what_they_hold() -> None:
    moments, _ = problem(CONV)
    fit = Decomposer(moments, CONV).fit
    assert fit(Structure(8, 2, 8)).error <= fit(Structure(8, 4, 8)).error
    assert fit(Structure(8, 4, 8)).error <= fit(Structure(8, 8, 8)).error
    assert fit(Structure(12, 4, 16)).error <= fit(Structure(None, 4, None)).error
    assert fit(Structure(None, 4, 16)).error <= fit(Structure(None, 4, None)).error


@pytest.mark.parametrize(
    "structure", [Structure(8, 4, 8), Structure(None, 4, 8), Structure(8, 4, None)], ids=str
)
def test_each_group_of_a_grouped_conv_by_itself(structure: Structure) -> None:
    moments, _ = problem(OWN_GROUPS)
    whole = Decomposer(moments, OWN_GROUPS).fit(structure, 15)
    alone, share = ConvShape(6, 8, (3,)), structure.share(2)
    for group in range(2):
        own = slice(group, group + 1)
        part = Moments(moments.covariance[own], moments.cross[own], moments.energy[own])
        factors = Decomposer(part, alone).fit(share, 15)
        torch.testing.assert_close(whole.weight().chunk(2)[group], factors.weight())


def test_wanted_outputs_need_not_be_the_convs_own() -> None:
    inputs, wanted = random(600, 27, seed=0), random(600, 8, seed=1)
    wanted = wanted + inputs @ random(27, 8, seed=2)
    inputs, wanted = inputs - inputs.mean(0), wanted - wanted.mean(0)
    moments = Moments(
        (inputs.T @ inputs / 600)[None], (inputs.T @ wanted / 600)[None], wanted.square().mean(0)[None]
    )
    conv = ConvShape(3, 8, (9,))
    for structure in (Structure(2, 1, 4), Structure(3, 3, 6), Structure(), Structure(None, 1, 3)):
        factors = decompose(moments, conv, structure)
        off = wanted - inputs @ factors.weight().flatten(1).T
        assert factors.error == pytest.approx(float(off.square().sum() / wanted.square().sum()), abs=1e-5)
    assert torch.allclose(
        decompose(moments, conv, Structure()).weight().flatten(1).T,
        torch.linalg.lstsq(inputs, wanted)[0],
        atol=1e-5,
    )


def test_drawn_to_known_weights() -> None:
    weight = random(16, 12, 3, 3, seed=0)
    few = Moments.of_weight(weight, covariance(108, 1, samples=20))
    noisy = replace(
        few, cross=few.cross + 0.1 * random(1, 108, 16, seed=5) * few.covariance[0].diagonal().mean()
    )
    off = [
        (decompose(moments, CONV, Structure()).weight() - weight).norm()
        for moments in (
            noisy.drawn_to(weight, 0.01),
            noisy.drawn_to(weight, 1.0),
            noisy.drawn_to(weight, 100.0),
        )
    ]
    assert off[0] > off[1] > off[2]
    assert off[2] < 0.01 * weight.norm()
    same = few.drawn_to(torch.nn.Parameter(weight), 1.0)
    torch.testing.assert_close(same.cross, Moments.of_weight(weight, same.covariance).cross)
    torch.testing.assert_close(same.energy, Moments.of_weight(weight, same.covariance).energy)


STRUCTURES = [
    Structure(8, 4, 8),
    Structure(None, 4, 8),
    Structure(8, 4, None),
    Structure(None, 1, 5),
    Structure(),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_moments(structure: Structure, dtype: torch.dtype) -> None:
    weight = random(16, 12, 3, 3, seed=0)
    weight[3] = 0
    few = covariance(108, 1, samples=20)
    few[:, 9:27] = 0
    few[:, :, 9:27] = 0
    nothing = torch.zeros(1, 108, 108, dtype=torch.float64)
    scale = torch.ones(16)
    scale[5] = 0
    for cov in (few, nothing):
        factors = decompose(Moments.of_weight(weight.to(dtype), cov.to(dtype)), CONV, structure, scale)
        assert 0 <= factors.error < 1
        assert torch.isfinite(factors.weight()).all()


def test_weights_may_be_parameters() -> None:
    weight = torch.nn.Parameter(random(16, 12, 3, 3, seed=0))
    moments = Moments.of_weight(weight, covariance(108, 1))
    assert not decompose(moments, CONV, Structure(8, 4, 8), evaluations=2).weight().requires_grad


def test_constant_outputs_leave_no_error() -> None:
    moments = Moments.of_weight(torch.zeros(16, 12, 3, 3), covariance(108, 1).float())
    assert [decompose(moments, CONV, structure).error for structure in STRUCTURES] == [0.0] * len(STRUCTURES)


@given(
    own=st.integers(1, 2), groups=st.integers(1, 3), read=st.integers(1, 3), write=st.integers(1, 3),
    kernel=st.sampled_from([(3,), (2, 2), (1, 2, 2)]),
    ends=st.sampled_from(["both", "reduce", "expand", "none"]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_shape(
    own: int, groups: int, read: int, write: int, kernel: tuple[int, ...], ends: str, seed: int
) -> None:
    total = own * groups
    conv = ConvShape(total * 2, total * 3, kernel, own)
    structure = Structure(
        total * read if ends in ("both", "reduce") else None,
        total,
        total * write if ends in ("both", "expand") else None,
    ).canonical(conv)
    moments, weight = problem(conv, seed)
    factors = decompose(moments, conv, structure, evaluations=6)
    assert factors.error == pytest.approx(left_over(factors.weight(), weight, moments), abs=1e-5)
    count = sum(part.numel() for part in (factors.reduce, factors.core, factors.expand) if part is not None)
    assert count == structure.parameters(conv)


@pytest.mark.parametrize(("conv", "structure"), MEMBERS, ids=str)
def test_balanced_factors_compute_the_same(conv: ConvShape, structure: Structure) -> None:
    factors = Decomposer(problem(conv)[0], conv).fit(structure, 3)
    even = factors.balanced()
    torch.testing.assert_close(even.weight(), factors.weight())
    own = structure.groups
    core = even.core.reshape(own, even.core.shape[0] // own, even.core.shape[1], -1)
    if even.reduce is not None:
        torch.testing.assert_close(
            even.reduce.flatten(1).norm(dim=1), core.norm(dim=(1, 3)).flatten(), rtol=1e-3, atol=1e-9
        )
    if even.expand is not None:
        expand = even.expand.reshape(conv.groups, -1, even.expand.shape[1])
        torch.testing.assert_close(
            even.core.flatten(1).norm(dim=1), expand.norm(dim=1).flatten(), rtol=1e-3, atol=1e-9
        )


def test_a_dead_latent_stays_when_balanced() -> None:
    factors = Decomposer(problem(CONV)[0], CONV).fit(Structure(8, 4, 8), 3)
    assert factors.reduce is not None
    factors.reduce[2] = 0
    even = factors.balanced()
    assert torch.isfinite(even.weight()).all()
    torch.testing.assert_close(even.weight(), factors.weight())


def test_faults_are_named() -> None:
    moments, weight = problem(CONV)
    with pytest.raises(PlanError, match="needless"):
        decompose(moments, CONV, Structure(12, 1, 16))
    with pytest.raises(ConversionError, match="do not belong together"):
        Moments(moments.covariance, moments.cross[:, :5], moments.energy)
    with pytest.raises(ConversionError, match="NaN or infinite"):
        Moments.of_weight(weight * math.nan, moments.covariance)
    with pytest.raises(ConversionError, match="expected"):
        decompose(moments, POINTWISE, Structure(5, 1, None))


def test_a_fit_finds_nothing_in_directions_that_rounding_made_negative() -> None:
    """As sums in single precision have, where variances differ by more than that tells apart."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q * torch.logspace(0, -4, 64)
    inputs = (torch.randn(1200, 64, generator=generator) @ mixed.T).double()
    outputs = inputs @ torch.randn(64, 128, generator=generator).double()
    outputs += 0.02 * outputs.std() * torch.randn(outputs.shape, generator=generator)
    inputs, outputs = inputs - inputs.mean(0), outputs - outputs.mean(0)
    exact = inputs.T @ inputs / len(inputs)
    weakest = torch.linalg.eigh(exact).eigenvectors[:, :21]
    rounded = exact - 6e-5 * exact.diagonal().mean() * weakest @ weakest.T
    moments = (rounded, inputs.T @ outputs / len(inputs), outputs.square().mean(0))
    found = decompose(
        Moments(*(part.float()[None] for part in moments)), ConvShape(64, 128, (1, 1)), Structure(None, 4, 16)
    )
    missed = outputs - inputs @ found.weight().flatten(1).double().T
    assert found.error == pytest.approx(float(missed.square().sum() / outputs.square().sum()), rel=0.15)


def cost(factors: Factors, weight: Tensor, moments: Moments, metric: Tensor) -> float:
    """What the errors of factors cost under a metric (g, o, o)."""
    groups, width = moments.cross.shape[0], moments.cross.shape[1]
    missed = (factors.weight() - weight).flatten(1).reshape(groups, -1, width).double()
    return float((metric * (missed @ moments.covariance.double() @ missed.transpose(1, 2))).sum())


def random_metric(conv: ConvShape) -> Tensor:
    """One that minds few directions of the outputs, for each group, shape (g, o, o)."""
    outputs = conv.out_channels // conv.groups
    mixed = random(conv.groups, outputs, 3, seed=9).double()
    return mixed @ mixed.transpose(1, 2) + 0.01 * torch.eye(outputs, dtype=torch.float64)


@pytest.mark.parametrize(("conv", "structure"), MEMBERS, ids=str)
def test_under_a_metric_errors_cost_less(conv: ConvShape, structure: Structure) -> None:
    moments, weight = problem(conv)
    metric = random_metric(conv)
    roots = torch.linalg.cholesky(metric).to(moments.cross)
    energy = (metric.diagonal(dim1=1, dim2=2) * moments.energy).sum(1).to(moments.cross)
    plain = Decomposer(moments, conv).fit(structure, 60)
    decomposer = Decomposer(moments, conv, metric=OutputMetric(roots, energy))
    fitted = decomposer.fit(structure, 60)
    mixes = structure.expand is not None or structure.groups == conv.groups
    before, after = (cost(factors, weight, moments, metric) for factors in (plain, fitted))
    assert after <= before * (1.05 if mixes else 1 + 1e-6) + 1e-6
    if mixes and structure.groups == conv.groups and plain.error > 0.01:
        assert after < 0.9 * before
    assert decomposer.error(fitted, moments) == pytest.approx(
        left_over(fitted.weight(), weight, moments, torch.ones(conv.out_channels)), abs=1e-5
    )


@pytest.mark.parametrize(
    "structure", [Structure(8, 4, 8), Structure(None, 4, 8), Structure(6, 1, None)], ids=str
)
def test_a_metric_of_scales_alone_is_no_other_problem(structure: Structure) -> None:
    moments, _ = problem(CONV)
    scale = random(CONV.out_channels, seed=7).abs() + 0.1
    energy = (moments.energy * scale.square()).sum(1).to(moments.cross)
    metric = OutputMetric(torch.diag(scale).to(moments.cross)[None], energy)
    one = Decomposer(moments, CONV, scale).fit(structure, 40)
    other = Decomposer(moments, CONV, metric=metric).fit(structure, 40)
    torch.testing.assert_close(one.weight(), other.weight(), atol=1e-4, rtol=1e-3)
    assert other.error == pytest.approx(one.error, rel=1e-3)
