"""Tables on a terminal, piped, and in Markdown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO, cast

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

# Piped output is for grep and diff: no line may be folded.
_PIPED_WIDTH = 400
_COMFORTABLE_WIDTH = 140


@dataclass(frozen=True)
class Table:
    """A header and rows of as many cells.

    Attributes:
        header: the columns' titles.
        rows: the cells.
        words: titles of the columns of words, which stand on the left; numbers stand on the right.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]

    def print(self, console: Console) -> None:
        """Print it without box lines, its titles bold on a terminal."""
        plain = not console.is_terminal
        table = RichTable(
            box=None,
            pad_edge=False,
            collapse_padding=is_narrow(console),
            header_style="" if plain else "bold",
        )
        for title in self.header:
            side: Literal["left", "right"] = "left" if title in self.words else "right"
            table.add_column(title, justify=side, no_wrap=plain)
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)

    def markdown(self) -> str:
        """Return it as Markdown."""
        sides = tuple("---" if title in self.words else "---:" for title in self.header)
        lines = [_markdown_row(self.header), "| " + " | ".join(sides) + " |", *map(_markdown_row, self.rows)]
        return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape, cells)) + " |"


def escape(text: str) -> str:
    """What a page of Markdown would take for its own, in a name that comes from outside."""
    return " ".join(re.sub(r"([\\|`*<>\[\]])", r"\\\1", text).split())


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Print lines as they are, however long."""
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def is_narrow(console: Console) -> bool:
    """Whether a table with texts would be folded beyond reading."""
    return console.is_terminal and console.width < _COMFORTABLE_WIDTH


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line decide what a closed pipe means; rich would exit with 1."""
        raise BrokenPipeError


class _WithoutTrailingSpaces:
    """A text stream for rich, which fills every table row up with spaces."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(r" +$", "", text, flags=re.MULTILINE))

    def flush(self) -> None:
        self._stream.flush()


def stdout_console() -> Console:
    """Return a console on stdout; without colour, box lines or folding when it is not a terminal."""
    console = _Console(highlight=False)
    return console if console.is_terminal else plain_console(sys.stdout)


def plain_console(stream: TextIO) -> Console:
    """Return a console that writes plain text, without colour, box lines, folding or spaces at line ends."""
    file = cast(TextIO, _WithoutTrailingSpaces(stream))
    return _Console(file=file, highlight=False, width=_PIPED_WIDTH, no_color=True, force_terminal=False)
