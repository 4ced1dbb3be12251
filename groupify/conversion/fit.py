"""Fit the grouped convs of a student to a dense teacher, in the order in which they run.

Each conv is fitted by least squares from what the already converted student feeds it to what the
teacher computed at the same place, so that every layer also makes good for the error upstream; the
asymmetric reconstruction of Zhang, Zou, He and Sun (2015). Where the output is one term of a
residual sum, the target also holds what the other term of the student is off by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from groupify.conversion.moments import GroupedMoments
from groupify.conversion.sampling import compact, input_patches, pick
from groupify.conversion.surgery import GROUPED, SiteRecipe, row_channels
from groupify.conversion.teacher import SiteSamples
from groupify.graph.execute import BatchedRun


@dataclass(frozen=True)
class SiteFit:
    """How well one conv was fitted.

    Attributes:
        name: qualified module name.
        error: mean squared error ÷ variance of the target, over all outputs.
        samples: number of output positions that the fit saw.
        inputs: number of inputs of each group, in·kh·kw / groups.
    """

    name: str
    error: float
    samples: int
    inputs: int


@dataclass(frozen=True)
class FitOptions:
    """What the fit does.

    Attributes:
        ridge: ridge strength as a multiple of the mean input variance.
        keep_prior: whether the ridge draws towards the dense blocks instead of towards zero.
        compensate_residual: whether a conv in front of a residual sum also makes good for the error
            of the other term.
        in_order: whether a conv is fitted on the student's inputs; else on the teacher's.
        refresh_batch_norm: whether batch norms behind converted convs get new statistics.
    """

    ridge: float = 0.01
    keep_prior: bool = False
    compensate_residual: bool = True
    in_order: bool = True
    refresh_batch_norm: bool = True


def fit_student(
    student: fx.GraphModule,
    dense: nn.Module,
    batches: Sequence[Tensor],
    sites: Mapping[str, SiteRecipe],
    samples: Mapping[str, SiteSamples],
    sums: Mapping[str, str],
    options: FitOptions,
    *,
    progress: bool = False,
) -> dict[str, SiteFit]:
    """Fit all sites of ``student`` in place.

    Args:
        student: traced model with grouped convs (its weights are overwritten).
        dense: the dense model with the same channel order.
        batches: calibration images, the same as the teacher saw.
        sites: the converted sites by name.
        samples: what the teacher computed, in the student's channel order.
        sums: site → name of the fx node of the residual sum that it feeds.
        options: what to do.
        progress: show a bar on stderr.
    """
    fitter = _Fitter(student, dense, batches, sites, samples, sums, options)
    with torch.no_grad():
        nodes = list(student.graph.nodes)
        for node in tqdm(nodes, desc="fit", disable=None if progress else True, leave=False):
            fitter.process(node)
    return fitter.fits


class _Fitter:
    def __init__(
        self,
        student: fx.GraphModule,
        dense: nn.Module,
        batches: Sequence[Tensor],
        sites: Mapping[str, SiteRecipe],
        samples: Mapping[str, SiteSamples],
        sums: Mapping[str, str],
        options: FitOptions,
    ) -> None:
        self._student = student
        self._dense = dense
        self._sites = sites
        self._samples = samples
        self._sums = sums
        self._options = options
        self._run = BatchedRun(student, batches, compact)
        self._nodes = {node.name: node for node in student.graph.nodes}
        self._started: set[fx.Node] = set()
        self._changed: set[fx.Node] = set()
        self.fits: dict[str, SiteFit] = {}

    def process(self, node: fx.Node) -> None:
        """Fit the node if it is a site, and run it."""
        if self._run.done(node) or node in self._started:
            return
        self._started.add(node)
        name = str(node.target)
        is_site = node.op == "call_module" and name in self._sites
        if is_site and name not in self.fits:
            self._fit(node, name)
        if is_site or any(source in self._changed for source in node.all_input_nodes):
            self._changed.add(node)
            if self._options.refresh_batch_norm and node.op == "call_module":
                module = self._student.get_submodule(name)
                if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                    self._refresh(module, node.all_input_nodes[0])
        self._run.run(node)

    # one site ----------------------------------------------------------------------------------

    def _fit(self, node: fx.Node, name: str) -> None:
        site, samples = self._sites[name], self._samples[name]
        dense_conv = self._dense.get_submodule(name)
        assert isinstance(dense_conv, nn.Conv2d)
        norm = self._batch_norm_behind(node)
        other = self._other_term(node, name)
        targets = [self._target(samples, call, norm, other) for call in range(len(samples.positions))]
        inputs = [self._patches(node, dense_conv, samples, call) for call in range(len(samples.positions))]
        module = self._student.get_submodule(name)
        self.fits[name] = fit_site(module, dense_conv, site, inputs, targets, norm, self._options)

    def _patches(self, node: fx.Node, conv: nn.Conv2d, samples: SiteSamples, call: int) -> Tensor:
        """Input patches of one batch, shape (n, I, kh·kw)."""
        if not self._options.in_order or samples.calls > 1:
            # A conv that runs several times: its later inputs do not exist yet, so the teacher's must do.
            return samples.patches[call].float()
        inputs = self._run.value(node.all_input_nodes[0], call)
        return input_patches(inputs, conv, samples.positions[call])

    def _target(
        self, samples: SiteSamples, call: int, norm: nn.BatchNorm2d | None, other: fx.Node | None
    ) -> Tensor:
        """What the conv should output at the sampled positions of one batch, shape (n, O)."""
        if not self._options.in_order or samples.calls > 1:
            return samples.patch_outputs[call].float()
        outputs = samples.outputs[call].float()
        if other is None:
            return outputs
        wanted = samples.sums[call].float() - pick(self._run.value(other, call), samples.positions[call])
        if norm is None:
            return wanted
        scale, shift = _affine(norm)
        usable = scale.abs() > 1e-3 * scale.abs().amax()
        return torch.where(usable, (wanted - shift) / torch.where(usable, scale, 1.0), outputs)

    def _other_term(self, node: fx.Node, name: str) -> fx.Node | None:
        """The other term of the residual sum behind a site, run first if it can be."""
        if name not in self._sums or not self._options.compensate_residual or not self._samples[name].sums:
            return None
        total = self._nodes[self._sums[name]]
        own = next(source for source in total.all_input_nodes if self._reaches(node, source))
        other: fx.Node = next(source for source in total.all_input_nodes if source is not own)
        needed = self._run.requirements(other)
        if any(requirement in self._started for requirement in needed):
            return None  # this site is being waited for by the other term
        for requirement in needed:
            self.process(requirement)
        return other

    @staticmethod
    def _reaches(node: fx.Node, target: fx.Node) -> bool:
        return target is node or target in node.users

    def _batch_norm_behind(self, node: fx.Node) -> nn.BatchNorm2d | None:
        if len(node.users) != 1:
            return None
        reader = next(iter(node.users))
        if reader.op != "call_module":
            return None
        module = self._student.get_submodule(str(reader.target))
        return module if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None else None

    def _refresh(self, norm: nn.BatchNorm2d, source: fx.Node) -> None:
        """Set the statistics of a batch norm to those of the student's own activations."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        count, total = 0, torch.zeros_like(norm.running_mean, dtype=torch.float64)
        squares = torch.zeros_like(total)
        shift = norm.running_mean.reshape(1, -1, 1, 1)
        for batch in range(self._run.batch_count):
            values = self._run.value(source, batch) - shift
            count += values.numel() // values.shape[1]
            total += values.sum((0, 2, 3))
            squares += values.square().sum((0, 2, 3))
        if count < 2:
            return
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0) * count / (count - 1)
        norm.running_mean.add_(mean)
        norm.running_var.copy_(variance)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift that a batch norm applies in inference, shape (C,) each."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if not norm.affine:
        return scale, -norm.running_mean * scale
    scale = scale * norm.weight
    return scale, norm.bias - norm.running_mean * scale


def fit_site(
    module: nn.Module,
    dense_conv: nn.Conv2d,
    site: SiteRecipe,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    norm: nn.BatchNorm2d | None,
    options: FitOptions,
) -> SiteFit:
    """Fit the replacement of one conv in place.

    Args:
        module: the replacement.
        dense_conv: the conv that it replaces.
        site: how it is replaced.
        inputs: input patches, one tensor of shape (n, I, kh·kw) for each batch.
        targets: what the conv should output there, shape (n, O).
        norm: the batch norm behind it, into whose running mean the bias goes where the conv has none.
        options: what to do.
    """
    if site.kind == GROUPED:
        assert isinstance(module, nn.Conv2d)
        bias, error, count = _fit_grouped(module, site, inputs, targets, norm is not None, options)
        last, channels = module, row_channels(len(bias), site.groups, site.shuffle)
    else:
        grouped, pointwise = module.get_submodule("grouped"), module.get_submodule("pointwise")
        assert isinstance(grouped, nn.Conv2d)
        assert isinstance(pointwise, nn.Conv2d)
        bias, error, count = _fit_grouped_pointwise(
            grouped, pointwise, dense_conv, site.groups, inputs, targets, norm is not None, options
        )
        last, channels = pointwise, torch.arange(len(bias))
    if last.bias is not None:
        last.bias.copy_(bias)
    elif norm is not None and norm.running_mean is not None:
        of_channel = torch.empty_like(bias)
        of_channel[channels] = bias
        norm.running_mean.sub_(of_channel)
    return SiteFit(site.name, error, count, dense_conv.weight[0].numel() // site.groups)


def _fit_grouped(
    module: nn.Conv2d,
    site: SiteRecipe,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    has_norm: bool,
    options: FitOptions,
) -> tuple[Tensor, float, int]:
    groups = site.groups
    rows = row_channels(module.out_channels, groups, site.shuffle)
    moments = GroupedMoments(centred=has_norm or module.bias is not None)
    for patches, outputs in zip(inputs, targets, strict=True):
        count = len(patches)
        moments.update(patches.reshape(count, groups, -1), outputs[:, rows].reshape(count, groups, -1))
    shape = (groups, module.out_channels // groups, -1)
    prior = module.weight.reshape(shape) if options.keep_prior else None
    result = moments.fit(ridge=options.ridge, prior=prior)
    module.weight.copy_(result.weight.reshape(module.weight.shape))
    return result.bias.reshape(-1).to(module.weight.dtype), float(result.error.mean()), moments.count


def _fit_grouped_pointwise(
    grouped: nn.Conv2d,
    pointwise: nn.Conv2d,
    dense_conv: nn.Conv2d,
    groups: int,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    has_norm: bool,
    options: FitOptions,
) -> tuple[Tensor, float, int]:
    """Principal output directions of each input group, then a pointwise conv fitted on top.

    The best rank-r map of group g's share ``W_g u_g`` of the output is its projection on the first
    r eigenvectors U of ``W_g Cov(u_g) W_gᵀ``, so the grouped conv holds ``Uᵀ W_g``.
    """
    out_channels = dense_conv.out_channels
    rank = out_channels // groups
    weight = dense_conv.weight.reshape(out_channels, groups, -1).transpose(0, 1).double()  # (G, O, D)
    covariance = GroupedMoments()
    for patches in inputs:
        blocks = patches.reshape(len(patches), groups, -1)
        covariance.update(blocks, blocks[:, :, :1])
    mean = covariance.input_sum / covariance.count
    cov = covariance.input_input / covariance.count - mean.unsqueeze(2) * mean.unsqueeze(1)
    _, vectors = torch.linalg.eigh(weight @ cov @ weight.transpose(1, 2))
    basis = vectors[:, :, -rank:].transpose(1, 2) @ weight  # (G, r, D)
    grouped.weight.copy_(basis.reshape(grouped.weight.shape))
    kernel = basis.float()
    moments = GroupedMoments(centred=has_norm or pointwise.bias is not None)
    for patches, outputs in zip(inputs, targets, strict=True):
        blocks = patches.reshape(len(patches), groups, -1)
        features = torch.einsum("grd,ngd->ngr", kernel, blocks).reshape(len(patches), 1, -1)
        moments.update(features, outputs.unsqueeze(1))
    result = moments.fit(ridge=options.ridge)
    pointwise.weight.copy_(result.weight.reshape(pointwise.weight.shape))
    return result.bias.reshape(-1).to(pointwise.weight.dtype), float(result.error.mean()), moments.count
