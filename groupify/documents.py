"""The base of every JSON file that groupify reads and writes: pydantic models, strict and frozen.

Importing this module imports pydantic, which takes longer than ``groupify --help`` may: modules of documents
are imported where they are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from groupify.errors import ArtefactError
from groupify.files import write_aside
from groupify.strict_json import MAX_TEXT, is_text, parse, show

if TYPE_CHECKING:
    from typing_extensions import Self


def _printable(value: str) -> str:
    # These texts end up on terminals, where escape sequences and half characters do harm.
    if not value or not is_text(value):
        raise ValueError(f"a text of 1 to {MAX_TEXT} printable characters")
    return value


Text = Annotated[str, AfterValidator(_printable)]


class Part(BaseModel):
    """A part of a document: every field is there, of its type, and there are no others."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Document(Part):
    """A whole JSON file, with its format and the version of its schema.

    Attributes:
        what: what to call it in messages.
        remedy: what to do about one that cannot be read.
    """

    what: ClassVar[str]
    remedy: ClassVar[str]
    format_name: ClassVar[str]
    version: ClassVar[int]

    @classmethod
    def loads(cls, text: str) -> Self:
        """Return the document of a JSON text.

        Raises:
            ArtefactError: the text is not JSON, or anything in it is missing, unknown or out of range.
        """
        cls._check_header(parse(text))
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ArtefactError(first_problem(error, cls.what)) from error

    def dumps(self) -> str:
        """Return the JSON text; ``loads`` of it is this document."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            ArtefactError: it cannot be read, or is no such document.
        """
        try:
            return cls.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ArtefactError(f"cannot read {cls.what} {str(path)!r}: {error}; {cls.remedy}") from error
        except ArtefactError as error:
            raise ArtefactError(f"{cls.what} {str(path)!r}: {error}") from error

    def write(self, path: Path) -> None:
        """Write a file aside, then rename it.

        Raises:
            ArtefactError: it cannot be written.
        """
        try:
            write_aside(path, self.dumps())
        except OSError as error:
            raise ArtefactError(f"cannot write {path}: {error}; choose another file") from error

    @classmethod
    def _check_header(cls, document: object) -> None:
        """Refuse another format or version before its fields, which would be a list of riddles."""
        header = document if isinstance(document, dict) else {}
        if header.get("format") != cls.format_name:
            raise ArtefactError(f'it is no {cls.what}: expected "format": "{cls.format_name}"')
        version = header.get("schema_version")
        if version != cls.version:
            raise ArtefactError(
                f"its schema version is {show(version)}, this groupify reads version {cls.version}: "
                f"{cls.remedy}"
            )


def first_problem(error: ValidationError, what: str) -> str:
    """Return the first problem that pydantic found, in one line: where, what is there, what was expected."""
    problem = error.errors(include_url=False)[0]
    where = what + "".join(_step(step) for step in problem["loc"])
    if problem["type"] == "missing":
        return f"{where.rpartition('.')[0]} has no {problem['loc'][-1]!r}"
    if problem["type"] == "extra_forbidden":
        return f"{where.rpartition('.')[0]} has an unknown key {problem['loc'][-1]!r}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{where} is {show(problem['input'])}; expected {message}"


def _step(step: Any) -> str:
    return f"[{step}]" if isinstance(step, int) else f".{step}"
