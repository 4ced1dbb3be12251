from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from groupify.data.splits import load_data
from groupify.models.specs import ModelSpec
from groupify.training.learner import Learner
from scripts.benchmarks import recovery
from scripts.benchmarks.harness import Results
from scripts.benchmarks.methods import Setting
from scripts.benchmarks.recovery import KEYS, OURS, Recovery, Row, order
from scripts.benchmarks.rivals import Way, scores_on
from scripts.benchmarks.training import RememberingTeacher, Trainer, Twin
from tests import cli_nets


def noisy(setting: Setting, macs: int) -> nn.Module:
    """The dense net, but for a little noise."""
    model = copy.deepcopy(setting.dense)
    generator = torch.Generator().manual_seed(setting.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def halved(setting: Setting, macs: int) -> nn.Module:
    assert macs == round(setting.macs(setting.dense) / 2)
    return copy.deepcopy(setting.dense)


def refused(*_: object) -> nn.Module:
    raise AssertionError("measured again")


def bench(folder: Path, methods: Mapping[str, Way], monkeypatch: pytest.MonkeyPatch) -> Recovery:
    """The benchmark of a tiny net, which is its own twin, with a tenth of its images to test on."""
    monkeypatch.setattr(recovery, "METHODS", methods)
    monkeypatch.setattr(recovery, "SAVED_EVERY", 1)
    torch.manual_seed(0)
    model = cli_nets.net()
    splits = load_data("tests.cli_nets:data", ModelSpec("net", {}, (3, 8, 8), None))
    settings = [Setting(model, torch.randn(8, 3, 8, 8), seed) for seed in range(2)]
    results = Results(Row, KEYS, folder / "recovery.json", {}, order)
    teacher = RememberingTeacher(model)
    assert splits.test is not None
    twin = Twin(settings[0], teacher, splits, splits.test)
    trainer = Trainer(teacher, splits, results, (0.001, 0.01), lambda: twin)
    test = functools.partial(scores_on, splits.test, 8)
    return Recovery(settings, test, trainer, results, folder / "states")


def test_each_run_is_a_row_and_none_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {OURS: noisy, "rival": halved}
    measured = bench(tmp_path, methods, monkeypatch)
    measured.run([2.0], [0.5, 0.0], "groupify*|rival*seed=1")
    rows = measured.results.rows
    assert list(rows) == [
        (OURS, 2.0, 0.0, 0), (OURS, 2.0, 0.0, 1), (OURS, 2.0, 0.5, 0), (OURS, 2.0, 0.5, 1),
        ("rival", 2.0, 0.0, 1), ("rival", 2.0, 0.5, 1),
    ]  # fmt: skip
    start, trained = rows["rival", 2.0, 0.0, 1], rows["rival", 2.0, 0.5, 1]
    assert (start.drop, start.macs_ratio, start.trained) == (0, 1, None)
    assert start.divergence == pytest.approx(0, abs=1e-6)
    losses = measured.results.read()["learning_rates"]
    assert list(losses) == ["rival ÷2"]  # groupify's rate is its own
    assert trained.learning_rate == min((0.001, 0.01), key=lambda rate: losses["rival ÷2"][f"{rate:g}"])
    assert rows[OURS, 2.0, 0.5, 0].learning_rate not in (None, 0.001, 0.01)
    assert trained.gain is not None
    assert not list((tmp_path / "states").iterdir())
    bench(tmp_path, dict.fromkeys(methods, refused), monkeypatch).run([2.0], [0.5, 0.0], "groupify*")


def test_a_training_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path) -> Row:
        measured = bench(folder, {OURS: noisy}, monkeypatch)
        measured.run([2.0], [1.0], "*seed=0")
        (row,) = measured.results.rows.values()
        return row

    wanted, step, steps = run(tmp_path / "whole"), Learner.step, []

    def stopping(self: Learner, number: int, *others: Any) -> bool:
        steps.append(number)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(self, number, *others)

    monkeypatch.setattr(Learner, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert [path.suffix for path in (tmp_path / "states").iterdir()] == [".state"]
    found = run(tmp_path)
    assert steps[:3] == [1, 2, 2]
    assert replace(found, seconds=0) == replace(wanted, seconds=0)
    assert not list((tmp_path / "states").iterdir())
