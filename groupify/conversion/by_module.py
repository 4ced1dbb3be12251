"""Fit a model that cannot be traced: one pass of the dense model, convs caught by hooks."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from groupify.conversion.site_fit import FitOptions, SiteFit, Target, fit_site
from groupify.graph.operations import CONVS
from groupify.stats.samples import SampleBudget, SiteSampler
from groupify.structures import SiteRecipe


def fit_by_module(
    student: nn.Module,
    dense: nn.Module,
    batches: Sequence[Tensor],
    sites: Mapping[str, SiteRecipe],
    budget: SampleBudget,
    options: FitOptions,
    *,
    seed: int,
    progress: bool = False,
    keep: Container[nn.Module] = (),
) -> tuple[SiteFit, ...]:
    """Fit each conv on the dense model's inputs, then refresh the student's batch norms; in place.

    A conv that no image reaches keeps its truncated weights, and is not in the result.

    Args:
        student: the converted model.
        dense: the dense model.
        batches: calibration images.
        sites: the converted convs by name.
        budget: how many output positions are sampled.
        options: ridge and prior; what needs a graph is left out.
        seed: seed of the positions.
        progress: show a bar on stderr.
        keep: batch norms of the student that are not refreshed.
    """
    sampler = SiteSampler({name: site.groups for name, site in sites.items()}, budget, batches, seed)
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(module, CONVS)
            if output.numel():
                sampler.sample(name, module, inputs[0], output)

        return hook

    for name in sites:
        handles.append(dense.get_submodule(name).register_forward_hook(watch(name)))
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc="dense model", disable=None if progress else True, leave=False):
                sampler.start_batch()
                dense(batch)
    finally:
        for handle in handles:
            handle.remove()
    fits = []
    with torch.no_grad():
        for name, site in sites.items():
            conv = dense.get_submodule(name)
            assert isinstance(conv, CONVS)
            samples = sampler.samples[name]
            if not samples.patches:
                continue
            inputs = [patches.float() for patches in samples.patches]
            targets = [Target(outputs.float()) for outputs in samples.patch_outputs]
            fits.append(fit_site(student.get_submodule(name), conv, site, inputs, targets, None, options))
        if options.refresh_batch_norm:
            refresh_batch_norms(student, batches, keep=keep)
    return tuple(fits)


def refresh_batch_norms(
    model: nn.Module, batches: Sequence[Tensor], *, keep: Container[nn.Module] = ()
) -> None:
    """Replace the statistics of every batch norm by their average over the batches, in place.

    Those in ``keep``, and those that no batch reaches, stay as they are.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and m not in keep
    ]
    statistics = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            if len(batch) > 1:
                model(batch)
    for norm, (training, momentum), buffers in zip(norms, before, statistics, strict=True):
        norm.momentum = momentum
        norm.train(training)
        if norm.num_batches_tracked == 0:
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
