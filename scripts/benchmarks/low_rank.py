"""Low-rank rivals: spatial SVD and Tucker-2, with data, chosen ranks and groupify's own fit of all factors.

Spatial SVD: k×k ≈ k×1 then 1×k (Jaderberg, Vedaldi and Zisserman, 2014). Tucker-2: 1×1, then k×k on fewer
channels, then 1×1 (Kim, Park, Yoo, Choi, Yang and Shin, 2016). Of a 1×1 conv both are the low rank. The
ranks of all layers are chosen together, greedily, as in Zhang, Zou, He and Sun (2015): the product over the
layers of the energy kept, at a given number of MACs. Then all factors are fitted as groupify fits its own:
together, in order, on the student's own inputs, with ReLU-aware targets, residual compensation, fresh batch
norms and dense layers fitted again. For that Tucker-2 is the structure (R, 1, S), and spatial SVD (R, 1, –)
of the conv that ``spatial`` makes of it. So the rivals differ from groupify in the structure alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from groupify.conversion.conversion import Calibration
from groupify.conversion.fit import Clock
from groupify.conversion.in_order import convert_in_order
from groupify.conversion.reconstruct import ReconstructionOptions, reconstruct
from groupify.conversion.surgery import conv_shape
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.model_graph import ModelGraph
from groupify.graph.neighbours import only_reader
from groupify.stats.samples import SampleBudget, Sampling, SiteSamples, observe_teacher
from groupify.structures import SiteRecipe, Structure
from scripts.benchmarks.spatial import check_spatial, in_columns, lay_out_columns, merge_columns

# Sampled as a conv of two groups is: that keeps input patches, and more positions than any factor has inputs.
_SAMPLED_AS = 2
_CUT = 1e-6  # of the mean eigenvalue: what is below it is noise, and whitening would blow it up
SPATIAL_SVD, TUCKER_2 = "spatial SVD", "Tucker-2"


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

    def structure(self, ranks: Sequence[int]) -> Structure:
        """What the conv becomes; of spatial SVD, what its conv behind the columns becomes."""


class SpatialSVD:
    """(kh×1, I → R), then (1×kw, R → O); of a 1×1 conv the low rank."""

    def __init__(self, conv: nn.Conv2d, size: Size, samples: SiteSamples, scale: Tensor) -> None:
        self._conv, self._size = conv, size
        height, width = conv.kernel_size
        patches = torch.cat([part.float() for part in samples.patches])  # (n, I, kh·kw)
        columns = patches.unflatten(2, (height, width)).permute(0, 3, 1, 2).flatten(0, 1).flatten(1)
        matrix = conv.weight.double().permute(1, 2, 3, 0).flatten(0, 1)  # (I·kh, kw, O)
        self._root, self._scale = _root(_covariance(columns)), scale
        weighted = self._root @ (matrix * scale).flatten(1)
        self.energies: tuple[Tensor, ...] = (torch.linalg.svdvals(weighted).square(),)

    def macs(self, ranks: Sequence[int]) -> int:
        """MACs of the factors on one image."""
        conv, (rank,) = self._conv, ranks
        (height, width), outputs = conv.kernel_size, self._size.outputs
        # A reduce that is 1 wide takes the stride along the rows.
        between = outputs[0] * (outputs[1] if width == 1 else self._size.inputs[1])
        return rank * (
            conv.in_channels * height * between + conv.out_channels * width * outputs[0] * outputs[1]
        )

    def structure(self, ranks: Sequence[int]) -> Structure:
        """What the conv behind the columns becomes."""
        return Structure(ranks[0])

    def truncated(self, rank: int) -> Tensor:
        """Return the conv's weight with all but the largest singular values cut off, shape as its own."""
        conv = self._conv
        matrix = conv.weight.double().permute(1, 2, 3, 0).flatten(0, 1)
        left = torch.linalg.svd(self._root @ (matrix * self._scale).flatten(1), full_matrices=False)[0]
        left = left[:, :rank]
        kept = torch.linalg.solve(self._root, left @ (left.T @ (self._root @ matrix.flatten(1))))
        kept = kept.reshape(conv.in_channels, *conv.kernel_size, conv.out_channels)
        weight: Tensor = kept.permute(3, 0, 1, 2).to(conv.weight.dtype)
        return weight.contiguous()


class Tucker2:
    """(1×1, I → R), then (kh×kw, R → S), then (1×1, S → O); ``ranks`` are R and S."""

    def __init__(self, conv: nn.Conv2d, size: Size, samples: SiteSamples, scale: Tensor) -> None:
        self._shape, self._size = conv_shape(conv), size
        patches = torch.cat([part.float() for part in samples.patches])
        root = _root(_covariance(patches.transpose(1, 2).flatten(0, 1)))
        matrix = conv.weight.double().transpose(0, 1).flatten(2) * scale.reshape(1, -1, 1)  # (I, O, kh·kw)
        values = torch.linalg.svdvals(root @ matrix.flatten(1))
        outputs = torch.cat([part.float() for part in samples.outputs]) * scale.float()
        energies = torch.linalg.eigvalsh(_covariance(outputs))
        self.energies: tuple[Tensor, ...] = (values.square(), energies.flip(0).clamp(min=0))

    def macs(self, ranks: Sequence[int]) -> int:
        """MACs of the factors on one image."""
        before, after = (size[0] * size[1] for size in (self._size.inputs, self._size.outputs))
        return self.structure(ranks).macs(self._shape, before, after)

    def structure(self, ranks: Sequence[int]) -> Structure:
        """What the conv becomes; a basis of all channels would add nothing."""
        return Structure(ranks[0], 1, ranks[1]).canonical(self._shape)


STRUCTURES: dict[str, Callable[[nn.Conv2d, Size, SiteSamples, Tensor], Factors]] = {
    SPATIAL_SVD: SpatialSVD,
    TUCKER_2: Tucker2,
}


def factors_of(method: str, conv: nn.Conv2d, size: Size, samples: SiteSamples, scale: Tensor) -> Factors:
    """Return how a method factorises a conv.

    Args:
        method: a key of ``STRUCTURES``.
        conv: the conv.
        size: of its input and output.
        samples: what it reads and gives.
        scale: weight of each output's error, shape (O,).
    """
    made = SpatialSVD if _is_pointwise(conv) else STRUCTURES[method]
    return made(conv, size, samples, scale)


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
        best: tuple[float, str, list[int]] | None = None
        for name, one in factors.items():
            for index, rank in enumerate(ranks[name]):
                fewer = _cheaper(one, ranks[name], index, step)
                if fewer is None:
                    continue
                kept = sums[name][index]
                loss = float(torch.log(kept[rank - 1] / kept[fewer[index] - 1]))
                price = loss / (one.macs(ranks[name]) - one.macs(fewer))
                if best is None or price < best[0]:
                    best = price, name, fewer
        if best is None:
            break
        _, name, fewer = best
        before, previous = total(), ranks[name]
        ranks[name] = fewer
        if before - wanted < wanted - total():
            ranks[name] = previous
            break
    return {name: tuple(ranks[name]) for name, one in factors.items() if one.macs(ranks[name]) < dense[name]}


def _cheaper(factors: Factors, ranks: Sequence[int], index: int, step: int) -> list[int] | None:
    """Lower one rank until that saves MACs: a first step below all channels may cost a conv more."""
    fewer = [*ranks]
    while fewer[index] > step:
        fewer[index] -= step
        if factors.macs(fewer) < factors.macs(ranks):
            return fewer
    return None


def factorise(
    model: nn.Module,
    method: str,
    sites: dict[str, int],
    saved: int,
    calibration: Calibration,
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
        calibration: unlabelled images for the ranks and the fit, and what follows.
        step: ranks are multiples of it.
        seed: of the sampled positions.

    Raises:
        ConversionError: a site is no ``Conv2d`` of one group.
    """
    factors = site_factors(model, method, sites, calibration.images, seed=seed)
    ranks = choose_ranks(factors, sites, sum(sites.values()) - saved, step)
    structures = {name: factors[name].structure(chosen) for name, chosen in ranks.items()}
    return fit_structures(model, method, structures, calibration, seed=seed)


def site_factors(
    model: nn.Module, method: str, sites: Iterable[str], images: Tensor, *, seed: int = 0
) -> dict[str, Factors]:
    """Return how each site is factorised, from what it reads and gives in the dense model.

    Args:
        model: dense model, which can be exported as a whole, in float32.
        method: a key of ``STRUCTURES``.
        sites: names of convs.
        images: unlabelled, shape (N, C, H, W).
        seed: of the sampled positions.

    Raises:
        ConversionError: a site is no ``Conv2d`` of one group.
    """
    dense = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    return _factors(dense, _graph(dense, images), method, list(sites), images, seed)


def fit_structures(
    model: nn.Module,
    method: str,
    structures: Mapping[str, Structure],
    calibration: Calibration,
    *,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of ``model`` with the named convs factorised and fitted.

    Args:
        model: dense model, which can be exported as a whole, in float32.
        method: a key of ``STRUCTURES``.
        structures: what each conv becomes; of spatial SVD, what its conv behind the columns becomes.
        calibration: unlabelled images for the fit, and what follows.
        seed: of the sampled positions.

    Raises:
        ConversionError: a site is no ``Conv2d`` of one group.
    """
    dense = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    images, trained = calibration.images, calibration.reconstruction
    graph = _graph(dense, images)
    columns = [name for name in structures if method == SPATIAL_SVD and not _is_pointwise(_conv(dense, name))]
    recipes = {}
    for name, structure in structures.items():
        site = in_columns(name) if name in columns else name
        recipes[site] = SiteRecipe(site, structure)
    laid_out = lay_out_columns(dense, columns)
    # Blocks are trained when the columns are no more.
    found = convert_in_order(
        laid_out, _graph(laid_out, images), calibration.calls, recipes,
        replace(calibration, reconstruction=ReconstructionOptions()), seed=seed,
        clock=Clock(), progress=False,
    )  # fmt: skip
    student = merge_columns(found.student, columns).to(memory_format=torch.channels_last)
    if trained.steps:
        reconstruct(graph.on(student), graph, images, list(structures), trained, seed=seed)
    return student.to(memory_format=torch.contiguous_format)


def _graph(model: nn.Module, images: Tensor) -> ModelGraph:
    found = capture(model, Call((images[:2],))).graph
    assert found is not None
    return found


def _conv(model: nn.Module, name: str) -> nn.Conv2d:
    conv = model.get_submodule(name)
    check_spatial(name, conv)
    assert isinstance(conv, nn.Conv2d)
    return conv


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1)


def _factors(
    dense: nn.Module, graph: ModelGraph, method: str, sites: Sequence[str], images: Tensor, seed: int
) -> dict[str, Factors]:
    convs = {name: _conv(dense, name) for name in sites}
    batches = [Call((part,)).channels_last() for part in images.split(64)]
    sampled = dict.fromkeys(sites, Sampling(_SAMPLED_AS))
    samples = observe_teacher(graph, batches, sampled, {}, SampleBudget(), seed=seed)
    sizes, scales = _sizes(dense, sites, images[:1]), _batch_norm_scales(graph, dense, sites)
    with torch.no_grad():
        return {
            name: factors_of(method, conv, sizes[name], samples[name], scales[name])
            for name, conv in convs.items()
        }


def _root(covariance: Tensor) -> Tensor:
    """Square root of a covariance, with a least variance in every direction."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=_CUT * float(values.mean()))
    root: Tensor = vectors * values.sqrt() @ vectors.t()
    return root


def _covariance(rows: Tensor) -> Tensor:
    centred = (rows - rows.mean(0)).double()
    return centred.t() @ centred / len(rows)


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
