"""The JSON files of the planner: a format, a schema version, written aside and read strictly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from groupify.errors import ArtefactError
from groupify.files import write_aside
from groupify.strict_json import JsonObject

Content = TypeVar("Content")


def take_header(top: JsonObject, what: str, format_name: str, schema_version: int, remedy: str) -> None:
    """Take format and version out of a document.

    Raises:
        ArtefactError: they are others than expected.
    """
    if top.take("format") != format_name:
        raise ArtefactError(f'it is no {what}: expected "format": "{format_name}"')
    version = top.integer("schema_version", 1, 10**9)
    if version != schema_version:
        raise ArtefactError(
            f"its schema version is {version}, this groupify reads version {schema_version}: {remedy}"
        )


def read_json_file(path: Path, what: str, loads: Callable[[str], Content], remedy: str) -> Content:
    """Read a file.

    Raises:
        ArtefactError: it cannot be read, or ``loads`` refuses its text.
    """
    try:
        return loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"cannot read {what} {str(path)!r}: {error}; {remedy}") from error
    except ArtefactError as error:
        raise ArtefactError(f"{what} {str(path)!r}: {error}") from error


def write_json_file(path: Path, text: str) -> None:
    """Write a file aside, then rename it.

    Raises:
        ArtefactError: it cannot be written.
    """
    try:
        write_aside(path, text)
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {error}; choose another file") from error
