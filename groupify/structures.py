"""What becomes of a conv, and of all convs of a model: the types that planning and conversion share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

DENSE = "dense"
GROUPED = "grouped"
GROUPED_POINTWISE = "grouped-pointwise"
KINDS = (GROUPED, GROUPED_POINTWISE)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class SiteRecipe:
    """How one conv is replaced.

    Attributes:
        name: qualified module name of the conv in the dense model.
        kind: ``"grouped"``, or ``"grouped-pointwise"`` for a grouped conv and a dense 1×1 conv.
        groups: number of groups after the conversion.
        shuffle: whether a channel shuffle follows.
    """

    name: str
    kind: str
    groups: int
    shuffle: bool = False


@dataclass(frozen=True)
class Change(Generic[Number]):
    """One quantity before and after the conversion."""

    dense: Number
    grouped: Number

    @property
    def ratio(self) -> float:
        """How many times smaller it got: dense ÷ grouped."""
        return self.dense / self.grouped if self.grouped else float("nan")


@dataclass(frozen=True)
class SitePlan:
    """What happens to one conv.

    Attributes:
        name: qualified module name.
        kind: ``"dense"`` (left as it is), ``"grouped"`` or ``"grouped-pointwise"``.
        groups_before: its number of groups now.
        groups: its number of groups after the conversion.
        shuffle: whether a channel shuffle follows.
        reason: why it is left alone, gets fewer groups than asked, or will run in a slower kernel; None
            where it is as asked.
        in_channels, out_channels, kernel_size, stride: as in the conv itself.
        output_size: spatial size of its output, pixels; empty when it never runs in inference.
        params: parameters, biases included.
        macs: multiply-accumulates for one image, over all calls.
    """

    name: str
    kind: str
    groups_before: int
    groups: int
    shuffle: bool
    reason: str | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    output_size: tuple[int, ...]
    params: Change[int]
    macs: Change[int]

    @property
    def converted(self) -> bool:
        """Whether the site is replaced."""
        return self.kind != DENSE

    @property
    def group_width(self) -> int:
        """Channels per group after the conversion: the smaller of in/groups and out/groups."""
        return min(self.in_channels, self.out_channels) // self.groups

    @property
    def recipe(self) -> SiteRecipe:
        """What surgery needs to know of a converted site."""
        return SiteRecipe(self.name, self.kind, self.groups, self.shuffle)


@dataclass(frozen=True)
class Plan:
    """Every conv of a model, in the order in which they run, and what happens to it.

    Attributes:
        sites: all convs, also those that are left alone.
        input_shape: (C, H, W) that the output sizes and MACs are for.
        groups: the number of groups asked for.
        cpu: the processor that it was made for, one of ``groupify.machine.CPUS`` but never ``"auto"``.
        notes: what the conversion has to do without; see ``limits``.
    """

    sites: tuple[SitePlan, ...]
    input_shape: tuple[int, ...]
    groups: int
    cpu: str
    notes: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[SitePlan, ...]:
        """The sites that are replaced."""
        return tuple(site for site in self.sites if site.converted)

    @property
    def params(self) -> Change[int]:
        """Parameters of all convs, biases included."""
        return _total([site.params for site in self.sites])

    @property
    def macs(self) -> Change[int]:
        """Multiply-accumulates of all convs for one image."""
        return _total([site.macs for site in self.sites])

    @property
    def recipes(self) -> tuple[SiteRecipe, ...]:
        """What surgery needs to know."""
        return tuple(site.recipe for site in self.converted)


def _total(changes: Sequence[Change[int]]) -> Change[int]:
    return Change(sum(change.dense for change in changes), sum(change.grouped for change in changes))
