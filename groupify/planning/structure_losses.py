"""What the block-term structures of a conv lose, from a few fits to the moments of its inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from groupify.conversion.surgery import conv_shape
from groupify.decomposition.decompose import Decomposer
from groupify.decomposition.families import Cost
from groupify.decomposition.ladder import ladders
from groupify.decomposition.moments import Moments
from groupify.graph.plain_layers import conv_of
from groupify.structures import BLOCK_TERM, Candidate, Choices


def structure_losses(
    model: nn.Module,
    choices: Choices,
    options: Sequence[Candidate],
    covariance: Tensor,
    importance: Tensor | None,
) -> dict[str, float]:
    """Return the losses of the candidates of one conv that a decomposition makes, by their keys.

    Args:
        model: the dense model.
        choices: where the candidates come from.
        options: of one conv.
        covariance: of the inputs of its g groups, shape (g, n, n).
        importance: Fisher information of its outputs, shape (O, O); None = the loss is the relative error.
    """
    if BLOCK_TERM not in choices.rules.families:
        return {}
    name = options[0].site.name
    conv, run = conv_of(model, name), choices.observed[name]
    moments = Moments.of_weight(conv.weight.float(), covariance.float())
    scale, energy = None, 1.0
    if importance is not None:
        weights = importance.diagonal().clamp(min=0)
        scale, energy = weights.sqrt().float(), float((weights * moments.energy.flatten()).sum()) / 2
    cost = Cost(conv_shape(conv), math.prod(run.input_size), math.prod(run.output_size))
    rules = choices.rules
    found = ladders(Decomposer(moments, cost.conv, scale), cost, rules.cpu_block, rules.narrowest)
    errors = {rung.structure: rung.error for rungs in found.values() for rung in rungs}
    return {
        option.key: energy * errors[option.site.structure]
        for option in options
        if option.site.structure in errors
    }
