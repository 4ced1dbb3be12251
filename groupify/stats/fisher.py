"""One pass of the dense model over calibration images: what each conv reads, and how much the loss cares.

The importance of an output is the Fisher information of the dense model's own output distribution: the mean
of the squared gradients, ``F = E[g gᵀ]`` with g the gradient of the log-likelihood at the conv's output. No
labels are needed: with ``H = diag(p) − p pᵀ`` the curvature of the cross-entropy at the logits and
``L Lᵀ = H``, a backward pass from ``L ε`` with random signs ε gives an unbiased estimate; it varies less than
the one with a class drawn from p, which nearly always draws the class that teaches nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from groupify.data.calls import Inputs, model_inputs
from groupify.devices import with_float64
from groupify.errors import ConversionError, DataError
from groupify.graph.call import Call
from groupify.graph.plain_layers import CONVS, Conv
from groupify.stats.moments import InputMoments
from groupify.stats.output_metrics import OutputGradients, leaf, score_directions
from groupify.stats.positions import input_patches, sample_positions
from groupify.tasks import class_scores


@dataclass
class SiteStatistics:
    """What one pass shows of one conv.

    Attributes:
        moments: of the inputs of its groups; those of each channel apart where the whole was not asked for.
        importance: F for one image: summed over the positions of its output, averaged over the images;
            shape (O, O), float64. None where it was not asked for.
    """

    moments: InputMoments
    importance: Tensor | None


def observe_sites(
    model: nn.Module,
    images: Tensor,
    names: Sequence[str],
    whole: Sequence[str],
    *,
    inputs: Inputs | None = None,
    samples_per_input: float = 4.0,
    samples_minimum: int = 8192,
    batch_size: int = 50,
    seed: int = 0,
    importance: bool = True,
    progress: bool = False,
) -> dict[str, SiteStatistics]:
    """Run the dense model over the images, forward and backward, and add up moments and gradients.

    Args:
        model: dense model in inference mode; its parameters get no gradients.
        images: shape (N, C, H, W).
        names: the convs to look at.
        whole: those of them whose whole input covariance is wanted, D × D numbers for each of their groups.
        inputs: a batch of images → what the model is called with; None = the images.
        samples_per_input, samples_minimum: positions sampled for each of the D inputs, and at least.
        batch_size: images per step.
        seed: seed of the positions and signs.
        importance: whether to run backward at all.
        progress: show a bar on stderr.

    Raises:
        ConversionError: an output is NaN or infinite.
        DataError: the model's outputs are no class scores, or get no gradients.
    """
    work = _Pass(model, len(images), whole, samples_per_input, samples_minimum, seed, importance)
    handles = [
        model.get_submodule(name).register_forward_hook(work.hook(name), with_kwargs=True) for name in names
    ]
    try:
        batches = images.split(batch_size)
        for batch in tqdm(batches, desc="sensitivity", disable=None if progress else True, leave=False):
            work.run((Call((batch,)) if inputs is None else model_inputs(batch, inputs)).on(model))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: SiteStatistics(
            moments, work.importance[name] / work.seen if importance and name in work.importance else None
        )
        for name, moments in work.moments.items()
    }


class _Pass:
    def __init__(
        self,
        model: nn.Module,
        images: int,
        whole: Sequence[str],
        samples_per_input: float,
        samples_minimum: int,
        seed: int,
        backward: bool,
    ) -> None:
        self._model = model
        self._images = images
        self._whole = set(whole)
        self._per_input = samples_per_input
        self._minimum = samples_minimum
        self._generator = torch.Generator().manual_seed(seed)
        self._backward = backward
        self.moments: dict[str, InputMoments] = {}
        self.seen = 0
        self._gradients = OutputGradients()

    @property
    def importance(self) -> dict[str, Tensor]:
        """Sums of g gᵀ by conv."""
        return self._gradients.sums

    def run(self, batch: Call) -> None:
        """Add one batch."""
        if not self._backward:
            with torch.no_grad():
                batch.apply(self._model)
        else:
            # A leaf that needs gradients makes all that depends on it have one; the weights need none.
            with torch.enable_grad():
                scores = class_scores(batch.floats(leaf).apply(self._model))
                cut = self._gradients.cut
                if cut is not None or not scores.requires_grad:
                    where = "the model's outputs" if cut is None else f"layer {cut!r}"
                    raise DataError(
                        f"no gradient comes to {where}: the model's forward runs without gradients, at least "
                        "in part"
                    )
                scores.backward(score_directions(scores.detach(), self._generator))
        self.seen += batch.batch_size

    def hook(self, name: str) -> Any:
        def watch(module: nn.Module, inputs: Any, named: dict[str, Any], output: Tensor) -> None:
            assert isinstance(module, CONVS)
            source = inputs[0] if inputs else named["input"]
            self._add_inputs(name, module, source.detach(), output.shape)
            if self._backward:
                self._gradients.watch(name, output)

        return watch

    def _add_inputs(self, name: str, conv: Conv, inputs: Tensor, output_shape: torch.Size) -> None:
        width = conv.weight[0].numel()
        wanted = max(self._minimum, int(self._per_input * width)) if name in self._whole else self._minimum
        count = max(1, math.ceil(wanted * len(inputs) / self._images))
        positions = sample_positions(output_shape, count, self._generator, device=inputs.device)
        patches = input_patches(inputs, conv, positions).float()  # (n, I, taps)
        if not bool(torch.isfinite(patches.sum())):
            raise ConversionError(
                f"layer {name!r} reads NaN or infinity on the calibration images; "
                "check the weights and the preprocessing of the images"
            )
        patches = patches.to(with_float64(patches.device))
        moments = self.moments.setdefault(name, InputMoments())
        moments.add(patches.reshape(len(patches), conv.groups, -1) if name in self._whole else patches)
