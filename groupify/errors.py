"""The exception tree.

GroupifyError            anything groupify refuses to do; the command line exits with 2
├── SpecError            a model, weights, data set or option that cannot be resolved
│   └── WrongTypeError   an argument of another type than expected; a TypeError as well
├── CheckpointError      a weight file that is missing, corrupt or belongs to another model
├── DataError            data that cannot be read, is empty, or holds NaN or bad labels
├── PlanError            no layer can be converted as asked
├── ConversionError      a model or layer that cannot be converted
├── ArtefactError        an output folder that cannot be read, trusted or written
├── ParityError          the exported file computes something else; exits with 3
└── GateError            a measurement misses the limit set for it; exits with 4

GroupifyWarning          goes on, but the user should know
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class GroupifyError(Exception):
    """Base of every error that groupify raises on purpose.

    The message is one line: the offending value, what was expected, and what to do next.
    """

    exit_code = 2


class SpecError(GroupifyError):
    """A model, weights, data set or option that cannot be resolved."""


class WrongTypeError(SpecError, TypeError):
    """An argument of another type than expected."""


class CheckpointError(GroupifyError):
    """A weight file that is missing, corrupt or belongs to another model."""


class DataError(GroupifyError):
    """Data that cannot be read, is empty, or holds NaN or labels out of range."""


class PlanError(GroupifyError):
    """No layer can be converted as asked."""


class ConversionError(GroupifyError):
    """A model or layer that cannot be converted."""


class ArtefactError(GroupifyError):
    """An output folder that cannot be read, trusted or written."""


class ParityError(GroupifyError):
    """The exported file computes something else than the model."""

    exit_code = 3


class GateError(GroupifyError):
    """What was measured misses the limit that was set for it, as in a deployment's checks."""

    exit_code = 4


class GroupifyWarning(UserWarning):
    """Groupify goes on, but the result is not what the user may expect."""


def near_names(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the known names nearest to ``name``, or ``""``."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if not matches:
        return ""
    return "; did you mean " + " or ".join(repr(match) for match in matches) + "?"


def expect_type(value: Any, types: type | tuple[type, ...], name: str, expected: str) -> None:
    """Refuse an argument of another type.

    Args:
        value: the argument.
        types: what it may be.
        name: what it is called, ``"plan"``.
        expected: what it should be and where to get it, ``"a Plan, as groupify.plan makes it"``.

    Raises:
        WrongTypeError: it is something else; names the attribute that holds the right thing, if there is one.
    """
    if isinstance(value, types):
        return
    holder = "" if isinstance(value, type) else attribute_of(value, types)
    raise WrongTypeError(f"{name} is a {type(value).__name__}: expected {expected}{holder}")


def attribute_of(value: Any, types: type | tuple[type, ...]) -> str:
    """Return ``"; give its .model"`` where an attribute of a result of groupify was meant, or ``""``."""
    if not type(value).__module__.startswith("groupify."):
        return ""
    names = ("model", "plan", "recipe", "train", "spec")
    found = (name for name in names if isinstance(getattr(value, name, None), types))
    return "".join(f"; give its .{name}" for name in list(found)[:1])
