"""Strict JSON: a parser without JSON's loopholes, and what messages about its values share.

Everything that is wrong is one ``ArtefactError`` that names the place and the value.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
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


def is_finite(value: object) -> bool:
    """Whether ``value`` is a finite number; booleans are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
