"""What becomes of a conv, and of all convs of a model: the types that planning and conversion share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from groupify.documents import Count, Count1
from groupify.errors import PlanError, SpecError, near_names

# Families that a plan may choose structures from.
GROUPED = "grouped"
GROUPED_POINTWISE = "grouped-pointwise"
BLOCK_TERM = "block-term"
FAMILIES = (GROUPED, GROUPED_POINTWISE, BLOCK_TERM)

# What a model computes in. int8: uint8 activations and int8 weights, as ``quantize_onnx`` makes them.
Precision = Literal["float32", "int8"]
FLOAT32: Precision = "float32"
INT8: Precision = "int8"
PRECISIONS: tuple[Precision, ...] = (FLOAT32, INT8)
# And what a file may: float16 halves it, and is for other processors than those that plans are for.
FilePrecision = Literal["float32", "int8", "float16"]
FLOAT16: FilePrecision = "float16"
FILE_PRECISIONS: tuple[FilePrecision, ...] = (*PRECISIONS, FLOAT16)


def check_precision(precision: str, known: Sequence[str] = PRECISIONS) -> None:
    """Refuse what is no precision.

    Raises:
        SpecError: names those that there are.
    """
    if precision not in known:
        raise SpecError(
            f"unknown precision {precision!r}, expected one of {', '.join(known)}"
            f"{near_names(precision, known)}"
        )


Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class ConvShape:
    """What a conv's weight says of it.

    Attributes:
        in_channels, out_channels, kernel_size, groups: as in the conv itself.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int = 1

    @property
    def positions(self) -> int:
        """Number of the kernel's positions: 9 for 3×3."""
        return math.prod(self.kernel_size)

    def __str__(self) -> str:
        kernel = "×".join(map(str, self.kernel_size))
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{kernel} conv {self.in_channels} → {self.out_channels}{groups}"


@dataclass(frozen=True)
class Structure:
    """What replaces a conv I → O: ``[1×1: I → R] → k×k: R → S in G groups → [1×1: S → O]``.

    Nothing is between the up to three convs, and the two 1×1 convs have the groups that the conv has.
    ``Structure()`` is the conv itself where it has one group. Grouped, low-rank, Tucker-2, block-term
    and depthwise-core structures are all of this form.

    Attributes:
        reduce: R, channels of all groups together; None without the first conv (R = I).
        groups: G.
        expand: S, channels of all groups together; None without the last conv (S = O).
    """

    reduce: int | None = None
    groups: int = 1
    expand: int | None = None

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise PlanError(f"groups is {self.groups}; expected 1 or more")
        for what, channels in (("reduce", self.reduce), ("expand", self.expand)):
            if channels is not None and channels < 1:
                raise PlanError(f"{what} is {channels}; expected 1 or more, or None")
            if channels is not None and channels % self.groups:
                raise PlanError(
                    f"{what} is {channels}, which {self.groups} groups do not divide; "
                    f"take a multiple of {self.groups}"
                )

    def __str__(self) -> str:
        return f"({self.reduce or '–'}, {self.groups}, {self.expand or '–'})"

    @property
    def is_one_conv(self) -> bool:
        """Whether it has neither a reduce nor an expand."""
        return self.reduce is None and self.expand is None

    def separate_fits(self, conv_groups: int) -> int:
        """Return how many groups of a conv's inputs are fitted each by itself."""
        return self.groups if self.is_one_conv else conv_groups

    def minds_order(self, conv: ConvShape) -> bool:
        """Whether it matters which channels of a conv stand together: not where a reduce mixes them.

        Nor is it worth a thought in front of an expand: of k×k convs all orders were measured to be alike, in
        trained nets the given one, random ones and clustered ones. In those of 1×1 convs the best order saves
        up to a seventh of the error.
        """
        grouped = conv.groups == 1 < self.groups and self.reduce is None
        return grouped and (self.expand is None or conv.positions == 1)

    def check(self, conv: ConvShape) -> None:
        """Check that the structure suits a conv, and is the one spelling of what it is.

        Raises:
            PlanError: it does not; says what would.
        """
        reads, writes = self.reduce or conv.in_channels, self.expand or conv.out_channels
        if self.groups % conv.groups:
            raise PlanError(f"{self} has {self.groups} groups for a {conv}; take a multiple of {conv.groups}")
        if reads % self.groups or writes % self.groups:
            raise PlanError(
                f"{self} for a {conv}: {self.groups} groups do not divide {reads} and {writes} channels; "
                "take a divisor of both"
            )
        if self != (canonical := self.canonical(conv)):
            raise PlanError(f"{self} for a {conv} is {canonical} with needless convs; write it so")

    def canonical(self, conv: ConvShape) -> Structure:
        """Return the one spelling of structures that can compute the same: the one of the fewest MACs.

        In one group a basis as large as the channels it replaces adds nothing, and a 1×1 conv between two
        others adds nothing whatever its groups; a low-rank 1×1 conv is reduce and core.
        """
        reduce, groups, expand = self.reduce, self.groups, self.expand
        if conv.positions == 1 and reduce is not None and expand is not None:
            reduce, groups, expand = min(reduce, expand), conv.groups, None
        if groups == conv.groups:
            if reduce is not None and reduce >= conv.in_channels:
                reduce = None
            if expand is not None and expand >= conv.out_channels:
                expand = None
            if conv.positions == 1 and expand is not None:
                reduce, expand = expand, None
            if (
                conv.positions == 1
                and reduce is not None
                and reduce >= min(conv.in_channels, conv.out_channels)
            ):
                reduce = None
        return Structure(reduce, groups, expand)

    def share(self, groups: int) -> Structure:
        """Return the structure of one group of a conv that has ``groups`` groups."""
        reduce, expand = (None if total is None else total // groups for total in (self.reduce, self.expand))
        return Structure(reduce, self.groups // groups, expand)

    def parameters(self, conv: ConvShape, *, bias: bool = False) -> int:
        """Return the number of weights, and with ``bias`` of the last conv's biases."""
        return sum(self._weights(conv)) + (conv.out_channels if bias else 0)

    def macs(self, conv: ConvShape, input_positions: int, output_positions: int) -> int:
        """Return multiply-accumulates for one image.

        Args:
            conv: what is replaced.
            input_positions: pixels of its input, where the reduce runs; that of a 1×1 conv takes the stride.
            output_positions: pixels of its output, where core and expand run.
        """
        reduce, core, expand = self._weights(conv)
        if conv.positions == 1:
            input_positions = output_positions
        return reduce * input_positions + (core + expand) * output_positions

    def _weights(self, conv: ConvShape) -> tuple[int, int, int]:
        """Weights of the three convs; 0 where one is absent."""
        reads, writes = self.reduce or conv.in_channels, self.expand or conv.out_channels
        reduce = reads * conv.in_channels // conv.groups if self.reduce else 0
        expand = writes * conv.out_channels // conv.groups if self.expand else 0
        return reduce, writes * reads // self.groups * conv.positions, expand


@dataclass(frozen=True)
class SiteRecipe:
    """How one conv is replaced.

    Attributes:
        name: qualified module name of the conv in the dense model.
        structure: what it becomes.
        shuffle: whether a channel shuffle follows; for structures of one conv.
    """

    name: str
    structure: Structure
    shuffle: bool = False

    @property
    def groups(self) -> int:
        """Number of groups of the k×k conv."""
        return self.structure.groups


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
        groups_before: its number of groups now.
        structure: what it becomes; one conv of as many groups is the conv as it is.
        shuffle: whether a channel shuffle follows.
        reason: why it is left alone, gets fewer groups than asked, or will run in a slower kernel; None
            where it is as asked.
        in_channels, out_channels, kernel_size, stride: as in the conv itself.
        output_size: spatial size of its output, pixels; empty when it never runs in inference.
        params: parameters, biases included.
        macs: multiply-accumulates for one image, over all calls.
    """

    name: str
    groups_before: Count1
    structure: Structure
    shuffle: bool
    reason: str | None
    in_channels: Count1
    out_channels: Count1
    kernel_size: tuple[Count1, ...]
    stride: tuple[Count1, ...]
    output_size: tuple[Count1, ...]
    params: Change[Count]
    macs: Change[Count]

    @property
    def converted(self) -> bool:
        """Whether the site is replaced."""
        return self.structure != Structure(groups=self.groups_before)

    @property
    def groups(self) -> int:
        """Number of groups of the k×k conv after the conversion."""
        return self.structure.groups

    @property
    def conv(self) -> ConvShape:
        """Shape of the conv itself."""
        return ConvShape(self.in_channels, self.out_channels, self.kernel_size, self.groups_before)

    @property
    def core_channels(self) -> tuple[int, int]:
        """Input and output channels of the k×k conv after the conversion."""
        return self.structure.reduce or self.in_channels, self.structure.expand or self.out_channels

    @property
    def group_width(self) -> int:
        """Channels per group of the k×k conv after the conversion, the smaller of in and out."""
        return min(self.core_channels) // self.groups

    def left_dense(self, reason: str | None) -> SitePlan:
        """Return the plan that leaves the conv as it is."""
        return replace(
            self,
            structure=Structure(groups=self.groups_before),
            shuffle=False,
            reason=reason,
            params=Change(self.params.dense, self.params.dense),
            macs=Change(self.macs.dense, self.macs.dense),
        )

    @property
    def recipe(self) -> SiteRecipe:
        """What surgery needs to know of a converted site."""
        return SiteRecipe(self.name, self.structure, self.shuffle)


@dataclass(frozen=True)
class Plan:
    """Every conv of a model, in the order in which they run, and what happens to it.

    Attributes:
        sites: all convs, also those that are left alone.
        input_shape: (C, H, W) that the output sizes and MACs are for; of the first input.
        groups: the number of groups asked for.
        cpu: the processor that it was made for, one of ``groupify.machine.CPUS`` but never ``"auto"``.
        precision: what the converted model will compute in.
        notes: what the conversion has to do without; see ``limits``.
        inputs: names of the tensors that the model was called with; empty where that is not known.
        captured: what a conversion of the very same model need not find out again (``graph.KeptGraph``); not
            saved, and no part of what is planned. None where there is nothing of the kind.
    """

    sites: tuple[SitePlan, ...]
    input_shape: tuple[int, ...]
    groups: int
    cpu: str
    precision: Precision = FLOAT32
    notes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    captured: object = field(default=None, compare=False, repr=False)

    @property
    def converted(self) -> tuple[SitePlan, ...]:
        """The sites that are replaced."""
        return tuple(site for site in self.sites if site.converted)

    def site(self, name: str) -> SitePlan:
        """Return what happens to the conv of a name."""
        return next(site for site in self.sites if site.name == name)

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


@dataclass(frozen=True)
class Observed:
    """What one forward pass shows of a conv.

    Attributes:
        input_size, output_size: spatial sizes at its last call, pixels.
        calls: how often it runs in one forward pass.
        hindrance: why it cannot be replaced, such as a hook that changes its output; None where it can.
        several_hindrance: why it cannot be replaced by several convs.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    calls: int
    hindrance: str | None = None
    several_hindrance: str | None = None


class Uniform(NamedTuple):
    """The same family and number of groups everywhere: what a plan can be compared with."""

    family: str
    groups: int
    shuffle: bool = False

    def __str__(self) -> str:
        return f"uniform {self.family}, {self.groups} groups" + (", shuffled" if self.shuffle else "")


@dataclass(frozen=True)
class Candidate:
    """One thing that may become of one conv.

    Attributes:
        site: the plan of the conv, if it is chosen.
        weight_bytes: bytes of its weights and biases.
        activation_bytes: largest sum of its inputs and outputs that are alive together, for one image.
    """

    site: SitePlan
    weight_bytes: int
    activation_bytes: int

    @property
    def key(self) -> str:
        """A name for it, unique in the model."""
        return f"{self.site.name}:{self.label}"

    @property
    def label(self) -> str:
        """The structure, as readers know it."""
        return str(self.site.structure) + (" shuffled" if self.site.shuffle else "")


@dataclass(frozen=True)
class Choices:
    """The possibilities of every conv of a model, in the order in which they run.

    Attributes:
        sites: for each conv its candidates; the first leaves it as it is.
        uniform: plans with one number of groups everywhere, as the index of each conv's candidate.
        observed: what a forward pass showed of each conv, by name.
        input_shape: (C, H, W) that the costs are for.
        cpu: the processor that they are for.
        precision: what the converted model will compute in.
        example: how the model is called, a shape or a ``Call``.
        inputs: names of the tensors that it is called with.
        rules: the ``Rules`` that they follow.
    """

    sites: tuple[tuple[Candidate, ...], ...]
    uniform: Mapping[Uniform, tuple[int, ...]]
    observed: Mapping[str, Observed]
    input_shape: tuple[int, ...]
    cpu: str
    precision: Precision
    example: Any
    inputs: tuple[str, ...]
    rules: Any

    @property
    def open_sites(self) -> list[tuple[Candidate, ...]]:
        """The candidates of each conv that has a choice."""
        return [options for options in self.sites if len(options) > 1]

    def plan(self, chosen: Sequence[int]) -> Plan:
        """Return the plan that takes the candidate of each given index."""
        sites = tuple(options[index].site for options, index in zip(self.sites, chosen, strict=True))
        groups = max((site.groups for site in sites if site.converted), default=1)
        return Plan(sites, self.input_shape, groups, self.cpu, self.precision, inputs=self.inputs)

    def indices(self, plan: Plan) -> tuple[int, ...]:
        """Return the index of each conv's candidate in a plan that is made of them.

        Raises:
            PlanError: the plan does something that is no candidate.
        """
        wanted = {site.name: site.recipe for site in plan.sites}
        found = []
        for options in self.sites:
            recipes = [option.site.recipe for option in options]
            name = recipes[0].name
            if wanted.get(name) not in recipes:
                raise PlanError(f"{name!r}: the plan holds no candidate of it; plan with the same options")
            found.append(recipes.index(wanted[name]))
        return tuple(found)


def _total(changes: Sequence[Change[int]]) -> Change[int]:
    return Change(sum(change.dense for change in changes), sum(change.grouped for change in changes))
