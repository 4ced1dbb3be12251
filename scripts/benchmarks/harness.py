"""The result files of the benchmarks: rows, and beside them the setting, the command and the machine.

A file is written whenever a row comes, aside and then renamed, under a lock: a benchmark may be stopped at
any time and started again, and several may fill one file.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from groupify.files import write_aside
from groupify.machine import describe_machine

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@dataclass(frozen=True)
class ResultFile:
    """A result file.

    Attributes:
        path: of the JSON file.
        setting: what all rows share, like the accuracy of the dense net.
        keys: the fields that tell rows apart.
    """

    path: Path
    setting: Mapping[str, Any] = field(default_factory=dict)
    keys: Sequence[str] = ()

    def __post_init__(self) -> None:
        found = self.read()
        for name, value in self.setting.items():
            if found.get(name, value) != value:
                sys.exit(
                    f"{self.path} was measured with {name} {found[name]!r}, this would be {value!r}; their "
                    "rows do not mix, give another --json"
                )

    def read(self) -> dict[str, Any]:
        """Return the document, empty where there is no file yet."""
        found: dict[str, Any] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        return found

    @property
    def rows(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """The rows by their keys."""
        return {self._key(row): row for row in self.read().get("rows", [])}

    def merge(self, row: Mapping[str, Any], order: Callable[[dict[str, Any]], Any]) -> None:
        """Put a row in, in the place of the one with the same keys, sorted by ``order``."""
        with self.changing() as document:
            rows = {self._key(known): known for known in document.get("rows", [])}
            rows[self._key(row)] = dict(row)
            document["rows"] = sorted(rows.values(), key=order)

    @contextlib.contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """Yield the document, and write it as it is at the end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            document = {**self.read(), **self.setting}
            yield document
            write_results(self.path, document)

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.keys)


def check_quick(parser: argparse.ArgumentParser, arguments: argparse.Namespace, kept: Path) -> None:
    """Refuse to put the rows of a --quick run into the file whose rows are kept."""
    if arguments.quick and arguments.json == kept:
        parser.error("--quick needs a --json of its own: its rows say too little to be kept")


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results, and where they come from: the command and the machine."""
    # Names without their folders: where a checkpoint lay on one machine tells nobody anything.
    command = " ".join(Path(argument).name for argument in sys.argv)
    document = {**results, "command": command, "machine": asdict(describe_machine())}
    write_aside(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
