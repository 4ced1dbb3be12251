"""Where channels meet parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

CONV_INPUT, CONV_OUTPUT, LINEAR_INPUT, LINEAR_OUTPUT, PER_CHANNEL = (
    "conv input",
    "conv output",
    "linear input",
    "linear output",
    "per channel",
)


@dataclass(frozen=True)
class ChannelUse:
    """A place where channels meet parameters.

    Attributes:
        kind: ``"conv input"``, ``"conv output"``, ``"linear input"``, ``"linear output"``, or
            ``"per channel"`` for norms, scales and other parameters with one element per channel.
        name: qualified name of the module, or of the parameter where there is no module.
        atoms: atom at each position of that dimension, shape (length,).
        blocks: number of equal blocks whose border no channel may cross (the groups of a grouped conv).
    """

    kind: str
    name: str
    atoms: Tensor
    blocks: int = 1
