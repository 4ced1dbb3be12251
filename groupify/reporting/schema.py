"""A checker for as much of JSON Schema as ``report.schema.json`` uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from groupify.errors import ArtefactError
from groupify.strict_json import is_finite, refuse, show

_TYPES: dict[str, Callable[[object], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: is_finite(value) and isinstance(value, int),
    "number": is_finite,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


@lru_cache(maxsize=1)
def report_schema() -> Mapping[str, Any]:
    """Return the schema of ``report.json``."""
    text = resources.files("groupify.reporting").joinpath("report.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def check(value: object, schema: Mapping[str, Any], where: str, root: Mapping[str, Any]) -> None:
    """Compare a JSON value with a schema; the first mismatch is named.

    Args:
        value: the parsed value; keys that the schema does not name are ignored where it allows them.
        schema: what it should be.
        where: its name in messages.
        root: the whole schema, for references into it.

    Raises:
        ArtefactError: it does not match, or a text holds control characters, which harm a terminal.
    """
    if "$ref" in schema:
        check(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], where, root)
    if "anyOf" in schema:
        _check_any(value, schema["anyOf"], where, root)
    kinds = schema.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_TYPES[kind](value) for kind in kinds):
        refuse(where, value, " or ".join(kinds))
    if "const" in schema and value != schema["const"]:
        refuse(where, value, repr(schema["const"]))
    if "enum" in schema and value not in schema["enum"]:
        refuse(where, value, " or ".join(map(repr, schema["enum"])))
    if isinstance(value, str):
        if not all(character.isprintable() or character in "\n\t" for character in value):
            refuse(where, value, "a text without control characters")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check(item, schema.get("items", {}), f"{where}[{index}]", root)
    elif isinstance(value, dict):
        _check_object(value, schema, where, root)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(value, schema, where)


def _check_any(value: object, choices: list[Mapping[str, Any]], where: str, root: Mapping[str, Any]) -> None:
    for index, choice in enumerate(choices):
        try:
            check(value, choice, where, root)
        except ArtefactError:
            # The last one is what is expected where there is anything: its message says most.
            if index == len(choices) - 1:
                raise
        else:
            return


def _check_range(value: float, schema: Mapping[str, Any], where: str) -> None:
    if value < schema.get("minimum", value):
        refuse(where, value, f"at least {schema['minimum']}")
    if value > schema.get("maximum", value):
        refuse(where, value, f"at most {schema['maximum']}")
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        refuse(where, value, f"more than {schema['exclusiveMinimum']}")


def _check_object(
    value: dict[str, Any], schema: Mapping[str, Any], where: str, root: Mapping[str, Any]
) -> None:
    for key in schema.get("required", ()):
        if key not in value:
            raise ArtefactError(f"{where} has no {key!r}")
    known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key, item in value.items():
        if key in known:
            check(item, known[key], f"{where}.{key}", root)
        elif more is False:
            raise ArtefactError(f"{where} has an unknown key {show(key)}")
        else:
            check(key, {}, f"a key of {where}", root)
            check(item, {} if more is True else more, f"{where}.{key}", root)
