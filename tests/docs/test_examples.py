"""The README's Python and the examples run as they are printed, on few images."""

from __future__ import annotations

import ast
import importlib.util
import re
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn
from torch.utils.data import Subset

import groupify
from groupify.data.splits import DataSplits
from groupify.models.specs import ModelSpec
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
    assert splits.train is not None
    splits = replace(splits, train=Subset(splits.train, range(64)))  # type: ignore[arg-type]

    def load_data(spec: str, model_spec: ModelSpec) -> DataSplits:
        assert (spec, model_spec.name) == ("demo", "demo")
        return splits

    monkeypatch.setattr(groupify, "load_data", load_data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_readme_s_python(few_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    statements = ast.parse(code).body
    assert len(statements) - 1 <= 10  # the import apart
    exec(compile(code, "README.md", "exec"), {})
    *shown, last = capsys.readouterr().out.splitlines()
    (accuracy,) = (line for line in shown if line.startswith("top-1 on 200 test images: dense "))
    dense, converted = (float(number) for number in re.findall(r"([\d.]+)%", accuracy))
    assert dense > 90
    assert converted > 75
    times = ast.literal_eval(last)
    assert 0 < times["grouped"] < times["dense"]
    assert sorted(path.name for path in few_images.iterdir()) == ["demo-tuned", "dense.onnx", "grouped.onnx"]


@pytest.mark.slow
def test_five_minute_tour(few_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = example("five_minute_tour").main(few_images, images=64, epochs=1)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "limit", "sizes", "metric"),
    [("segmentation", 48, 2.0, "32×32 and", "miou"), ("super_resolution", 96, 0.5, "16×16 and", "psnr")],
)
def test_tasks_without_classes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    count: int,
    limit: float,
    sizes: str,
    metric: str,
) -> None:
    measured = example(name).main(tmp_path, count)
    assert measured["converted"] >= measured["dense"] - limit
    assert (
        measured["tuned"] > measured["converted"] - limit / 4
    )  # the loss chooses the weights, not the metric
    out = capsys.readouterr().out
    assert f"metric {metric} (higher is better): dense " in out
    assert f"{name}.onnx, checked at {sizes}" in out


@pytest.mark.slow
def test_plain_training_loop(capsys: pytest.CaptureFixture[str]) -> None:
    splits = part_of_the_demo()
    accuracies = example("plain_training_loop").main(
        splits.train, splits.test, epochs=4, convert_after=3, images=48
    )
    dense, converted, grouped = accuracies[-3:]
    assert len(accuracies) == 5
    assert dense > 0.4  # three epochs on 300 images
    assert converted > dense - 0.15
    assert grouped > dense - 0.1
    assert "converted: " in capsys.readouterr().out


@pytest.mark.slow
def test_lightning_loop(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is optional: pip install lightning")
    splits = part_of_the_demo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
        module = example("lightning_loop").main(
            splits.train, splits.test, epochs=2, convert_after=1, images=48, folder=tmp_path, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", limit_train_batches=3, limit_val_batches=1, num_sanity_val_steps=0,
        )  # fmt: skip
    groups = {conv.groups for conv in module.model.modules() if isinstance(conv, nn.Conv2d)}
    assert max(groups) == 4
    (optimizer,) = [module.optimizers(use_pl_optimizer=False)]
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in module.model.parameters()}


def test_the_readme_s_commands_are_those_of_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    quick_starts = re.findall(r"groupify convert demo.*?(?=  |`)", README)
    (_,) = [quick_start for quick_start in quick_starts if quick_start in ci]
    for words in ("pip install .", "pip install -e '.[dev,docs]'", "scripts/test"):
        assert words in README or words.replace("'", '"') in README
        assert words.removeprefix("pip install ") in ci


def test_public_names() -> None:
    assert sorted(groupify.__all__) == groupify.__all__
    for name in groupify.__all__:
        assert getattr(groupify, name).__doc__, name
    assert set(groupify.__all__) <= set(dir(groupify))
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        groupify.prune  # noqa: B018
