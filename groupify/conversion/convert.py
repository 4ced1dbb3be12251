"""Convert a dense model by a plan: cluster the channels, restructure, fit."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from groupify.conversion.clustering import SiteScore, cluster
from groupify.conversion.fit import FitOptions, SiteFit, fit_student
from groupify.conversion.moments import GroupedMoments
from groupify.conversion.surgery import SiteRecipe, restructure, row_channels
from groupify.conversion.teacher import SampleBudget, SiteSamples, observe_teacher, residual_sums
from groupify.errors import ConversionError, DataError
from groupify.graph.channels import CONV_INPUT, CONV_OUTPUT, Channels, channel_classes
from groupify.graph.permute import apply_orders, use_order
from groupify.graph.trace import on_same_graph, trace

CLUSTERINGS = ("data", "norm", "none")


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images and how to use them.

    Attributes:
        images: shape (N, C, H, W), preprocessed as for inference.
        batch_size: images per step.
        clustering: what decides which channels form a group: ``"data"``, ``"norm"`` (weights
            alone) or ``"none"``.
        restarts: random starts of the clustering besides the given order.
        fit: options of the least-squares fit.
        budget: how many output positions are sampled for it.
    """

    images: Tensor
    batch_size: int = 64
    clustering: str = "data"
    restarts: int = 2
    fit: FitOptions = field(default_factory=FitOptions)
    budget: SampleBudget = field(default_factory=SampleBudget)


@dataclass(frozen=True)
class Conversion:
    """A converted model and how it came about.

    Attributes:
        model: the grouped model, in the training mode of the dense one.
        sites: the replaced convs.
        fits: how well each was fitted; empty without calibration.
        method: one line for the report.
        kept_before, kept: share of the clustering score inside the groups, before and after.
        seconds: time of each step.
    """

    model: nn.Module
    sites: tuple[SiteRecipe, ...]
    fits: tuple[SiteFit, ...]
    method: str
    kept_before: float | None
    kept: float | None
    seconds: Mapping[str, float]


def convert_with(
    model: nn.Module, sites: Sequence[SiteRecipe], calibration: Calibration, *, seed: int = 0, progress: bool = False
) -> Conversion:
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    dense = copy.deepcopy(model).eval()
    dense = dense.to(memory_format=torch.channels_last)  # oneDNN's fast path
    batches = [b.contiguous(memory_format=torch.channels_last) for b in calibration.images.split(calibration.batch_size)]
    traced = trace(dense)
    assert traced.module is not None
    by_name = {site.name: site for site in sites}
    sums = residual_sums(traced.module, by_name)
    samples = observe_teacher(
        traced.module, batches, {s.name: s.groups for s in sites}, sums, calibration.budget, seed=seed, progress=progress
    )
    clock.lap("dense model")
    channels = channel_classes(traced.module, batches[0][:1])
    kept_before = kept = None
    clock.lap("graph")
    if calibration.clustering != "none":
        scores = [
            SiteScore(site, _score(dense.get_submodule(site.name), samples[site.name], calibration.clustering)) for site in sites
        ]
        clock.lap("scores")
        found = cluster(channels, scores, restarts=calibration.restarts, seed=seed)
        kept_before, kept = found.kept_before, found.kept
        permuted = apply_orders(dense, channels, found.orders)
        permuted_samples = {s.name: _permute_samples(samples[s.name], s.name, channels, found.orders) for s in sites}
        clock.lap("clustering")
        before = sum(_teacher_error(site, samples[site.name]) for site in sites)
        after = sum(_teacher_error(site, permuted_samples[site.name]) for site in sites)
        print("fitted error identity", before/len(sites), "clustered", after/len(sites), kept_before, kept)
        if after < before:
            dense, samples = permuted, permuted_samples
        clock.lap("compare")
    student = restructure(dense, sites)
    graph = on_same_graph(traced.module, student)
    names = {str(conv.target): total.name for conv, total in sums.items()}
    fits = fit_student(graph, dense, batches, by_name, samples, names, calibration.fit, progress=progress)
    clock.lap("fit")
    for (name, module), original in zip(student.named_modules(), model.modules()):
        pass
    student.train(model.training)
    return Conversion(student, tuple(sites), tuple(fits.values()), "least squares", kept_before, kept, seconds)


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now


def _score(conv: nn.Module, samples: SiteSamples, clustering: str) -> Tensor:
    weight = conv.weight.detach().flatten(2)  # (O, I, k)
    if clustering == "norm":
        return weight.square().sum(2)
    patches = torch.cat([p.float() for p in samples.patches])
    outputs = torch.cat([p.float() for p in samples.patch_outputs])
    patches = patches - patches.mean(0)
    covariance = torch.einsum("nia,nib->iab", patches, patches) / len(patches)
    return torch.einsum("oia,iab,oib->oi", weight, covariance, weight) / outputs.var(0).clamp(min=1e-12).unsqueeze(1)


def _permute_samples(samples, name, channels: Channels, orders) -> SiteSamples:
    ins = outs = None
    for index, use in enumerate(channels.uses):
        if use.name == name and use.kind == CONV_INPUT: ins = use_order(channels, index, orders)
        if use.name == name and use.kind == CONV_OUTPUT: outs = use_order(channels, index, orders)
    return replace(samples, patches=[p[:, ins] for p in samples.patches], patch_outputs=[p[:, outs] for p in samples.patch_outputs],
      outputs=[p[:, outs] for p in samples.outputs], sums=[p[:, outs] for p in samples.sums])


def _teacher_error(site, samples) -> float:
    moments = GroupedMoments()
    for p, o in zip(samples.patches, samples.patch_outputs):
        rows = row_channels(o.shape[1], site.groups, site.shuffle)
        moments.update(p.reshape(len(p), site.groups, -1), o[:, rows].reshape(len(p), site.groups, -1))
    return float(moments.fit(ridge=0.01).error.mean())
