from __future__ import annotations

import gc
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from groupify.cli.main import main
from groupify.measure import benchmarks

ROOT = Path(__file__).parent.parent


_NOTES = re.compile(r"groupify: (input:|preprocessing|memory:)|\[\d+/\d+\] ")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind; what it said of inputs and stages apart from the rest of stderr."""

    code: int
    out: str
    err: str
    notes: str = ""


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The nets here are small: threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def short_timings() -> Iterator[None]:
    """What is timed in this process takes its five rounds and no longer: that it is timed is what counts."""
    whole = benchmarks.time_interleaved

    def short(
        callables: Mapping[str, Callable[[], object]], *, seconds: float
    ) -> dict[str, benchmarks.Timing]:
        return whole(callables, seconds=min(seconds, 0.1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "time_interleaved", short)
        patch.setattr(benchmarks, "_BURST_SECONDS", 0.01)
        yield


def pytest_collection_finish() -> None:
    """Leave what has been imported out of all collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process, from ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["groupify", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        handler = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            with warnings.catch_warnings(), pytest.raises(SystemExit) as leaving:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        written = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        lines = written.err.splitlines(keepends=True)
        notes = [line for line in lines if _NOTES.match(line)]
        err = "".join(line for line in lines if line not in notes)
        return Outcome(leaving.value.code, written.out, err, "".join(notes))

    return command
