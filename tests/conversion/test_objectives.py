from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from groupify.conversion.clustering import SiteScore, cluster, refine
from groupify.conversion.objectives import ExplainedVariance, Flow, Membership
from groupify.graph import channel_classes, trace
from groupify.stats.samples import SiteSamples
from groupify.stats.scores import data_score
from groupify.structures import GROUPED, SiteRecipe

RIDGE = 0.02


def correlated_samples(conv: nn.Conv2d, seed: int, count: int = 400) -> SiteSamples:
    generator = torch.Generator().manual_seed(seed)
    size = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    flat = torch.randn(count, size, generator=generator) @ mixing + 1.0
    patches = flat.reshape(count, conv.in_channels, -1)
    outputs = flat @ conv.weight.detach().flatten(1).T
    return SiteSamples(patches=[patches[:100], patches[100:]], patch_outputs=[outputs[:100], outputs[100:]])


def grouping(channels: int, groups: int, seed: int) -> Membership:
    of_channel = np.random.default_rng(seed).permutation(np.repeat(np.arange(groups), channels // groups))
    return np.asarray(of_channel == np.arange(groups)[:, None], dtype=np.float32)


def explained_by_hand(conv: nn.Conv2d, samples: SiteSamples, inputs: Tensor, rows: Tensor) -> float:
    """Ridge regression with numpy's own solver, from the channels ``inputs`` to the outputs ``rows``."""
    patches = torch.cat(samples.patches).double()
    flat = patches[:, inputs].flatten(1)
    scale = (patches.flatten(1) - patches.flatten(1).mean(0)).square().mean()
    flat = flat - flat.mean(0)
    outputs = torch.cat(samples.patch_outputs)[:, rows].double()
    outputs = (outputs - outputs.mean(0)) / outputs.std(0, correction=0)
    cov = flat.T @ flat / len(flat) + RIDGE * scale * torch.eye(flat.shape[1], dtype=torch.float64)
    cross = flat.T @ outputs / len(flat)
    return float((cross * torch.linalg.solve(cov, cross)).sum())


def members(membership: Membership, group: int) -> Tensor:
    return torch.from_numpy(np.flatnonzero(membership[group]))


@settings(deadline=None, max_examples=25)
@given(kernel=st.sampled_from([1, 3]), groups=st.sampled_from([2, 4]), seed=st.integers(0, 10_000))
def test_explained_variance_and_its_benefits_are_exact(kernel: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(8, 12, kernel)
    samples = correlated_samples(conv, seed)
    inputs, outputs = grouping(8, groups, seed), grouping(12, groups, seed + 1)
    objective = ExplainedVariance(conv, samples, ridge=RIDGE)
    by_hand = [
        explained_by_hand(conv, samples, members(inputs, g), members(outputs, g)) for g in range(groups)
    ]
    assert objective.value(inputs, outputs) == pytest.approx(sum(by_hand), rel=2e-3)

    of_output = objective.output_benefits(inputs, outputs)
    some = torch.tensor([seed % 12])
    wanted = [explained_by_hand(conv, samples, members(inputs, g), some) for g in range(groups)]
    np.testing.assert_allclose(of_output[seed % 12], wanted, rtol=5e-3, atol=1e-3)

    of_input = objective.input_benefits(inputs, outputs)
    channel = seed % 8
    for g in range(groups):
        mine, rows = members(inputs, g).tolist(), members(outputs, g)
        without = torch.tensor([c for c in mine if c != channel])
        with_it = torch.tensor(sorted({*mine, channel}))
        change = explained_by_hand(conv, samples, with_it, rows)
        change -= explained_by_hand(conv, samples, without, rows) if len(without) else 0.0
        assert of_input[channel, g] == pytest.approx(change, rel=0.02, abs=5e-3)


class Pair(nn.Module):
    """The hidden channels are free to be ordered."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 1)
        self.second = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W) → (N, 4, H, W)."""
        result: Tensor = self.last(torch.relu(self.second(torch.relu(self.first(x)))))
        return result


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), sweeps=st.integers(1, 3))
def test_refining_never_explains_less(seed: int, sweeps: int) -> None:
    torch.manual_seed(seed)
    model = Pair()
    traced = trace(model).module
    assert traced is not None
    channels = channel_classes(traced, torch.zeros(1, 4, 2, 2))
    samples = correlated_samples(model.second, seed)
    site = SiteRecipe("second", GROUPED, 4)
    objective = ExplainedVariance(model.second, samples)
    found = cluster(channels, [SiteScore(site, data_score(model.second, samples))], seed=seed)
    refined = refine(channels, [site], [objective], found.orders, sweeps=sweeps)
    assert all(sorted(order.tolist()) == list(range(len(order))) for order in refined.values())

    def value(orders: dict[int, Tensor]) -> float:
        in_order = out_order = torch.arange(16)
        for index, channel_class in enumerate(channels.classes):
            for use in channel_class.places:
                if channels.uses[use].name == "second" and channels.uses[use].kind == "conv input":
                    in_order = orders[index]
                elif channels.uses[use].name == "second" and channels.uses[use].kind == "conv output":
                    out_order = orders[index]
        inputs, outputs = np.zeros((4, 16), np.float32), np.zeros((4, 16), np.float32)
        for g in range(4):
            inputs[g, in_order[4 * g : 4 * g + 4]] = 1
            outputs[g, out_order[4 * g : 4 * g + 4]] = 1
        return objective.value(inputs, outputs)

    assert value(refined) >= value(found.orders) - 1e-4


def test_flow_counts_what_stays_inside() -> None:
    score = torch.tensor([[1.0, 2.0], [3.0, 8.0]])
    flow, straight = Flow(score), np.eye(2, dtype=np.float32)
    assert flow.value(straight, straight) == pytest.approx(9.0)
    assert flow.value(straight[::-1].copy(), straight) == pytest.approx(2.0 + 3.0)
    assert flow.input_benefits(straight, straight).tolist() == [[1.0, 3.0], [2.0, 8.0]]
    assert flow.output_benefits(straight, straight).tolist() == [[1.0, 2.0], [3.0, 8.0]]
    assert flow.total == pytest.approx(14.0)
