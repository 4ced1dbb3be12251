"""A budget: what a converted model may cost, and what it may lose."""

from __future__ import annotations

import re
from dataclasses import dataclass

from groupify.errors import SpecError, near_names
from groupify.structures import FLOAT32

MACS, PARAMS, BYTES, LATENCY, DROP = "macs", "params", "bytes", "latency", "drop"
COSTS = (MACS, PARAMS, BYTES, LATENCY)
QUANTITIES = (*COSTS, DROP)

_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_UNITS: dict[str, dict[str, float]] = {
    MACS: _COUNTS,
    PARAMS: _COUNTS,
    BYTES: {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    LATENCY: {"us": 1e-3, "ms": 1.0, "s": 1e3},
    DROP: {"": 1.0},
}
_EXAMPLES = {
    MACS: "macs=40%, macs=2.5x or macs=700M",
    PARAMS: "params=50%, params=2x or params=8M",
    BYTES: "bytes=25%, bytes=4x or bytes=8MB",
    LATENCY: "latency=50%, latency=2x or latency=12ms",
    DROP: "drop=0.5, in percentage points of accuracy",
}
_VALUE = re.compile(r"(\d+\.?\d*|\.\d+)([A-Za-z%]*)", re.ASCII)


@dataclass(frozen=True)
class Limit:
    """The most that one quantity may be.

    Attributes:
        quantity: ``"macs"``, ``"params"``, ``"bytes"`` (of the weights), ``"latency"`` or ``"drop"``.
        value: a share of the dense model's, where ``relative``; else MACs, parameters, bytes,
            milliseconds for one image, or percentage points of accuracy.
        relative: which of the two.
        of_float32: whether the dense model's is that in float32, whatever the precision of the plan; of a
            relative latency alone.
        name: what people read in its place, where it stands for something that they asked for.
    """

    quantity: str
    value: float
    relative: bool
    of_float32: bool = False
    name: str | None = None

    def at_most(self, dense: float) -> float:
        """Return the limit as a number, for a dense model that has ``dense`` of the quantity."""
        return self.value * dense if self.relative else self.value

    @property
    def text(self) -> str:
        """The limit as ``Budget.parse`` takes it."""
        if self.relative:
            base = f":{FLOAT32}" if self.of_float32 else ""
            share, times = f"{100 * self.value:.10g}%", f"{1 / self.value:.10g}x"
            return f"{self.quantity}={min(share, times, key=lambda text: max(len(text), 5))}{base}"
        unit = {BYTES: "B", LATENCY: "ms"}.get(self.quantity, "")
        digits = repr(self.value)
        if "e" in digits:
            digits = f"{self.value:.30f}".rstrip("0")
        return f"{self.quantity}={digits.removesuffix('.0').removesuffix('.')}{unit}"

    def __str__(self) -> str:
        return self.name or self.text


@dataclass(frozen=True)
class Budget:
    """Limits that all hold at the same time.

    >>> print(Budget.parse("macs=40%", "latency=2x"))
    macs=40%,latency=50%
    """

    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, *texts: str) -> Budget:
        """Return the budget of texts like ``"macs=40%"``; one text may hold several, with commas between.

        ``%`` and ``x`` are relative to the dense model: ``40%`` of it, or ``2.5x`` less than it. Without
        them the value is absolute: ``macs=700M``, ``params=8M``, ``bytes=8MB``, ``latency=12ms``.
        ``drop=0.5`` allows a loss of half a percentage point of accuracy. A relative latency is one of the
        dense model in the precision of the plan, ``latency=2x:float32`` one of the dense float32 model.

        Raises:
            SpecError: a text that is none of these, a quantity that occurs twice, or no text.
        """
        limits = [_limit(part.strip()) for text in texts for part in text.split(",")]
        seen: set[str] = set()
        for limit in limits:
            if limit.quantity in seen:
                raise SpecError(f"two limits for {limit.quantity!r}: give one of each, for example macs=40%")
            seen.add(limit.quantity)
        if not limits:
            raise SpecError(f"no budget: expected one like {_EXAMPLES[MACS]}")
        return cls(tuple(limits))

    @property
    def costs(self) -> tuple[Limit, ...]:
        """The limits that can be told from the plan alone."""
        return tuple(limit for limit in self.limits if limit.quantity != DROP)

    @property
    def drop(self) -> float | None:
        """Percentage points of accuracy that may be lost; None where nothing is said of it."""
        return next((limit.value for limit in self.limits if limit.quantity == DROP), None)

    @property
    def text(self) -> str:
        """The budget as ``parse`` takes it."""
        return ",".join(limit.text for limit in self.limits)

    def __str__(self) -> str:
        return ",".join(map(str, self.limits))


def _limit(text: str) -> Limit:
    quantity, equals, value = (part.strip() for part in text.partition("="))
    if quantity not in QUANTITIES or not equals:
        raise SpecError(
            f"budget {text!r}: expected one of {', '.join(QUANTITIES)}, '=' and a value, "
            f"like {_EXAMPLES[MACS]}{near_names(quantity, QUANTITIES)}"
        )
    value, colon, base = value.partition(":")
    match = _VALUE.fullmatch(value)
    if match is None:
        raise SpecError(f"budget {text!r}: expected a value above 0, like {_EXAMPLES[quantity]}")
    number, unit = float(match[1]), match[2]
    relative = unit in ("%", "x") and quantity != DROP
    if colon and (base != FLOAT32 or quantity != LATENCY or not relative):
        raise SpecError(
            f"budget {text!r}: {colon + base!r} says nothing; expected a relative latency in front of "
            f"':{FLOAT32}', like latency=2x:{FLOAT32}"
        )
    if number <= 0:
        raise SpecError(f"budget {text!r}: expected a value above 0, like {_EXAMPLES[quantity]}")
    if relative:
        share = number / 100 if unit == "%" else 1 / number
        if share > 1:
            raise SpecError(
                f"budget {text!r} allows more than the dense model has: expected at most 100% or at least 1x"
            )
        return Limit(quantity, share, relative=True, of_float32=bool(colon))
    units = _UNITS[quantity]
    if unit not in units:
        known = ", ".join(repr(name) for name in units if name) or "none"
        shares = "" if quantity == DROP else ", % or x"
        raise SpecError(
            f"budget {text!r}: unknown unit {unit!r}, expected {known}{shares}, like {_EXAMPLES[quantity]}"
        )
    return Limit(quantity, number * units[unit], relative=False)
