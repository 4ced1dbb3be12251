"""What can go wrong around a conversion: each has one line, and an earlier artefact stays as it was.

Beside these: a full disk and a vanished folder in pipeline/test_output_folder.py, test_artefact.py and
test_commands.py; NaN, labels out of range and empty data in data/test_data.py, test_scores.py and
conversion/test_convert.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import groupify
from groupify import machine
from groupify.data import batches
from groupify.data.batches import iterate_batches
from groupify.errors import DataError, GroupifyError
from groupify.machine import blocked_width
from groupify.models.specs import ModelSpec, WeightsOrigin
from tests.conftest import ROOT, Run
from tests.conversion.nets import SHAPE, Residual, images, randomise

ANY_WIDTH = groupify.Rules(min_group_width=1)
SPEC = ModelSpec("tests.conversion.nets:Residual", {}, SHAPE, None)


def artefact(net: nn.Module) -> groupify.Recipe:
    plan = groupify.plan(net, SHAPE, groups=4, rules=ANY_WIDTH)
    return groupify.Recipe(SPEC, WeightsOrigin("factory"), plan.recipes)


def converted(seed: int) -> tuple[nn.Module, groupify.Recipe]:
    net = randomise(Residual(), seed).eval()
    recipe = artefact(net)
    return groupify.convert(net, groupify.plan(net, SHAPE, groups=4, rules=ANY_WIDTH), images()).model, recipe


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("syncs", [0, 1])
def test_a_process_killed_during_save_leaves_the_earlier_artefact(syncs: int, tmp_path: Path) -> None:
    model, recipe = converted(0)
    groupify.save(tmp_path / "out", model, recipe)
    other, _ = converted(1)
    done = 0

    def killing(descriptor: object) -> None:
        nonlocal done
        if done == syncs:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    child = os.fork()
    if child == 0:  # pragma: no cover - the child is killed
        os.fsync = killing  # type: ignore[assignment]
        try:
            groupify.save(tmp_path / "out", other, recipe, force=True)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    x = images(2)
    with torch.no_grad():
        assert torch.equal(groupify.load(tmp_path / "out", model=Residual())(x), model(x))
    # What the dead process left behind is no obstacle.
    groupify.save(tmp_path / "out", other, recipe, force=True)
    with torch.no_grad():
        assert torch.equal(groupify.load(tmp_path / "out", model=Residual())(x), other(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_process_killed_between_the_renames_leaves_the_earlier_artefact(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = converted(0)
    groupify.save(tmp_path / "out", model, recipe)
    other, _ = converted(1)
    rename = Path.rename

    def killing(self: Path, to: Path) -> Path:
        if self.suffix == ".partial":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, to)

    def kill_a_save() -> None:
        child = os.fork()
        if child == 0:  # pragma: no cover - the child is killed
            monkeypatch.setattr(Path, "rename", killing)
            try:
                groupify.save(tmp_path / "out", other, recipe, force=True)
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert not (tmp_path / "out").exists()

    kill_a_save()
    x = images(2)
    with pytest.warns(groupify.GroupifyWarning, match="what was there before is back"), torch.no_grad():
        assert torch.equal(groupify.load(tmp_path / "out", model=Residual())(x), model(x))
    kill_a_save()
    outcome = run("export", "out", "--trust", "--python", "net.py")
    assert outcome.code == 0, outcome.err
    assert "what was there before is back" in outcome.err
    kill_a_save()
    with pytest.warns(groupify.GroupifyWarning, match="what was there before is back"):
        groupify.save(tmp_path / "out", other, recipe, force=True)
    with torch.no_grad():
        assert torch.equal(groupify.load(tmp_path / "out", model=Residual())(x), other(x))
    assert not list(tmp_path.glob(".out.*.old"))


_LOADER = """
import os, signal, sys, time, torch
from torch.utils.data import DataLoader, Dataset
from groupify.data.batches import iterate_batches
from groupify.errors import DataError

class Dying(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        if index == 5:
            {dying}
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 8, 8), index

try:
    for _ in iterate_batches(DataLoader(Dying(), 2, num_workers=1, multiprocessing_context="fork"), 2):
        time.sleep({pause})
except DataError as error:
    print(error)
    time.sleep({pause})
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
@pytest.mark.parametrize(
    ("dying", "pause"),
    # A process that dies closes its files first, and only then is its parent told.
    [("pass", 0), ("os.closerange(2, 256); time.sleep(1.5)", 1)],
    ids=["at once", "slowly"],
)
def test_a_dead_worker_of_a_data_loader_is_one_line(dying: str, pause: int) -> None:
    # In a process of its own: torch reports the death from a signal handler, wherever the process is then.
    source = _LOADER.format(dying=dying, pause=pause)
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout.startswith("a worker of the data loader died (")
    assert ended.stdout.count("\n") == 1
    assert not ended.stderr


class _Ended:
    """A process that ended."""

    def __init__(self) -> None:
        self.sentinel, end = os.pipe()
        os.close(end)

    def join(self, timeout: float) -> None:
        os.close(self.sentinel)


class _Cut:
    """What a loader's iterator does when a worker dies while it hands over a tensor."""

    def __init__(self, workers: int, error: Exception) -> None:
        self._workers = [_Ended() for _ in range(workers)]
        self._error = error

    def __iter__(self) -> _Cut:
        return self

    def __next__(self) -> None:
        raise self._error


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError("reset")])
def test_a_worker_that_dies_while_it_hands_over_is_one_line(error: Exception) -> None:
    with pytest.raises(DataError, match="a worker of the data loader died"):
        list(batches._watched(_Cut(1, error)))
    with pytest.raises(type(error)):  # the data set's own, without workers
        list(batches._watched(_Cut(0, error)))
    with pytest.raises(ConnectionError, match="Caught"):  # the data set's own, from a worker
        list(batches._watched(_Cut(1, ConnectionError("Caught ConnectionError in DataLoader worker"))))


class _Broken(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise RuntimeError("the data set's own error")


def test_an_error_of_the_data_set_itself_goes_through() -> None:
    with pytest.raises(RuntimeError, match="the data set's own error"):
        list(iterate_batches(DataLoader(_Broken(), batch_size=2), 2))


@pytest.mark.parametrize(("flags", "simd", "width"), [
    ({"sse4_2", "avx", "avx2"}, "avx2", 8), ({"sse4_2"}, "baseline", 8), (set(), "baseline", 8),
    ({"avx2", "avx512f"}, "avx512", 16),
])  # fmt: skip
def test_a_cpu_without_avx_512(
    flags: set[str], simd: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert machine.describe_machine().simd == simd
    assert blocked_width() == width


@pytest.mark.slow
def test_a_failing_export_leaves_the_earlier_output(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, recipe = converted(0)
    groupify.save(tmp_path / "out", model, recipe)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no rule for aten::odd")

    monkeypatch.setattr("torch.onnx.export", fail)
    outcome = run("convert", "demo", "--groups", "4", "-o", "out", "--force", "--quiet")
    assert outcome.code == 2
    assert "no rule for aten::odd" in outcome.err
    assert outcome.err.strip().count("\n") == outcome.err.count("groupify: warning")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    groupify.load(tmp_path / "out", model=Residual())


def test_one_image_is_enough_to_convert_and_evaluate() -> None:
    net = randomise(Residual()).eval()
    one = [(images(1), torch.tensor([3]))]
    found = groupify.plan(net, SHAPE, groups=2, rules=ANY_WIDTH)
    with pytest.warns(groupify.GroupifyWarning, match="fewer samples than inputs"):
        result = groupify.convert(net, found, groupify.calibration_images(one, 5, seed=0))
    accuracy = groupify.evaluate(result.model, one)
    assert accuracy.images == 1
    with pytest.raises(GroupifyError, match="label 3"):
        groupify.evaluate(nn.Sequential(result.model, nn.Linear(5, 2)), one)
