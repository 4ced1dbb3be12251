"""What each candidate of each conv would cost in accuracy.

For a classifier the loss of a candidate is the relative error of the conv's outputs that the best replacement
leaves, each output weighing as much as the class probabilities react to it (the diagonal F of their Fisher
information). What an expansion to second order says of a conv that is replaced alone, ``½ tr(F Cov(y − ŷ))``
nats, does not rank plans well (``scripts/benchmarks/ranking.py``): convs that look the most sensitive are the
early ones, and the fit of the later convs takes back much of what they did. So that sensitivity,
``½ tr(F Cov(y))`` for each unit of relative error, weighs little, by a small power of it: enough to tell a
conv that the classes hardly need.

For any other model, where some convs are read by many and others only at the end, the relative error of the
replacement counts times a measured sensitivity: what the model's outputs are off by where that conv alone is
replaced. The losses of several convs are taken to add up.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from groupify.conversion.clustering import SiteScore, cluster
from groupify.conversion.conversion import Calibration, convert
from groupify.data.calls import Inputs, model_inputs
from groupify.devices import device_of, with_float64
from groupify.errors import DataError, GroupifyWarning
from groupify.files import NumberCache, fingerprint
from groupify.graph.call import Call, as_call
from groupify.graph.capture import Captured, capture
from groupify.graph.channels import channel_classes
from groupify.graph.copying import copy_of
from groupify.graph.forward import run_once
from groupify.graph.model_graph import ModelGraph
from groupify.graph.permute import layer_orders
from groupify.graph.plain_layers import conv_of
from groupify.machine import chunks
from groupify.planning.layer_error import LayerMoments
from groupify.planning.output_sensitivity import IMAGES, graph_of, output_scales, output_sensitivities
from groupify.planning.structure_losses import SiteLosses
from groupify.scores import Judge
from groupify.stats.fisher import SiteStatistics, observe_sites
from groupify.stats.flow import data_score
from groupify.structures import Candidate, Choices
from groupify.tasks import CLASSES, describe_outputs, has_classes, task_of

_MEMORY = 2**31
_TINY = 1e-30
_DAMPED = 0.2  # power of the sensitivity: from 0 to 0.25 plans rank about as well, above it worse
_VERSION = "4"  # of what is measured: another one makes the cached numbers void

AUTO, ERRORS, FISHER, OUTPUTS, EXACT = "auto", "errors", "fisher", "outputs", "exact"

Orders = Mapping[str, tuple[Tensor | None, Tensor | None]]  # candidate → its input and output order


@dataclass(frozen=True)
class Sensitivity:
    """The loss of every candidate.

    Attributes:
        losses: by the key of the candidate, at least 0; leaving a conv as it is loses nothing.
        method: one line on how they were measured.
        powers: to which powers plans are to be tried that add the losses up; one where they rank plans well.
    """

    losses: Mapping[str, float]
    method: str
    powers: tuple[float, ...] = (1.0, 0.5)

    def loss(self, candidate: Candidate) -> float:
        """Return the loss of one candidate."""
        return self.losses[candidate.key] if candidate.site.converted else 0.0


def measure_sensitivity(
    model: nn.Module,
    choices: Choices,
    images: Tensor,
    *,
    of: str = AUTO,
    inputs: Inputs | None = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = False,
    memory: int = _MEMORY,
    captured: Captured | None = None,
    task: str = AUTO,
) -> Sensitivity:
    """Measure the loss of every candidate from one pass over unlabelled images.

    The pass gives the moments of what every conv reads and, for a classifier, the Fisher information of what
    it computes; all structures follow from these by least squares. For other models each conv is then
    replaced alone, and the outputs of a few images are compared. Models whose moments take more than
    ``memory`` are read in several passes. What is finished is kept, so that an interrupted run goes on.

    Args:
        model: the dense model; left untouched.
        choices: what may become of each conv.
        images: shape (N, C, H, W), preprocessed as for inference.
        of: ``"errors"``: relative errors of the convs, hardly weighted; ``"fisher"``: weighted by the Fisher
            information of class scores; ``"outputs"``: times the measured sensitivity of all outputs;
            ``"auto"``: errors where the task is classes, else outputs.
        inputs: a batch of images → what the model is called with; None = the images.
        seed: seed of the sampled positions and directions.
        cache: folder to keep the numbers in; None = nowhere.
        progress: show a bar on stderr.
        memory: bytes of moments held at the same time.
        captured: what capturing the graph of the model found, with two examples; None = capture it.
        task: what the model is taken for, see :func:`groupify.tasks.task_of`.

    Raises:
        SpecError: the outputs are not what the task says.
        DataError: no images, or Fisher information is asked for where there are no class scores.
        ConversionError: activations are NaN or infinite.

    Warns:
        GroupifyWarning: the model runs without gradients; then all outputs of a conv weigh the same.
    """
    if len(images) == 0:
        raise DataError("no images to measure the sensitivity on; expected at least one")
    convs = choices.open_sites
    dense = copy_of(model).float().eval().requires_grad_(False)
    work = _Measurement(dense, choices, images.float(), inputs, seed, progress, of, captured, task)
    store = _store(cache, f"{_key(model, images, inputs, seed)}-{work.measured}")
    missing = [options for options in convs if any(c.key not in store.numbers for c in options[1:])]
    with torch.random.fork_rng(devices=[]):
        for chunk in chunks(missing, lambda options: _moment_bytes(dense, options), memory):
            work.observe([options[0].site.name for options in missing], chunk)
            found: list[dict[str, float]] = []
            for options in tqdm(chunk, desc="errors", disable=None if progress else True, leave=False):
                found.append(work.losses(options))
                if work.of != OUTPUTS:
                    store.add(found[-1])
            if work.of == OUTPUTS:
                store.add(work.of_outputs(chunk, found))
    losses = {c.key: store.numbers[c.key] for options in convs for c in options[1:]}
    powers = (1.0,) if work.of == ERRORS else Sensitivity.powers
    return Sensitivity(losses, f"{work.method}, {len(images)} unlabelled images", powers)


def weight_sensitivity(
    model: nn.Module,
    choices: Choices,
    *,
    seed: int = 0,
    progress: bool = False,
    captured: Captured | None = None,
) -> Sensitivity:
    """Predict the losses from the weights alone: the share of each conv that its best replacement lacks.

    All inputs count as alike and independent, and all convs as equally important.
    """
    dense = copy_of(model).float().eval()
    convs = choices.open_sites
    names = [options[0].site.name for options in convs]
    device = with_float64(device_of(dense))
    weights = {
        n: dense.get_submodule(n).get_parameter("weight").detach().flatten(2).to(device) for n in names
    }
    scores = {name: weight.square().sum(2) for name, weight in weights.items()}
    example = as_call(choices.example, dense).floats(Tensor.float)
    captured = captured or capture(dense, example)
    orders = _channel_orders(captured, choices, example, scores, seed)
    losses: dict[str, float] = {}
    for options in tqdm(convs, desc="errors", disable=None if progress else True, leave=False):
        weight, groups = weights[options[0].site.name], options[0].site.groups_before
        covariance = torch.eye(weight[0].numel(), device=weight.device)
        losses |= _site_losses(dense, choices, options, covariance.expand(groups, -1, -1), None).relative(
            options
        )
        others = [candidate for candidate in options[1:] if candidate.key not in losses]
        layer = LayerMoments(weight, covariance) if others else None
        for candidate in others:
            assert layer is not None
            recipe = candidate.site.recipe
            losses[candidate.key] = layer.error(recipe, *orders.get(candidate.key, (None, None))).relative
    return Sensitivity(losses, "from the weights alone")


def exact_sensitivity(
    model: nn.Module,
    choices: Choices,
    images: Tensor,
    held_out: Tensor,
    *,
    inputs: Inputs | None = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Convert every candidate of every conv alone and measure the divergence of the outputs.

    Args:
        model: the dense model; left untouched.
        choices: what may become of each conv.
        images: to fit on, shape (N, C, H, W).
        held_out: to measure on.
        inputs, seed, cache, progress: as for ``measure_sensitivity``.
    """
    store = _store(cache, fingerprint(("exact",), (held_out,)) + _key(model, images, inputs, seed))
    judge = Judge(model, held_out, inputs=inputs)
    numbers = range(len(choices.sites))
    plans = {
        candidate.key: choices.plan([index if other == number else 0 for other in numbers])
        for number, options in enumerate(choices.sites)
        for index, candidate in enumerate(options)
        if candidate.site.converted
    }
    for key, plan in tqdm(plans.items(), desc="exact", disable=None if progress else True, leave=False):
        if key not in store.numbers:
            converted = convert(model, plan, Calibration(images, inputs=inputs), seed=seed).model
            store.add({key: max(0.0, judge.judge(converted).divergence)})
    return Sensitivity(
        {key: store.numbers[key] for key in plans},
        f"each candidate converted alone, {len(images)} unlabelled images, {len(held_out)} held out",
    )


def _store(cache: Path | None, key: str) -> NumberCache:
    return NumberCache(None if cache is None else cache / f"sensitivity-{key}.json")


def _key(model: nn.Module, images: Tensor, inputs: Inputs | None, seed: int) -> str:
    structure = repr(model)
    # A function has no fingerprint, but what it gives has.
    given = () if inputs is None else model_inputs(images, inputs).tensors
    return fingerprint((_VERSION, structure, str(seed)), (*model.state_dict().values(), images, *given))


def _moment_bytes(model: nn.Module, options: tuple[Candidate, ...]) -> int:
    """Memory of the input moments of one conv."""
    conv = conv_of(model, options[0].site.name)
    return 8 * conv.groups * conv.weight[0].numel() ** 2


def _site_losses(
    dense: nn.Module,
    choices: Choices,
    options: Sequence[Candidate],
    covariance: Tensor,
    scale: Tensor | None,
) -> SiteLosses:
    name = options[0].site.name
    return SiteLosses(conv_of(dense, name), choices.observed[name], choices.rules, covariance, scale)


class _Measurement:
    """The passes over the images and what is computed from them.

    Attributes:
        of: how losses are measured; no longer "auto".
        measured: what the numbers are kept under.
        method: one line on that.
    """

    def __init__(
        self,
        dense: nn.Module,
        choices: Choices,
        images: Tensor,
        inputs: Inputs | None,
        seed: int,
        progress: bool,
        of: str,
        captured: Captured | None,
        task: str,
    ) -> None:
        self._dense = dense
        self._known = captured
        self._inputs = inputs
        self._choices = choices
        self._images = images
        self._seed = seed
        self._progress = progress
        self._statistics: dict[str, SiteStatistics] = {}
        self._orders: Orders | None = None
        self._trials: dict[str, Tensor] = {}
        outputs = run_once(dense, self._call(images[:1]))
        self._classes = task_of(outputs, task) == CLASSES
        if of == FISHER and not self._classes:
            raise DataError(
                f"Fisher information is that of class scores (N, K), and the model's outputs are "
                f"{describe_outputs(outputs)}: take the sensitivity {OUTPUTS!r}"
            )
        self.of = of if of != AUTO else ERRORS if self._classes else OUTPUTS
        # As it was called before there were tasks, unless the task is another one than the outputs say.
        self.measured = self.of if self._classes == has_classes(outputs) else f"{self.of}-of-outputs"
        self.method = {
            ERRORS: "relative errors of the fitted convs, damped by Fisher information",
            FISHER: "fitted error weighted by Fisher information",
            OUTPUTS: "fitted error times the measured sensitivity of the outputs "
            f"({describe_outputs(outputs)})",
        }[self.of]

    def _call(self, images: Tensor) -> Call:
        return (Call((images,)) if self._inputs is None else model_inputs(images, self._inputs)).on(
            self._dense
        )

    def observe(self, names: Sequence[str], chunk: Sequence[tuple[Candidate, ...]]) -> None:
        """Take the statistics of one chunk of convs; in the first pass, the channel orders of all."""
        whole = [options[0].site.name for options in chunk]
        first = self._orders is None
        every = [options[0].site.name for options in self._choices.open_sites]
        try:
            self._statistics = self._pass(every if first else whole, whole, backward=self._backward)
        except DataError as problem:
            warnings.warn(
                f"{problem}; all outputs of a conv weigh the same instead", GroupifyWarning, stacklevel=4
            )
            self._statistics = self._pass(every if first else whole, whole, backward=False)
        if self._orders is None:
            scores = {
                name: _score(self._weight(name), found)
                for name, found in self._statistics.items()
                if conv_of(self._dense, name).groups == 1
            }
            self._orders = _channel_orders(
                self._captured, self._choices, self._call(self._images[:2]), scores, self._seed
            )

    def _pass(
        self, names: Sequence[str], whole: Sequence[str], *, backward: bool
    ) -> dict[str, SiteStatistics]:
        return observe_sites(
            self._dense, self._images, names, whole, inputs=self._inputs, seed=self._seed,
            importance=backward, progress=self._progress,
        )  # fmt: skip

    def losses(self, options: Sequence[Candidate]) -> dict[str, float]:
        """Return the loss of each candidate of one conv that is observed at present; used up.

        Where all outputs are compared, the losses are relative errors as yet.
        """
        name = options[0].site.name
        statistics = self._statistics.pop(name)
        covariance = statistics.moments.input_covariance()
        importance, scale = statistics.importance, self._scales.get(name)
        if scale is not None:
            scale = scale.to(covariance.device)
        if importance is not None:
            scale = importance.diagonal().clamp(min=0).sqrt().float()
        site = _site_losses(self._dense, self._choices, options, covariance, scale)
        found, energy = site.relative(options), site.energy()
        if self.of == OUTPUTS:
            self._trials[name] = site.trial_weight()
        others = [candidate for candidate in options[1:] if candidate.key not in found]
        if others:
            own = self._weight(name)
            weights = torch.ones(len(own), device=own.device) if scale is None else scale.square()
            layer = LayerMoments(own, covariance[0])
            for candidate in others:
                inputs, outputs = (self._orders or {}).get(candidate.key, (None, None))
                error = layer.error(candidate.site.recipe, inputs, outputs)
                found[candidate.key] = error.weighted(weights.double().diag()) / max(energy, _TINY)
        if self.of == OUTPUTS or importance is None:
            return found
        weight = (energy / 2) ** (1.0 if self.of == FISHER else _DAMPED)
        return {key: weight * error for key, error in found.items()}

    def of_outputs(
        self, chunk: Sequence[tuple[Candidate, ...]], errors: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """Return the relative errors of convs times the sensitivities of the outputs to them."""
        few = self._images[torch.linspace(0, len(self._images) - 1, min(IMAGES, len(self._images))).long()]
        names = [options[0].site.name for options in chunk]
        found = output_sensitivities(
            self._dense, self._graph, [self._call(few)], {name: self._trials.pop(name) for name in names},
            self._scales, progress=self._progress,
        )  # fmt: skip
        return {
            key: found[name] * error
            for name, losses in zip(names, errors, strict=True)
            for key, error in losses.items()
        }

    @property
    def _backward(self) -> bool:
        return self._classes and self.of != OUTPUTS

    @functools.cached_property
    def _graph(self) -> ModelGraph | None:
        return graph_of(self._dense, self._call(self._images[:2]), self._captured)

    @functools.cached_property
    def _captured(self) -> Captured:
        call, known = self._call(self._images[:2]), self._known
        if known is not None and (known.graph is None or known.graph.accepts(call)):
            return known
        return capture(self._dense, call)  # this copy is in float32

    @functools.cached_property
    def _scales(self) -> dict[str, Tensor]:
        """How much the outputs of each conv weigh where class probabilities don't say so."""
        names = [options[0].site.name for options in self._choices.open_sites]
        return {} if self._backward else output_scales(self._graph, names)

    def _weight(self, name: str) -> Tensor:
        weight = self._dense.get_submodule(name).get_parameter("weight").flatten(2)
        return weight.to(with_float64(weight.device))


def _channel_orders(
    captured: Captured, choices: Choices, example: Call, scores: Mapping[str, Tensor], seed: int
) -> Orders:
    """Channel orders for each number of groups, as the conversion would choose them for all convs alike.

    The permutation classes are respected: convs that share their channels share the order.
    """
    if captured.graph is None:
        return {}
    channels = channel_classes(captured.graph, example)
    orders: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for chosen in choices.uniform.values():
        picked = [options[index] for options, index in zip(choices.sites, chosen, strict=True)]
        picked = [c for c in picked if c.site.converted and c.site.structure.minds_order(c.site.conv)]
        recipes = [candidate.site.recipe for candidate in picked]
        entries = [SiteScore(recipe, scores[recipe.name].cpu()) for recipe in recipes]
        found = cluster(channels, entries, restarts=0, seed=seed).orders
        for candidate, recipe in zip(picked, recipes, strict=True):
            orders.setdefault(candidate.key, layer_orders(recipe.name, channels, found))
    return orders


def _score(weight: Tensor, statistics: SiteStatistics) -> Tensor:
    inputs, taps = weight.shape[1:]
    blocks = statistics.moments.input_covariance()
    if len(blocks) < inputs:  # the whole, of which the blocks of each channel are a part
        blocks = blocks.reshape(inputs, taps, inputs, taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return data_score(weight, blocks)
