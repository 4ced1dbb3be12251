"""Structures by families: members of one differ in nothing but their size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from groupify.errors import PlanError
from groupify.structures import ConvShape, Structure

# Latents that a core writes for each that it reads, where both cost the same: about the best for 3×3 convs of
# any size. Where reading is dearer, for a stride or few outputs, more.
_WRITES_PER_READ = 2
_MOST_WRITES = 4
_MOST_GROUPS = 16
# Channels of a group: what reaches the least error for 3×3 convs, where no kernel minds.
_NARROW = 4


@dataclass(frozen=True)
class Cost:
    """What MACs are counted for.

    Attributes:
        conv: what is replaced.
        input_positions, output_positions: pixels of its input and output.
    """

    conv: ConvShape
    input_positions: int
    output_positions: int

    def macs(self, structure: Structure) -> int:
        """Return multiply-accumulates for one image."""
        return structure.macs(self.conv, self.input_positions, self.output_positions)

    @property
    def dense(self) -> int:
        """MACs of the conv as it is."""
        return self.macs(Structure(groups=self.conv.groups))


@dataclass(frozen=True)
class Family:
    """Structures of the form (R·n, G or G·n, S·n) for n = 1, 2, ….

    Attributes:
        unit: the member n = 1.
        grows: whether the number of groups grows with n, their width staying the same.
    """

    unit: Structure
    grows: bool

    def __str__(self) -> str:
        if not self.grows:
            return f"{self.unit.groups} groups" if self.unit.groups > 1 else "one group"
        reads, writes = (
            (self.unit.reduce or 0) // self.unit.groups,
            (self.unit.expand or 0) // self.unit.groups,
        )
        return "depthwise" if reads == writes == 1 else f"groups of {reads} → {writes}"

    def low_rank(self, conv: ConvShape) -> bool:
        """Whether the members are linear maps of low rank, whose errors have a closed form."""
        return conv.positions == 1 and not self.grows and self.unit.groups == conv.groups

    def member(self, count: int) -> Structure:
        """Return the nth member."""
        reduce, groups, expand = self.unit.reduce, self.unit.groups, self.unit.expand
        return Structure(
            None if reduce is None else reduce * count,
            groups * count if self.grows else groups,
            None if expand is None else expand * count,
        )

    def members(self, cost: Cost, ratios: Sequence[float]) -> tuple[Structure, ...]:
        """Return the members nearest to some MAC ratios (dense ÷ member), the largest first, each once.

        Members that cost what the conv costs, or that another family spells shorter, are left out.
        """
        found = {self._nearest(cost, ratio): None for ratio in sorted(ratios)}
        return tuple(s for s in found if cost.macs(s) < cost.dense and _suits(s, cost.conv))

    def _nearest(self, cost: Cost, ratio: float) -> Structure:
        wanted = cost.dense / ratio
        low, high = 1, 2
        while cost.macs(self.member(high)) < wanted:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost.macs(self.member(middle)) < wanted else (low, middle)
        return min(map(self.member, (low, high)), key=lambda s: abs(math.log(cost.macs(s) / wanted)))


def _suits(structure: Structure, conv: ConvShape) -> bool:
    try:
        structure.check(conv)
    except PlanError:
        return False
    return True


def families(cost: Cost, block: int, narrowest: int = 1) -> tuple[Family, ...]:
    """Return the families worth a look for a conv.

    Args:
        cost: its shape, and on how many pixels it runs.
        block: channels that the processor's grouped kernel wants in a group; see ``groupify.machine``.
        narrowest: fewest channels of a group, but for groups of one, which have a kernel of their own.
    """
    if cost.conv.positions == 1:
        return tuple(_pointwise(cost.conv, block, narrowest))
    return tuple(_spatial(cost, block, narrowest))


def _pointwise(conv: ConvShape, block: int, narrowest: int) -> Iterator[Family]:
    """Low rank, and grouped convs behind which a dense one follows."""
    own = conv.groups
    step = _step(conv, block, narrowest)
    yield Family(Structure(step, own, None), grows=False)
    groups = 2
    while groups <= _MOST_GROUPS and conv.in_channels // own // groups >= block:
        if conv.in_channels // own % groups == 0:
            yield Family(Structure(None, own * groups, own * groups * block), grows=False)
        groups *= 2


def _step(conv: ConvShape, block: int, narrowest: int) -> int:
    """Latents that the next member has more: few, but where 1×1 convs in groups want whole blocks."""
    if conv.groups > 1 and narrowest >= block:
        return conv.groups * block
    inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    return conv.groups * max(1, min(block, inputs // 8, outputs // 8))


def _spatial(cost: Cost, block: int, narrowest: int) -> Iterator[Family]:
    """Tucker-2 and block terms; where the input's channels fill groups, also without a reduce."""
    conv, own = cost.conv, cost.conv.groups
    reading, writing = conv.in_channels * cost.input_positions, conv.out_channels * cost.output_positions
    writes = min(_MOST_WRITES, max(1, round(_WRITES_PER_READ * math.sqrt(reading / writing))))
    step = _step(conv, block, narrowest)
    yield Family(Structure(step, own, writes * step), grows=False)
    for width in sorted({block, max(_NARROW, narrowest)}, reverse=True):
        yield Family(Structure(own * width, own, own * width * writes), grows=True)
    yield Family(Structure(step, step, step), grows=True)
    channels = conv.in_channels // own
    if channels % block == 0 and channels > block:
        groups = conv.in_channels // block
        yield Family(Structure(None, groups, groups * max(1, block // 4)), grows=False)
