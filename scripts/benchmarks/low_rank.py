"""Low-rank rivals: spatial SVD and Tucker-2, with data, chosen ranks and the same in-order fit as groupify.

Spatial SVD: k×k ≈ k×1 then 1×k (Jaderberg, Vedaldi and Zisserman, 2014). Tucker-2: 1×1, then k×k on fewer
channels, then 1×1 (Kim, Park, Yoo, Choi, Yang and Shin, 2016). Both are made from the responses rather than
the weights alone, and the ranks of all layers are chosen together, greedily, as in Zhang, Zou, He and Sun
(2015): the product over the layers of the energy kept, at a given number of MACs. The last factor (for
Tucker-2 also the core) is then fitted by ``groupify.conversion.fit`` like a grouped conv: in order, on the
student's own inputs, with ReLU-aware targets, residual compensation, fresh batch norms and dense layers
fitted again. So the rivals differ from groupify in the structure alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from groupify.conversion.fit import Clock, fit_student
from groupify.conversion.site_fit import FitOptions
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.model_graph import ModelGraph
from groupify.graph.neighbours import only_reader, refittable, residual_sums
from groupify.stats.samples import SampleBudget, Sampling, SiteSamples, observe_teacher
from groupify.structures import SiteRecipe, Structure

# Sampled as a conv of two groups is: that keeps input patches, and more positions than any factor has inputs.
_SAMPLED_AS = 2
_CUT = 1e-6  # of the mean eigenvalue: what is below it is noise, and whitening would blow it up


@dataclass(frozen=True)
class Size:
    """Input and output of one conv on one image: (height, width)."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]


class Factors(Protocol):
    """How one conv is factorised; ``ranks`` has one entry for each of the ``energies``."""

    @property
    def energies(self) -> tuple[Tensor, ...]:
        """What each rank adds, falling."""

    def macs(self, ranks: Sequence[int]) -> int:
        """MACs of the factors on one image."""

    def build(self, ranks: Sequence[int]) -> nn.Sequential:
        """The factors, from the weights."""

    def fitted(self, ranks: Sequence[int], samples: SiteSamples) -> dict[int, SiteSamples]:
        """Targets of the factors that are fitted, by their index."""


class SpatialSVD:
    """(kh×1, I → R), then (1×kw, R → O)."""

    def __init__(self, conv: nn.Conv2d, size: Size, samples: SiteSamples, scale: Tensor) -> None:
        self.conv, self.size = conv, size
        height, width = conv.kernel_size
        patches = torch.cat([part.float() for part in samples.patches])  # (n, I, kh·kw)
        columns = patches.unflatten(2, (height, width)).permute(0, 3, 1, 2).flatten(0, 1).flatten(1)
        root, inverse = _roots(_covariance(columns))
        matrix = conv.weight.double().permute(1, 2, 3, 0).flatten(0, 1)  # (I·kh, kw, O)
        weighted = root @ (matrix * scale).flatten(1)
        left, values, right = torch.linalg.svd(weighted, full_matrices=False)
        self._first = (inverse @ left).t()  # (R, I·kh)
        self._last = (values.unsqueeze(1) * right).unflatten(1, (width, -1)) / scale  # (R, kw, O)
        self.energies: tuple[Tensor, ...] = (values.square(),)

    def macs(self, ranks: Sequence[int]) -> int:
        """MACs of the factors on one image."""
        conv, (rank,) = self.conv, ranks
        first = conv.in_channels * conv.kernel_size[0] * self.size.outputs[0] * self.size.inputs[1]
        last = conv.out_channels * conv.kernel_size[1] * self.size.outputs[0] * self.size.outputs[1]
        return rank * (first + last)

    def build(self, ranks: Sequence[int]) -> nn.Sequential:
        """The factors, from the weights."""
        conv, (rank,) = self.conv, ranks
        height, width = conv.kernel_size
        first = nn.Conv2d(
            conv.in_channels, rank, (height, 1), (conv.stride[0], 1), (_padding(conv)[0], 0),
            (conv.dilation[0], 1), bias=False,
        )  # fmt: skip
        last = nn.Conv2d(
            rank, conv.out_channels, (1, width), (1, conv.stride[1]), (0, _padding(conv)[1]),
            (1, conv.dilation[1]), bias=conv.bias is not None,
        )  # fmt: skip
        with torch.no_grad():
            first.weight.copy_(self._first[:rank].reshape(first.weight.shape))
            last.weight.copy_(self._last[:rank].permute(2, 0, 1).unsqueeze(2))
            _copy_bias(last, conv)
        return nn.Sequential(first, last)

    def fitted(self, ranks: Sequence[int], samples: SiteSamples) -> dict[int, SiteSamples]:
        """Targets of the factors that are fitted, by their index."""
        return {1: samples}


class Tucker2:
    """(1×1, I → R), then (kh×kw, R → S), then (1×1, S → O); ``ranks`` are R and S."""

    def __init__(self, conv: nn.Conv2d, size: Size, samples: SiteSamples, scale: Tensor) -> None:
        self.conv, self.size = conv, size
        patches = torch.cat([part.float() for part in samples.patches])
        root, inverse = _roots(_covariance(patches.transpose(1, 2).flatten(0, 1)))
        matrix = conv.weight.double().transpose(0, 1).flatten(2) * scale.reshape(1, -1, 1)  # (I, O, kh·kw)
        left, values, _ = torch.linalg.svd(root @ matrix.flatten(1), full_matrices=False)
        self._first = (inverse @ left).t()  # (R, I)
        # Turns reduced inputs back into the channels that they stand for, transposed: (R, I).
        self._back: Tensor = left.t() @ root
        outputs = torch.cat([part.float() for part in samples.outputs]) * scale.float()
        energies, vectors = torch.linalg.eigh(_covariance(outputs))
        self._basis = vectors.flip(1)  # (O, S)
        self._scale = scale
        self.energies: tuple[Tensor, ...] = (values.square(), energies.flip(0).clamp(min=0))

    def macs(self, ranks: Sequence[int]) -> int:
        """MACs of the factors on one image."""
        conv, (first, second) = self.conv, ranks
        before = self.size.inputs[0] * self.size.inputs[1]
        after = self.size.outputs[0] * self.size.outputs[1]
        core = first * second * conv.kernel_size[0] * conv.kernel_size[1]
        return conv.in_channels * first * before + (core + second * conv.out_channels) * after

    def build(self, ranks: Sequence[int]) -> nn.Sequential:
        """The factors, from the weights."""
        conv, (first, second) = self.conv, ranks
        reduce = nn.Conv2d(conv.in_channels, first, 1, bias=False)
        kernel_size, stride, dilation = map(_pair, (conv.kernel_size, conv.stride, conv.dilation))
        core = nn.Conv2d(first, second, kernel_size, stride, _padding(conv), dilation)
        expand = nn.Conv2d(second, conv.out_channels, 1, bias=conv.bias is not None)
        basis = self._basis[:, :second]
        weight = conv.weight.double().flatten(2) * self._scale.reshape(-1, 1, 1)
        kernel = torch.einsum("os,oik,ri->srk", basis, weight, self._back[:first])
        with torch.no_grad():
            reduce.weight.copy_(self._first[:first].reshape(reduce.weight.shape))
            core.weight.copy_(kernel.reshape(core.weight.shape))
            nn.init.zeros_(core.bias)  # type: ignore[arg-type]
            expand.weight.copy_((basis / self._scale.unsqueeze(1)).reshape(expand.weight.shape))
            _copy_bias(expand, conv)
        return nn.Sequential(reduce, core, expand)

    def fitted(self, ranks: Sequence[int], samples: SiteSamples) -> dict[int, SiteSamples]:
        """Targets of the factors that are fitted, by their index."""
        projection = (self._basis[:, : ranks[1]] * self._scale.unsqueeze(1)).float()
        outputs = [part.float() @ projection for part in samples.outputs]
        core = SiteSamples(positions=list(samples.positions), outputs=outputs, calls=samples.calls)
        return {1: core, 2: samples}


STRUCTURES: dict[str, Callable[[nn.Conv2d, Size, SiteSamples, Tensor], Factors]] = {
    "spatial SVD": SpatialSVD,
    "Tucker-2": Tucker2,
}


def choose_ranks(
    factors: dict[str, Factors], dense: dict[str, int], wanted: int, step: int
) -> dict[str, tuple[int, ...]]:
    """Choose the ranks of all convs together; a conv that would not get cheaper is left out.

    Ranks begin full and fall by ``step``, each time the one that costs the least of the product of the
    energies for the MACs that it saves, until ``wanted`` MACs are reached as nearly as steps allow.

    Args:
        factors: how each conv is factorised.
        dense: MACs of each conv as it is.
        wanted: MACs of all of them together.
        step: ranks are multiples of it.
    """
    sums = {name: [energy.cumsum(0) for energy in one.energies] for name, one in factors.items()}
    ranks = {name: [len(energy) // step * step for energy in one.energies] for name, one in factors.items()}

    def total() -> int:
        return sum(min(dense[name], one.macs(ranks[name])) for name, one in factors.items())

    while total() > wanted:
        best: tuple[float, str, int] | None = None
        for name, one in factors.items():
            for index, rank in enumerate(ranks[name]):
                if rank <= step:
                    continue
                fewer = [*ranks[name]]
                fewer[index] -= step
                kept = sums[name][index]
                loss = float(torch.log(kept[rank - 1] / kept[rank - step - 1]))
                price = loss / (one.macs(ranks[name]) - one.macs(fewer))
                if best is None or price < best[0]:
                    best = price, name, index
        if best is None:
            break
        _, name, index = best
        before = total()
        ranks[name][index] -= step
        if before - wanted < wanted - total():
            ranks[name][index] += step
            break
    return {name: tuple(ranks[name]) for name, one in factors.items() if one.macs(ranks[name]) < dense[name]}


def factorise(
    model: nn.Module,
    method: str,
    sites: dict[str, int],
    saved: int,
    images: Tensor,
    *,
    step: int,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of ``model`` with the named convs factorised and fitted.

    Args:
        model: dense model, which can be exported as a whole, in float32.
        method: a key of ``STRUCTURES``.
        sites: MACs on one image of each conv that may be factorised, by name.
        saved: MACs to save, of all of these together.
        images: unlabelled images for the covariances and the fit, shape (N, C, H, W).
        step: ranks are multiples of it.
        seed: of the sampled positions.
    """
    dense = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    example = Call((images[:2],))
    traced = capture(dense, example).graph
    assert traced is not None
    batches = [Call((part,)).channels_last() for part in images.split(64)]
    options = FitOptions()
    sampled = dict.fromkeys(sites, Sampling(_SAMPLED_AS))
    refitted = refittable(traced, sites, options.refit_max_inputs)
    sampled |= dict.fromkeys(refitted, Sampling(1, patches=False))
    samples = observe_teacher(
        traced, batches, sampled, residual_sums(traced, sampled), SampleBudget(), seed=seed
    )
    sizes = _sizes(dense, sites, images[:1])
    scales = _batch_norm_scales(traced, dense, sites)
    with torch.no_grad():
        factors: dict[str, Factors] = {}
        for name in sites:
            conv = dense.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            factors[name] = STRUCTURES[method](conv, sizes[name], samples[name], scales[name])
    chosen = choose_ranks(factors, sites, sum(sites.values()) - saved, step)
    student, fitted = (
        copy.deepcopy(dense),
        {name: part for name, part in samples.items() if name not in chosen},
    )
    recipes = {}
    for name, ranks in chosen.items():
        parent, _, attribute = name.rpartition(".")
        setattr(student.get_submodule(parent), attribute, factors[name].build(ranks))
        for index, part in factors[name].fitted(ranks, samples[name]).items():
            recipes[f"{name}.{index}"] = SiteRecipe(f"{name}.{index}", Structure(groups=1))
            fitted[f"{name}.{index}"] = part
    student = student.eval().to(memory_format=torch.channels_last)
    graph = capture(student, example).graph
    assert graph is not None
    sums = {str(conv.target): total for conv, total in residual_sums(graph, fitted).items()}
    fit_student(graph, copy.deepcopy(student), batches, recipes, fitted, sums, options, clock=Clock())
    for name in chosen:
        _balance(student.get_submodule(name))
    return student.to(memory_format=torch.contiguous_format)


def _balance(factors: nn.Module) -> None:
    """Give each inner channel the same norm on both sides; else training would be ill-conditioned."""
    convs = [module for module in factors.children() if isinstance(module, nn.Conv2d)]
    for first, second in pairwise(convs):
        with torch.no_grad():
            out, into = (
                first.weight.flatten(1).norm(dim=1),
                second.weight.transpose(0, 1).flatten(1).norm(dim=1),
            )
            factor = torch.sqrt(into.clamp(min=1e-12) / out.clamp(min=1e-12))
            first.weight.mul_(factor.reshape(-1, 1, 1, 1))
            if first.bias is not None:
                first.bias.mul_(factor)
            second.weight.div_(factor.reshape(1, -1, 1, 1))


def _covariance(rows: Tensor) -> Tensor:
    centred = (rows - rows.mean(0)).double()
    return centred.t() @ centred / len(rows)


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of a covariance; directions without variance get none."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=_CUT * float(values.mean()))
    return vectors * values.sqrt() @ vectors.t(), vectors * values.rsqrt() @ vectors.t()


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(conv.padding, str)
    return _pair(conv.padding)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    height, width = values
    return int(height), int(width)


def _copy_bias(last: nn.Conv2d, conv: nn.Conv2d) -> None:
    if last.bias is not None and conv.bias is not None:
        last.bias.copy_(conv.bias)


def _sizes(model: nn.Module, sites: Sequence[str] | dict[str, int], image: Tensor) -> dict[str, Size]:
    found: dict[str, Size] = {}

    def note(name: str, inputs: Tensor, outputs: Tensor) -> None:
        found[name] = Size((inputs.shape[2], inputs.shape[3]), (outputs.shape[2], outputs.shape[3]))

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, inputs, outputs, name=name: note(name, inputs[0], outputs)
        )
        for name in sites
    ]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return found


def _batch_norm_scales(
    traced: ModelGraph, model: nn.Module, sites: Sequence[str] | dict[str, int]
) -> dict[str, Tensor]:
    """What the batch norm behind each conv multiplies its outputs by: how much an error in them weighs."""
    scales = {}
    for node in traced.graph.nodes:
        name = str(node.target)
        if node.op != "call_module" or name not in sites:
            continue
        scale = torch.ones(model.get_submodule(name).get_parameter("weight").shape[0], dtype=torch.float64)
        reader = only_reader(node)
        norm = None if reader is None else traced.norm(reader)
        if norm is not None:
            scale = torch.rsqrt(norm.running_var.double() + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight.detach().double().abs()
        scales[name] = scale.clamp(min=1e-3 * float(scale.amax()))
    return scales
