"""How many groups each conv is to get: one number, or numbers by name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from groupify.errors import PlanError, expect_type, near_names

_ALL = "*"
_PART = re.compile(r"(?:(?P<pattern>[^=]+)=)?(?P<count>-?\d+)", re.ASCII)


@dataclass(frozen=True)
class GroupCounts:
    """Numbers of groups by glob patterns of conv names; the last that matches counts.

    Attributes:
        patterns: (pattern, number); 1 leaves a conv as it is, and so does no match.
    """

    patterns: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, given: GroupCounts | int | Mapping[str, int] | str) -> GroupCounts:
        """Return what a number, a mapping, or a text like ``"4,layer3.*=8"`` says.

        Raises:
            PlanError: a number below 1, none above 1, or a text that is not of this form.
            WrongTypeError: something else.
        """
        if isinstance(given, GroupCounts):
            return given
        if isinstance(given, str):
            return cls.of(dict(map(_parsed, given.split(","))))
        if isinstance(given, int):
            given = {_ALL: given}
        expect_type(given, Mapping, "groups", 'a number, or numbers by name like {"*": 4, "layer3.*": 8}')
        for pattern, count in given.items():
            expect_type(count, int, f"the number of groups of {pattern!r}", "a whole number, like 4")
        for pattern, count in given.items():
            if count < 1:
                where = "" if pattern == _ALL else f" for {pattern!r}"
                raise PlanError(f"groups is {count!r}{where}; expected at least 2, for example 4")
        if max(given.values(), default=1) < 2:
            found = given.get(_ALL, "nothing")
            raise PlanError(
                f"groups is {found}, which leaves the model dense; expected at least 2, for example 4"
            )
        return cls(tuple(given.items()))

    def __str__(self) -> str:
        return ",".join(str(count) if name == _ALL else f"{name}={count}" for name, count in self.patterns)

    @property
    def largest(self) -> int:
        """The largest number."""
        return max(count for _, count in self.patterns)

    @property
    def is_one_number(self) -> bool:
        """Whether one number holds for all convs."""
        return [name for name, _ in self.patterns] == [_ALL]

    @property
    def label(self) -> str:
        """All numbers for the name of a folder, like ``"4"`` or ``"4-8"``; 1 where convs go without."""
        counts = {count for _, count in self.patterns}
        if all(name != _ALL for name, _ in self.patterns):
            counts.add(1)
        return "-".join(map(str, sorted(counts)))

    def of_conv(self, name: str) -> int:
        """Return the number for a conv; 1 where nothing is said of it."""
        matching = [count for pattern, count in self.patterns if fnmatch.fnmatchcase(name, pattern)]
        return matching[-1] if matching else 1

    def check_patterns(self, names: Iterable[str]) -> None:
        """Refuse patterns that match no conv of the model.

        Raises:
            PlanError: names the pattern.
        """
        names = list(names)
        for pattern, count in self.patterns:
            if pattern != _ALL and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                near = near_names(pattern.strip("*"), names) or f"; for example {names[0]!r}"
                raise PlanError(f"groups {pattern}={count}: {pattern!r} matches no conv of the model{near}")


def _parsed(part: str) -> tuple[str, int]:
    match = _PART.fullmatch(part.strip())
    if match is None:
        raise PlanError(f"groups {part.strip()!r}: expected a number, or PATTERN=NUMBER like layer3.*=8")
    return (match["pattern"] or _ALL).strip(), int(match["count"])
