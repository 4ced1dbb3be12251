"""The layout holds: imports run one way, and a module is where its name says.

Imports inside functions and under ``TYPE_CHECKING`` count like the others.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import groupify
from tests.conftest import ROOT

# A module imports from its own line and the lines above it.
ORDER = """
errors stages machine memory devices kept files strict_json documents structures
graph
models data
tasks
stats paired scores
decomposition
conversion
training
artefact recipe
onnx
measure
planning
reporting
pipeline
cli
"""
LINES = {name: number for number, line in enumerate(ORDER.split("\n")) for name in line.split()}

HEAVY = ("torch", "pydantic", "rich", "matplotlib", "onnxruntime")


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {_name(path): path for path in sorted((ROOT / "groupify").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in PATHS.items()}
# These see all others: the public names, and ``python -m groupify``.
INNER = sorted(set(TREES) - {"groupify", "groupify.__main__"})


def _imports(module: str) -> Iterator[str]:
    """The modules of groupify that ``module`` imports, anywhere in it."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in TREES else str(node.module) for name in inside]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "groupify" and name != module)


def _unit(module: str) -> str:
    """The word of ``ORDER`` that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def _circles(edges: dict[str, set[str]]) -> Iterator[str]:
    """Whatever is reached from itself."""
    for start in edges:
        reached: set[str] = set()
        waiting = [*edges[start]]
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting += edges.get(name, ())
        if start in reached:
            yield start


def upward() -> Iterator[str]:
    """Modules that import from a line below their own, or have no line."""
    for module in INNER:
        line = LINES.get(_unit(module), -1)
        if line < 0 or any(LINES.get(_unit(name), len(LINES)) > line for name in _imports(module)):
            yield module


def circles_of_modules() -> Iterator[str]:
    return _circles({module: set(_imports(module)) for module in INNER})


def circles_of_packages() -> Iterator[str]:
    edges: dict[str, set[str]] = {}
    for module in INNER:
        unit = _unit(module)
        edges.setdefault(unit, set()).update({_unit(name) for name in _imports(module)} - {unit})
    return _circles(edges)


def named_like_a_function() -> Iterator[str]:
    """Modules that would hide a public function, or be hidden by it."""
    functions = {name for name in groupify.__all__ if not isinstance(getattr(groupify, name), (type, str))}
    return (module for module in INNER if module.rpartition(".")[2] in functions)


def full_packages() -> Iterator[str]:
    """Packages whose ``__init__`` holds more than a docstring."""
    return (m for m in INNER if PATHS[m].name == "__init__.py" and len(TREES[m].body) > 1)


def without_docstring() -> Iterator[str]:
    return (module for module in TREES if ast.get_docstring(TREES[module]) is None)


KINDS = [
    upward, circles_of_modules, circles_of_packages, named_like_a_function, full_packages, without_docstring,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_nothing_breaks_the_layout(kind: Callable[[], Iterator[str]]) -> None:
    assert list(kind()) == []


def test_the_command_line_starts_light() -> None:
    code = f"import sys, groupify.cli.main; print(sorted(set({HEAVY}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "[]\n"
