"""Strict JSON: a parser without JSON's loopholes, and typed access to what it parsed.

Everything that is wrong is one ``ArtefactError`` that names the place and the value.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Sequence
from typing import Any, NoReturn

from groupify.errors import ArtefactError

MAX_NESTING = 32
MAX_TEXT = 4_096
_MAX_DIGITS = 19
_TOKENS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


def parse(text: str) -> object:
    """Parse JSON without its loopholes: NaN, huge numbers, duplicate keys, deep nesting.

    Raises:
        ArtefactError: the text is not JSON, or uses a loophole.
    """
    _check_nesting(text)
    try:
        return json.loads(
            text,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
        )
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"it is not valid JSON: {error}") from error


def _check_nesting(text: str) -> None:
    """Refuse deep nesting before a recursive parser sees it, whatever its stack allows."""
    depth, in_string = 0, False
    for match in _TOKENS.finditer(text):
        token = match.group()
        if token == '"':
            in_string = not in_string
        elif in_string or token[0] == "\\":
            continue
        elif token in "[{":
            depth += 1
            if depth > MAX_NESTING:
                raise ArtefactError(f"it is nested more than {MAX_NESTING} levels deep")
        else:
            depth -= 1


def _parse_int(digits: str) -> int:
    # Python's own conversion takes quadratic time.
    if len(digits) > _MAX_DIGITS:
        raise ArtefactError(f"the number {show(digits)} has more than {_MAX_DIGITS} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ArtefactError(f"the number {show(digits)} is out of range")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ArtefactError(f"{name} is not a number that JSON may hold")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ArtefactError(f"the key {show(key)} occurs twice in one object")
        fields[key] = value
    return fields


def show(value: object) -> str:
    """Return a short ``repr`` of a value for a message."""
    return reprlib.repr(value)


def is_text(value: object) -> bool:
    """Whether ``value`` is a text of at most ``MAX_TEXT`` printable characters."""
    # Printable: recipe texts end up on terminals, where escape sequences and half characters do harm.
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def is_integer(value: object, low: int, high: int) -> bool:
    """Whether ``value`` is an integer of ``low`` to ``high``; booleans are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_finite(value: object) -> bool:
    """Whether ``value`` is a finite number; booleans are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def refuse(where: str, value: object, expected: str) -> NoReturn:
    """Raise the ``ArtefactError`` for a bad value."""
    raise ArtefactError(f"{where} is {show(value)}; expected {expected}")


class JsonObject:
    """A JSON object whose fields are taken one by one; a field that nobody took is unknown."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            refuse(where, value, "an object")
        self._fields = dict(value)
        self._where = where

    def take(self, key: str) -> Any:
        """Return the value of a key that must be there."""
        if key not in self._fields:
            raise ArtefactError(f"{self._where} has no {key!r}")
        return self._fields.pop(key)

    def text(self, key: str, *, shortest: int = 1) -> str:
        """Return a text of printable characters."""
        value: str = self.take(key)
        if not is_text(value) or len(value) < shortest:
            refuse(f"{self._where}.{key}", value, f"a text of {shortest} to {MAX_TEXT} printable characters")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        """Return an integer of ``low`` to ``high``."""
        value = self.take(key)
        if not is_integer(value, low, high):
            refuse(f"{self._where}.{key}", value, f"an integer from {low} to {high}")
        return int(value)

    def flag(self, key: str) -> bool:
        """Return a boolean."""
        value = self.take(key)
        if not isinstance(value, bool):
            refuse(f"{self._where}.{key}", value, "true or false")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """Return one of the given texts."""
        value = self.take(key)
        if not isinstance(value, str) or value not in choices:
            refuse(f"{self._where}.{key}", value, " or ".join(repr(choice) for choice in choices))
        return value

    def finish(self) -> None:
        """Refuse the keys that nobody took."""
        for key in self._fields:
            raise ArtefactError(f"{self._where} has an unknown key {show(key)}")


def json_list(value: object, where: str, low: int, high: int) -> list[Any]:
    """Return a list of ``low`` to ``high`` items."""
    if not isinstance(value, list) or not low <= len(value) <= high:
        found = f"a list of {len(value)}" if isinstance(value, list) else show(value)
        raise ArtefactError(f"{where} is {found}; expected a list of {low} to {high}")
    return value


def plain_object(value: object, where: str) -> dict[str, Any]:
    """Return free-form JSON: an object of texts, finite numbers, booleans, nulls, lists and objects."""
    if not isinstance(value, dict):
        refuse(where, value, "an object")
    pending: list[tuple[object, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_NESTING:
            raise ArtefactError(f"{where} is nested more than {MAX_NESTING} levels deep")
        if isinstance(item, dict):
            if not all(is_text(key) for key in item):
                raise ArtefactError(f"{where} has a key of more than {MAX_TEXT} or unprintable characters")
            pending.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, list):
            pending.extend((child, depth + 1) for child in item)
        elif isinstance(item, str):
            if not is_text(item):
                refuse(where, item, f"texts of at most {MAX_TEXT} printable characters")
        elif item is not None and not isinstance(item, bool) and not is_finite(item):
            refuse(where, item, "JSON values: texts, finite numbers, booleans, null, lists, objects")
    return value
