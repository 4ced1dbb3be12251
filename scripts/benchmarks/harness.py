"""What the experiments share: result files, the options of a command, files timed against each other.

A result file holds rows, and beside them the setting that all rows share, the command and the machine. It is
written whenever a row comes, aside and then renamed, under a lock: an experiment may be stopped at any time
and started again, and several may fill one file. A row that is there is not measured again, except with
``--again``.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from groupify.files import write_aside
from groupify.machine import describe_machine
from groupify.measure.benchmarks import Latency, benchmark_onnx, speed_up
from groupify.onnx.exporting import export_onnx
from scripts.benchmarks.tables import BENCHMARKS, TABLES, markdown

SESSIONS, SECONDS = 3, 3.0  # of a timing; seconds for each number of threads
PROCESSES = 3  # of a timing in fresh ones

RowT = TypeVar("RowT")
Key = tuple[Any, ...]
Latencies = dict[str, dict[str, float]]  # threads: milliseconds under the names of files, speed_up


@dataclass(frozen=True)
class Results(Generic[RowT]):
    """A result file, and which of its rows are still to be measured.

    Attributes:
        row: the dataclass of the rows.
        keys: the fields that tell rows apart.
        path: of the JSON file; None = the rows are kept in memory.
        setting: what all rows share, like the accuracy of the dense net.
        order: what the rows are sorted by; None = as they come.
        under: the name of the rows in the file.
        again: measure rows anew that the file held before.

    Raises:
        SystemExit: the file was measured in another setting.
    """

    row: type[RowT]
    keys: Sequence[str]
    path: Path | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)
    order: Callable[[RowT], Any] | None = None
    under: str = "rows"
    again: bool = False
    _memory: dict[str, Any] = field(default_factory=dict, init=False)
    _measured: set[Key] = field(default_factory=set, init=False)

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
        if self.path is None:
            return self._memory
        found: dict[str, Any] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        return found

    @property
    def rows(self) -> dict[Key, RowT]:
        """The rows by their keys."""
        return self._rows(self.read())

    def known(self, *key: Any) -> RowT | None:
        """Return a row that need not be measured, None where it is missing."""
        return None if self.again and key not in self._measured else self.rows.get(key)

    def put(self, row: RowT) -> None:
        """Put a row in, in the place of the one with the same keys."""
        with self.changing() as document:
            rows = self._rows(document)
            rows[self._key(row)] = row
            ordered = sorted(rows.values(), key=self.order) if self.order else rows.values()
            document[self.under] = [asdict(one) for one in ordered]  # type: ignore[call-overload]
        self._measured.add(self._key(row))

    @contextlib.contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """Yield the document, and write it as it is at the end."""
        origin = {"command": _command(), "machine": asdict(describe_machine())}
        if self.path is None:
            self._memory.update(self.setting)
            yield self._memory
            self._memory.update(origin)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        import fcntl  # not on Windows

        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            document = {**self.read(), **self.setting}
            yield document
            write_aside(self.path, json.dumps({**document, **origin}, indent=2, ensure_ascii=False) + "\n")

    def show(self, name: str) -> None:
        """Print the table that the documentation makes of such a file, if there are rows."""
        document = self.read()
        if document.get(self.under):
            print(f"\n{markdown(TABLES[name][1](json.loads(json.dumps(document))))}")

    def _rows(self, document: Mapping[str, Any]) -> dict[Key, RowT]:
        rows = [self.row(**values) for values in document.get(self.under, [])]
        return {self._key(row): row for row in rows}

    def _key(self, row: RowT) -> Key:
        return tuple(getattr(row, name) for name in self.keys)


def _command() -> str:
    # Names without their folders: where a checkpoint lay on one machine tells nobody anything.
    return " ".join(Path(argument).name for argument in sys.argv)


# the command line -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """The options that every experiment has.

    Args:
        doc: the module's docstring.
        name: of the experiment and its result file.
        quick: what ``--quick`` leaves of it.
    """

    def __init__(self, doc: str | None, name: str, quick: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.kept = BENCHMARKS / f"{name}.json"
        kept = f"benchmarks/{name}.json, with --quick none"
        self.add_argument("--json", type=Path, metavar="FILE", help=f"result file (default: {kept})")
        self.add_argument("--again", action="store_true", help="measure rows anew that the file holds")
        self.add_argument("--only", metavar="GLOB|GLOB…", default="*", help="rows by name")
        self.add_argument("--quick", action="store_true", help=f"{quick}; proves that it works, no more")

    def parse(self) -> argparse.Namespace:
        """Return the options, and print the machine.

        The threads of torch are those of OMP_NUM_THREADS.
        """
        arguments = self.parse_args()
        if arguments.quick and arguments.json == self.kept:
            self.error("--quick needs a --json of its own: its rows say too little to be kept")
        if arguments.json is None and not arguments.quick:
            arguments.json = self.kept
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        print(describe_machine(), flush=True)
        return arguments

    def add_net(self, default: str, *, checkpoint: bool = True) -> None:
        """Add the options that say which dense net, and on what images."""
        self.add_argument("--model", default=default, help="default: %(default)s")
        self.add_argument(
            "--checkpoint", type=Path, required=checkpoint, help="dense weights, from scripts/train_dense.py"
        )
        self.add_argument("--data", default="fashion-mnist", help="default: %(default)s")

    def add_numbers(self, option: str, default: str, what: str, kind: type = int) -> None:
        """Add an option with numbers between commas."""
        text = f"{what} (default: {default})"
        self.add_argument(option, type=numbers(kind), default=default, metavar="N,N…", help=text)

    def chosen(self, names: Iterable[str], globs: str) -> list[str]:
        """Return the names that one of the globs matches; at least one must be."""
        names = list(names)
        found = [name for name in names if matches(name, globs)]
        if not found:
            self.error(f"no row is called {globs!r}: there are {', '.join(names)}")
        return found


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """Return a function that reads numbers between commas."""

    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part]

    return read


def matches(name: str, globs: str) -> bool:
    """Whether one of the globs, with ``|`` between them, matches a name."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs.split("|"))


# timing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Times files of nets in ONNX Runtime, batch 1, side by side with the dense one.

    Attributes:
        dense: the net to compare with.
        shape: of one image.
        threads: empty = files are made, and timed by a later run.
        folder: where the files are kept.
    """

    dense: nn.Module
    shape: tuple[int, ...]
    threads: Sequence[int]
    folder: Path

    def file(self, name: str, groups: int, model: Callable[[], nn.Module]) -> Path:
        """Return the file of a method at the MACs of some groups, made if it is not there."""
        path = self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{groups}.onnx"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            export_onnx(model(), path, input_shape=self.shape)
        return path

    def against_dense(self, own: Path) -> Latencies:
        """Return dense and own milliseconds and their ratio by threads; medians over sessions.

        Where a session's weights come to lie in memory changes the time of a small model.
        """
        if not self.threads:
            return {}
        files = {"dense": self.file("dense", 1, lambda: self.dense), "own": own}
        sessions = [
            benchmark_onnx(files, input_shape=self.shape, threads=self.threads, seconds=SECONDS)
            for _ in range(SESSIONS)
        ]
        return {str(count): _medians(sessions, count) for count in self.threads}


def time_in_processes(
    files: Mapping[str, Path], own: str, threads: Sequence[int], seconds: float, processes: int
) -> Latencies:
    """Time files in fresh processes of ``groupify bench --onnx``.

    Returns:
        By threads: median milliseconds of each file, and the speed-up of ``own`` over the first; medians over
        the processes.
    """
    command = [sys.executable, "-m", "groupify", "bench", "--onnx", ",".join(map(str, files.values()))]
    command += ["--threads", ",".join(map(str, threads)), "--seconds", str(seconds), "--json", "--quiet"]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["rows"]
        for _ in range(processes)
    ]

    def median(count: int, name: str, quantity: str) -> float:
        path = str(files[name])
        found = (row for rows in runs for row in rows if (row["threads"], row["path"]) == (count, path))
        return float(statistics.median(row[quantity] for row in found))

    return {
        str(count): {name: median(count, name, "median_ms") for name in files}
        | {"speed_up": median(count, own, "speed_up")}
        for count in threads
    }


def _medians(sessions: Sequence[Sequence[Latency]], threads: int) -> dict[str, float]:
    pairs = [[row for row in session if row.threads == threads] for session in sessions]
    found = {
        "dense_ms": [dense.median_ms for dense, _ in pairs],
        "ms": [own.median_ms for _, own in pairs],
        "speed_up": [speed_up(dense, own) for dense, own in pairs],
    }
    return {name: statistics.median(values) for name, values in found.items()}


def describe_latency(latency: Latencies) -> str:
    """Speed-ups by threads, for a line on a row."""
    return "".join(
        f"  {count} thread{'s' if count != '1' else ''} {one['dense_ms']:.2f} → {one['ms']:.2f} ms"
        f" {one['speed_up']:.2f}×"
        for count, one in latency.items()
    )
