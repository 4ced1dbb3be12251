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

from groupify.conversion.moments import GroupedFit, GroupedMoments
from groupify.conversion.sampling import compact, input_patches, pick
from groupify.conversion.surgery import GROUPED, SiteRecipe, row_channels
from groupify.conversion.teacher import SiteSamples, is_relu
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
class Target:
    """What a layer should output at some positions.

    Attributes:
        outputs: shape (n, O).
        thresholds: the output at which the ReLU behind switches, shape (n, O); None without a ReLU.
        signs: +1 where the ReLU is off below the threshold, −1 where above, shape (O,).
    """

    outputs: Tensor
    thresholds: Tensor | None = None
    signs: Tensor | None = None

    def relaxed(self, predicted: Tensor) -> Tensor:
        """The outputs, but where the ReLU should be off, whatever of the prediction keeps it off."""
        if self.thresholds is None or self.signs is None:
            return self.outputs
        off = (self.outputs - self.thresholds) * self.signs <= 0
        limited = torch.minimum(predicted * self.signs, self.thresholds * self.signs) * self.signs
        return torch.where(off, limited, self.outputs)


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
        relu_iterations: how often the target of a conv in front of a ReLU is relaxed where the ReLU is
            off: there any value that keeps it off is as good (Zhang, Zou, He and Sun, 2015). 0 = never.
        refit_dense: whether the dense layers that remain behind converted convs are fitted again, so
            that they make good for the error upstream.
        refit_ridge: ridge strength of those; it draws towards their present weights.
        refit_max_inputs: dense layers with more inputs than this are left alone.
    """

    ridge: float = 0.01
    keep_prior: bool = False
    compensate_residual: bool = True
    in_order: bool = True
    refresh_batch_norm: bool = True
    relu_iterations: int = 5
    refit_dense: bool = True
    refit_ridge: float = 0.1
    refit_max_inputs: int = 4608


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
        self._aimed: set[fx.Node] = set()
        self.fits: dict[str, SiteFit] = {}

    def process(self, node: fx.Node) -> None:
        """Fit the node if it is a site, and run it."""
        if self._run.done(node) or node in self._started:
            return
        self._started.add(node)
        name = str(node.target)
        is_site = node.op == "call_module" and name in self._sites
        if is_site or any(source in self._changed for source in node.all_input_nodes):
            self._changed.add(node)
            refits = self._options.refit_dense and name in self._samples
            if node.op == "call_module" and name not in self.fits and (is_site or refits):
                self._fit(node, name)
            source = node.all_input_nodes[0] if node.all_input_nodes else None
            # Where the fit aimed at a ReLU's input, other statistics would move it off the target.
            if (
                self._options.refresh_batch_norm
                and node.op == "call_module"
                and source is not None
                and source not in self._aimed
            ):
                module = self._student.get_submodule(name)
                if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                    self._refresh(module, source)
        self._run.run(node)

    # one site ----------------------------------------------------------------------------------

    def _fit(self, node: fx.Node, name: str) -> None:
        samples = self._samples[name]
        dense_layer = self._dense.get_submodule(name)
        assert isinstance(dense_layer, (nn.Conv2d, nn.Linear))
        norm = self._batch_norm_behind(node)
        other = self._other_term(node, name)
        relu = self._options.relu_iterations > 0 and self._feeds_relu(node, norm, other)
        targets = [self._target(samples, call, norm, other, relu) for call in range(len(samples.positions))]
        if targets[0].thresholds is not None:
            self._aimed.add(node)
        inputs = [self._patches(node, dense_layer, samples, call) for call in range(len(samples.positions))]
        module, site = self._student.get_submodule(name), self._sites.get(name)
        if site is None:
            refit_layer(module, inputs, targets, norm, self._options)
        else:
            assert isinstance(dense_layer, nn.Conv2d)
            self.fits[name] = fit_site(module, dense_layer, site, inputs, targets, norm, self._options)

    def _patches(
        self, node: fx.Node, layer: nn.Conv2d | nn.Linear, samples: SiteSamples, call: int
    ) -> Tensor:
        """Input patches of one batch, shape (n, I, kh·kw)."""
        if not self._options.in_order or samples.calls > 1:
            # A conv that runs several times: its later inputs do not exist yet, so the teacher's must do.
            return samples.patches[call].float()
        inputs = self._run.value(node.all_input_nodes[0], call)
        return input_patches(inputs, layer, samples.positions[call])

    def _target(
        self,
        samples: SiteSamples,
        call: int,
        norm: nn.BatchNorm2d | None,
        other: fx.Node | None,
        relu: bool,
    ) -> Target:
        """What the conv should output at the sampled positions of one batch."""
        if not self._options.in_order or samples.calls > 1:
            return Target(samples.patch_outputs[call].float())
        outputs = samples.outputs[call].float()
        if other is None and not relu:
            return Target(outputs)
        # Behind the conv: y → scale·y + shift, plus the other term of a residual sum.
        scale, offset = torch.ones(outputs.shape[1]), torch.zeros(outputs.shape[1])
        if norm is not None:
            scale, offset = _affine(norm)
        usable = scale.abs() > 1e-3 * scale.abs().amax()
        scale = torch.where(usable, scale, 1.0)
        if other is not None:
            offset = offset + pick(self._run.value(other, call), samples.positions[call])
            outputs = torch.where(usable, (samples.sums[call].float() - offset) / scale, outputs)
        if not relu:
            return Target(outputs)
        return Target(outputs, (-offset / scale).expand(outputs.shape), torch.sign(scale))

    def _feeds_relu(self, node: fx.Node, norm: nn.BatchNorm2d | None, other: fx.Node | None) -> bool:
        """Whether a ReLU alone reads the output, behind its batch norm and residual sum."""
        last = node
        if norm is not None:
            last = next(iter(last.users))
        if other is not None:
            last = next(iter(last.users))
        reader = next(iter(last.users), None)
        return len(last.users) == 1 and reader is not None and is_relu(self._student, reader)

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
    targets: Sequence[Target],
    norm: nn.BatchNorm2d | None,
    options: FitOptions,
) -> SiteFit:
    """Fit the replacement of one conv in place.

    Args:
        module: the replacement.
        dense_conv: the conv that it replaces.
        site: how it is replaced.
        inputs: input patches, one tensor of shape (n, I, kh·kw) for each batch.
        targets: what the conv should output there.
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
    _set_bias(last, bias, norm, channels)
    return SiteFit(site.name, error, count, dense_conv.weight[0].numel() // site.groups)


def refit_layer(
    layer: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Target],
    norm: nn.BatchNorm2d | None,
    options: FitOptions,
) -> None:
    """Fit a dense conv or linear layer again in place, staying near its present weights.

    Args and shapes are those of ``fit_site``.
    """
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    prior = layer.weight.reshape(1, len(layer.weight), -1)
    rows, centred = torch.arange(len(layer.weight)), norm is not None or layer.bias is not None
    result, _ = _least_squares(inputs, targets, 1, rows, centred, options.refit_ridge, prior, options)
    layer.weight.copy_(result.weight.reshape(layer.weight.shape))
    bias = result.bias.reshape(-1).to(layer.weight.dtype)
    _set_bias(layer, bias, norm, torch.arange(len(bias)))


def _set_bias(
    layer: nn.Conv2d | nn.Linear, bias: Tensor, norm: nn.BatchNorm2d | None, channels: Tensor
) -> None:
    """Give a layer its bias (of output ``channels``), or fold it into the batch norm behind."""
    if layer.bias is not None:
        layer.bias.copy_(bias)
    elif norm is not None and norm.running_mean is not None:
        of_channel = torch.empty_like(bias)
        of_channel[channels] = bias
        norm.running_mean.sub_(of_channel)


def _fit_grouped(
    module: nn.Conv2d,
    site: SiteRecipe,
    inputs: Sequence[Tensor],
    targets: Sequence[Target],
    has_norm: bool,
    options: FitOptions,
) -> tuple[Tensor, float, int]:
    groups = site.groups
    rows = row_channels(module.out_channels, groups, site.shuffle)
    shape = (groups, module.out_channels // groups, -1)
    prior = module.weight.reshape(shape) if options.keep_prior else None
    centred = has_norm or module.bias is not None
    result, count = _least_squares(inputs, targets, groups, rows, centred, options.ridge, prior, options)
    module.weight.copy_(result.weight.reshape(module.weight.shape))
    return result.bias.reshape(-1).to(module.weight.dtype), float(result.error.mean()), count


def _least_squares(
    inputs: Sequence[Tensor],
    targets: Sequence[Target],
    groups: int,
    rows: Tensor,
    centred: bool,
    ridge: float,
    prior: Tensor | None,
    options: FitOptions,
) -> tuple[GroupedFit, int]:
    """Fit a grouped map, then relax the targets in front of a ReLU and fit again, a few times.

    Relaxing minimises the convex ``Σ_on (y − ŷ)² + Σ_off relu(ŷ)²`` by majorisation: each fit is to
    the targets that cost the present prediction the least.
    """
    moments = GroupedMoments(centred=centred)
    blocks = [patches.reshape(len(patches), groups, -1) for patches in inputs]

    def grouped(outputs: Tensor) -> Tensor:
        return outputs[:, rows].reshape(len(outputs), groups, -1)

    for block, target in zip(blocks, targets, strict=True):
        moments.update(block, grouped(target.outputs))
    result = moments.fit(ridge=ridge, prior=prior)
    if targets[0].thresholds is None:
        return result, moments.count
    back = torch.argsort(rows)
    for _ in range(options.relu_iterations):
        weight, bias = result.weight.float(), result.bias.float()

        def relaxed(block: Tensor, target: Target, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            predicted = torch.einsum("god,ngd->ngo", weight, block) + bias
            return grouped(target.relaxed(predicted.reshape(len(block), -1)[:, back]))

        moments.replace_outputs(
            (block, relaxed(block, target)) for block, target in zip(blocks, targets, strict=True)
        )
        result = moments.fit(ridge=ridge, prior=prior)
    return result, moments.count


def _fit_grouped_pointwise(
    grouped: nn.Conv2d,
    pointwise: nn.Conv2d,
    dense_conv: nn.Conv2d,
    groups: int,
    inputs: Sequence[Tensor],
    targets: Sequence[Target],
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
    features = [
        torch.einsum("grd,ngd->ngr", kernel, patches.reshape(len(patches), groups, -1)) for patches in inputs
    ]
    centred, every = has_norm or pointwise.bias is not None, torch.arange(out_channels)
    result, count = _least_squares(features, targets, 1, every, centred, options.ridge, None, options)
    pointwise.weight.copy_(result.weight.reshape(pointwise.weight.shape))
    return result.bias.reshape(-1).to(pointwise.weight.dtype), float(result.error.mean()), count
