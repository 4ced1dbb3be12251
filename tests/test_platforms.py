"""What holds on any platform, seen from this one: consoles, imports, files and processors of others."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from groupify import artefact, machine
from groupify.cli import main
from groupify.training import state as training_state
from tests.conftest import ROOT, Run

POSIX_ONLY = {
    "curses",
    "fcntl",
    "grp",
    "posix",
    "pty",
    "pwd",
    "readline",
    "resource",
    "syslog",
    "termios",
    "tty",
}
SOURCES = [
    path for folder in ("groupify", "scripts", "examples", "tests") for path in (ROOT / folder).rglob("*.py")
]


# ---- consoles


def console(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)


def shown(stream: io.TextIOWrapper) -> str:
    content = stream.buffer.getvalue()  # type: ignore[attr-defined]
    return str(content.decode(stream.encoding))


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "utf-8"])
def test_a_console_of_any_encoding_shows_what_it_can(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "64 → 128 ≥ 3×3 − 1"
    streams = console(encoding), console(encoding, "backslashreplace")
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    main._write_what_the_console_can_show()
    for stream in streams:
        stream.write(text)
    expected = {"utf-8": text, "ascii": "64 -> 128 >= 3?3 - 1", "cp1252": "64 -> 128 >= 3×3 - 1"}
    if encoding in expected:
        assert shown(streams[0]) == expected[encoding]
    assert shown(streams[0]) == shown(streams[1])


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_plan_on_a_console_of_windows(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    stdout = console("cp1252")
    monkeypatch.setattr(sys, "stdout", stdout)
    groups = ("--groups", 4, "--min-group-width", 1, "--cpu", "avx512")
    outcome = run("plan", "tests.cli_nets:net", "--input-size", "3,8,8", *groups, *options)
    assert outcome.code == 0
    assert ("\\u2192" if options else "->") in shown(stdout)


def test_an_error_in_characters_that_the_console_lacks(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    stderr = console("cp1252", "backslashreplace")
    monkeypatch.setattr(sys, "stderr", stderr)
    assert run("plan", "resnet→18").code == 2
    assert "unknown model 'resnet->18'" in shown(stderr)


def test_a_whole_process_with_the_encoding_of_windows() -> None:
    command = [sys.executable, "-m", "groupify", "plan", "demo", "--groups", "4"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, b"")
    assert b"->" in outcome.stdout


# ---- imports and files


def imports_at_once(path: Path) -> Iterator[str]:
    """The modules that are imported with ``path``: what stands outside functions."""
    waiting: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)


def test_nothing_is_imported_at_once_that_only_posix_has() -> None:
    found = {str(path): bad for path in SOURCES if (bad := POSIX_ONLY & set(imports_at_once(path)))}
    assert not found


def test_files_are_synced_while_they_are_open_for_writing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fcntl = pytest.importorskip("fcntl")
    synced = []

    def sync(descriptor: int) -> None:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    artefact._write_file(tmp_path / "x", b"content")
    monkeypatch.setattr(training_state.TrainingState, "dumps", lambda _: "{}")
    state = object.__new__(training_state.TrainingState)
    training_state.write_state(tmp_path / "state", {"weight": torch.zeros(1)}, state)
    assert len(synced) == 2


# ---- processors


def other_machine(monkeypatch: pytest.MonkeyPatch, system: str, processor: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6 Model 143")
    monkeypatch.setattr(machine, "_cpu_flags", machine._cpu_flags.__wrapped__)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)


@pytest.mark.parametrize(("avx512", "simd"), [(True, "avx512"), (False, "avx2")])
def test_a_processor_under_windows(monkeypatch: pytest.MonkeyPatch, avx512: bool, simd: str) -> None:
    other_machine(monkeypatch, "win32", "AMD64")
    monkeypatch.setattr(machine, "_cpuinfo", lambda *_: "")
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    described = machine.describe_machine()
    assert (described.simd, described.cores) == (simd, os.cpu_count())
    assert described.cpu == "Intel64 Family 6 Model 143"
    assert machine.int8_dot_products() == avx512
    assert machine.bfloat16_is_slow() != avx512


@pytest.mark.parametrize(
    ("flags", "slow"),
    [
        ("avx2", True),
        ("avx512f avx512bw avx512_vnni", True),
        ("avx512f avx512_bf16", False),
        ("amx_bf16", False),
    ],
)
def test_bfloat16_is_slow_without_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, flags: str, slow: bool
) -> None:
    other_machine(monkeypatch, "linux", "x86_64")
    monkeypatch.setattr(machine, "_cpuinfo", lambda *_: flags)
    assert machine.bfloat16_is_slow() is slow


@pytest.mark.parametrize(
    ("features", "simd", "vnni"),
    [("AVX2 BMI2 AVX512F AVX512BW AVX512VNNI", "avx512", True), ("AVX2 BMI2", "avx2", False)],
)
def test_a_processor_under_macos(
    monkeypatch: pytest.MonkeyPatch, features: str, simd: str, vnni: bool
) -> None:
    other_machine(monkeypatch, "darwin", "x86_64")
    values = {"machdep.cpu.leaf7_features": features, "machdep.cpu.brand_string": "Intel Core i7"}
    monkeypatch.setattr(machine, "_sysctl", values.__getitem__)
    described = machine.describe_machine()
    assert (described.simd, described.cpu) == (simd, "Intel Core i7")
    assert machine.int8_dot_products() == vnni
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert machine.describe_machine().simd == "arm64"
    assert machine.int8_dot_products()


def test_macos_without_its_own_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other_machine(monkeypatch, "darwin", "x86_64")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    described = machine.describe_machine()
    assert (described.simd, described.cpu) == ("avx512", "Intel64 Family 6 Model 143")


def test_linux_and_pytorch_agree_about_this_processor() -> None:
    if not machine._cpuinfo("flags"):
        pytest.skip("no list of flags here")
    assert machine._flags_of_torch() <= machine._cpu_flags()
