"""The README's Python and the examples run as they are printed, on few images."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import groupify
from tests.cli_nets import part_of_the_demo
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let ``groupify.load_data`` give the first images only; return the folder to write into."""
    splits = part_of_the_demo()

    def load_data(spec: str, model_spec: groupify.ModelSpec) -> groupify.DataSplits:
        assert (spec, model_spec.name) == ("demo", "demo")
        return splits

    monkeypatch.setattr(groupify, "load_data", load_data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_s_python(few_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    statements = ast.parse(code).body
    assert len(statements) - 1 <= 10  # the import apart
    exec(compile(code, "README.md", "exec"), {})
    accuracies, times = (ast.literal_eval(line) for line in capsys.readouterr().out.splitlines())
    assert accuracies["dense"] > 0.9
    assert accuracies["grouped"] > 0.75
    assert 0 < times["grouped"] < times["dense"]
    assert sorted(path.name for path in few_images.iterdir()) == ["demo-tuned", "dense.onnx", "grouped.onnx"]


def test_five_minute_tour(few_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = example("five_minute_tour").main(few_images, images=200, epochs=0.5)
    assert list(accuracy) == ["dense", "converted", "tuned"]
    assert accuracy["dense"] > 0.9
    assert min(accuracy.values()) > 0.75
    out = capsys.readouterr().out
    assert "conv1                    1 → 1  first conv: too few input channels (3)" in out
    assert f"dense      {100 * accuracy['dense']:.2f}%" in out
    assert (few_images / "tour" / "recipe.json").is_file()


def test_own_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = example("own_model").main(tmp_path, count=50)
    assert [site.reason for site in plan.sites] == [
        "first conv: too few input channels (3)",
        "excluded",
        None,
    ]
    out = capsys.readouterr().out
    assert "conv2: relative error of the fit 0." in out
    assert f"wrote {tmp_path / 'own-g4.onnx'}" in out


def test_the_readme_s_commands_are_those_of_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    (quick_start,) = re.findall(r"^groupify convert demo.*?(?=  )", README, flags=re.MULTILINE)
    assert quick_start in ci
    for words in ("pip install .", "pip install -e '.[dev]'", "scripts/test"):
        assert words in README or words.replace("'", '"') in README
        assert words.removeprefix("pip install ") in ci


def test_public_names() -> None:
    assert sorted(groupify.__all__) == groupify.__all__
    for name in groupify.__all__:
        assert getattr(groupify, name).__doc__, name
    assert set(groupify.__all__) <= set(dir(groupify))
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        groupify.prune  # noqa: B018
