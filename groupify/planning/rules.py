"""Which convs may be converted, and into what: one object for plans, budgets and the command line."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from groupify.errors import PlanError, near_names
from groupify.machine import blocked_width, find_cpu
from groupify.structures import (
    BLOCK_TERM,
    FAMILIES,
    FLOAT32,
    GROUPED,
    GROUPED_POINTWISE,
    Precision,
    check_precision,
)

AUTO = "auto"
SHUFFLES = ("none", "all")


@dataclass(frozen=True)
class Rules:
    """What a plan may do.

    Attributes:
        include: glob patterns of names; only those are converted, strided 1×1 convs with few MACs too,
            which otherwise stay dense.
        exclude: glob patterns of names that are left alone.
        min_group_width: fewest channels per group. ``"auto"``: the channel block of the kernel on ``cpu``,
            with widths that are multiples of it where there are such, and convs left dense where grouped
            they would be slower. A number switches that off: slower convs are only warned of.
        cpu: the processor that will run the model, one of ``groupify.machine.CPUS``; ``"auto"``: this one.
        precision: what the converted model will compute in, ``"float32"`` or ``"int8"``; latencies are those
            of this precision.
        shuffle: ``"none"``, or ``"all"`` for a channel shuffle behind every conv that is grouped. With a
            budget, ``"all"`` tries both.
        structures: families to choose from; None = plain groups for a number of groups, all for a budget.

    Raises:
        PlanError: a field is out of range.
        SpecError: the processor or the precision is unknown.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    min_group_width: int | str = AUTO
    cpu: str = AUTO
    precision: Precision = FLOAT32
    shuffle: str = "none"
    structures: Sequence[str] | None = None

    def __post_init__(self) -> None:
        # Lists are welcome, and a single text is one pattern; what is kept can be hashed.
        for name in ("include", "exclude", "structures"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        width = self.min_group_width
        if width != AUTO and (not isinstance(width, int) or width < 1):
            raise PlanError(f"min_group_width is {width!r}, expected 'auto' or at least 1 channel")
        if self.shuffle not in SHUFFLES:
            raise PlanError(
                f"unknown shuffle {self.shuffle!r}, expected one of {', '.join(SHUFFLES)}"
                f"{near_names(self.shuffle, SHUFFLES)}"
            )
        if self.structures is not None and not self.structures:
            raise PlanError(f"structures is empty, expected some of {', '.join(FAMILIES)}, or None")
        for structure in self.structures or ():
            if structure not in FAMILIES:
                raise PlanError(
                    f"unknown structure {structure!r}, expected one of {', '.join(FAMILIES)}"
                    f"{near_names(structure, FAMILIES)}"
                )
        find_cpu(self.cpu)
        check_precision(self.precision)

    @property
    def block(self) -> int:
        """Channels per block of the kernel that the group widths should be multiples of; 1 = any width."""
        return self.cpu_block if self.min_group_width == AUTO else 1

    @property
    def cpu_block(self) -> int:
        """Channels per block of the kernel on ``cpu``."""
        return blocked_width(self.cpu)

    @property
    def narrowest(self) -> int:
        """Fewest channels per group."""
        return self.cpu_block if self.min_group_width == AUTO else int(self.min_group_width)

    @property
    def family(self) -> str:
        """The one family of structures of a plan with a number of groups.

        Raises:
            PlanError: there are several, or the family and the shuffle exclude each other.
        """
        structures = self.structures or (GROUPED,)
        if not self.is_uniform:
            raise PlanError(
                f"structures are {', '.join(structures)}: a number of groups takes {GROUPED} or "
                f"{GROUPED_POINTWISE}; give one of these, or call plan_for_budget, which chooses by conv"
            )
        if self.shuffle != "none" and structures != (GROUPED,):
            raise PlanError(
                f"shuffle with structure {structures[0]!r}: the pointwise conv mixes the groups already; "
                "leave it"
            )
        return structures[0]

    @property
    def is_uniform(self) -> bool:
        """Whether a number of groups says what becomes of each conv."""
        families = self.structures or (GROUPED,)
        return len(families) == 1 and families[0] != BLOCK_TERM

    @property
    def families(self) -> Sequence[str]:
        """The families that a budget chooses among."""
        return self.structures or FAMILIES

    def resolved(self) -> Rules:
        """Return the rules with the processor that ``"auto"`` stands for on this machine."""
        return replace(self, cpu=find_cpu(self.cpu))

    def allows(self, name: str) -> bool:
        """Whether the patterns let a conv be converted."""
        return not self.excludes(name) and (not self.include or _matches(name, self.include))

    def excludes(self, name: str) -> bool:
        """Whether a pattern leaves a conv alone."""
        return _matches(name, self.exclude)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Refuse patterns that match no conv of the model.

        Raises:
            PlanError: names the pattern.
        """
        names = list(names)
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                near = near_names(pattern.strip("*"), names) or f"; for example {names[0]!r}"
                raise PlanError(f"pattern {pattern!r} matches no conv of the model{near}")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
