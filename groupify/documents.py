"""The base of every JSON file that groupify reads and writes: frozen dataclasses, checked by pydantic.

Importing this module imports pydantic, which takes longer than ``groupify --help`` may: modules of documents
are imported where they are used. Their parts are ordinary frozen dataclasses, wherever those live; pydantic
checks them as strictly as the document that holds them.
"""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from groupify.errors import ArtefactError, PlanError, SpecError
from groupify.files import write_aside
from groupify.strict_json import MAX_TEXT, parse, show

if TYPE_CHECKING:
    from typing_extensions import Self

_PREAMBLE = re.compile(r"^(Value error, |\w+ should (be |match |have )?)")

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Count1 = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A measured number that may be NaN or infinite, which JSON does not know: null in the file.
Measured = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
    WithJsonSchema({"type": ["number", "null"]}),
]


# The same, of what cannot be negative.
Amount = Annotated[
    Measured,
    AfterValidator(lambda value: _not_negative(value)),
    WithJsonSchema({"type": ["number", "null"], "minimum": 0}),
]
# Bytes, as base64 in the file.
Bytes = Annotated[
    bytes,
    BeforeValidator(lambda value: _decoded(value) if isinstance(value, str) else value),
    PlainSerializer(lambda value: base64.b64encode(value).decode("ascii")),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]


def _not_negative(value: float) -> float:
    if value < 0:
        raise ValueError("at least 0")
    return value


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError("base64") from error


class OneOf:
    """For ``Annotated``: a text that is one of the choices."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def _check(self, value: str) -> str:
        if value not in self.choices:
            raise ValueError(" or ".join(map(repr, self.choices)))
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.choices)}


CONFIG = ConfigDict(
    strict=True, extra="forbid", allow_inf_nan=False, json_schema_serialization_defaults_required=True
)


class Document:
    """A frozen dataclass that is a whole JSON file: every field is there, of its type, and no other.

    A subclass has the fields ``format`` and ``schema_version``, each a ``Literal`` with its value as default
    and ``kw_only``. In Python other fields may have defaults too; in the file all are there.

    Attributes:
        what: what to call it in messages.
        remedy: what to do about one that cannot be read.
        plain_texts: whether texts are short and of one line; they end up on terminals in any case, where
            control characters do harm.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CONFIG
    what: ClassVar[str]
    remedy: ClassVar[str]
    plain_texts: ClassVar[bool] = True

    @classmethod
    def loads(cls, text: str) -> Self:
        """Return the document of a JSON text.

        Raises:
            ArtefactError: the text is not JSON, or anything in it is missing, unknown or out of range.
        """
        values = parse(text)
        cls._check_header(values)
        _check_texts(values, cls.what, plain=cls.plain_texts)
        try:
            document: Self = _adapter(cls).validate_json(text)
        except ValidationError as error:
            raise ArtefactError(first_problem(error, cls.what)) from error
        except (SpecError, PlanError) as error:  # of a part that checks itself
            raise ArtefactError(f"{cls.what}: {error}") from error
        _check_complete(values, _adapter(cls).dump_python(document), cls.what)
        return document

    def dumps(self) -> str:
        """Return the JSON text; ``loads`` of it is this document.

        Raises:
            ArtefactError: a field holds something that cannot be read back.
        """
        try:
            values = _adapter(type(self)).dump_python(self, warnings=False)
            text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ArtefactError(f"the {self.what} cannot be written as JSON: {error}") from error
        self.loads(text)
        return text

    def values(self) -> dict[str, Any]:
        """Return the document as JSON values."""
        values: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json", warnings=False)
        return values

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
    def schema(cls) -> dict[str, Any]:
        """Return the JSON Schema (draft 2020-12) of the files."""
        dialect = "https://json-schema.org/draft/2020-12/schema"
        return {"$schema": dialect, **_adapter(cls).json_schema(mode="serialization")}

    @classmethod
    def _check_header(cls, values: object) -> None:
        """Refuse another format or version before its fields, which would be a list of riddles."""
        if not isinstance(values, dict):
            raise ArtefactError(f"{cls.what} is {show(values)}; expected an object")
        # Defaults of a dataclass are attributes of its class.
        name, version = cls.format, cls.schema_version  # type: ignore[attr-defined]
        if values.get("format") != name:
            raise ArtefactError(f'it is no {cls.what}: expected "format": "{name}"')
        found = values.get("schema_version")
        if found != version or isinstance(found, (bool, float)):
            raise ArtefactError(
                f"its schema version is {show(found)}, this groupify reads version {version}: {cls.remedy}"
            )


_ADAPTERS: dict[type[Document], TypeAdapter[Any]] = {}


def _adapter(cls: type[Document]) -> TypeAdapter[Any]:
    # Made on first use, when all types that the fields name are there.
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def first_problem(error: ValidationError, what: str) -> str:
    """Return the first problem that pydantic found, in one line: where, what is there, what was expected."""
    problem = error.errors(include_url=False)[0]
    place = [what, *problem["loc"]]
    if problem["type"] in ("missing", "missing_argument"):
        return f"{_name(place[:-1])} has no {place[-1]!r}"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{_name(place[:-1])} has an unknown key {show(place[-1])}"
    message = _PREAMBLE.sub("", problem["msg"])
    found = problem["input"]
    shown = (
        f"a list of {len(found)}" if isinstance(found, list) and "too_" in problem["type"] else show(found)
    )
    return f"{_name(place)} is {shown}; expected {message}"


def _name(place: list[Any]) -> str:
    return str(place[0]) + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place[1:])


def _check_texts(value: object, where: str, *, plain: bool) -> None:
    """Refuse texts, keys included, that harm a terminal; if ``plain`` also long ones and line breaks."""
    if isinstance(value, str):
        shown = value if plain else value.replace("\n", "").replace("\t", "")
        if not shown.isprintable() or (plain and len(value) > MAX_TEXT):
            length = f" of at most {MAX_TEXT} characters" if plain else ""
            raise ArtefactError(f"{where} is {show(value)}; expected a printable text{length}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_texts(item, f"{where}[{index}]", plain=plain)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_texts(key, f"a key of {where}", plain=plain)
            _check_texts(item, f"{where}.{key}", plain=plain)


def _check_complete(found: Any, expected: Any, where: str) -> None:
    """Refuse a file without a field that has a default in Python."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key not in found:
                raise ArtefactError(f"{where} has no {key!r}")
            _check_complete(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        for index, value in enumerate(expected):
            _check_complete(found[index], value, f"{where}[{index}]")
