"""A run that was interrupted at any moment ends with the weights of one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from groupify.data.splits import DataSplits
from groupify.errors import ArtefactError, DataError, SpecError
from groupify.training.finetuning import FinetuneResult, finetune
from groupify.training.history import LogSettings
from groupify.training.state import Checkpointing, library_states, read_state, set_library_states
from tests.conftest import ROOT
from tests.training.nets import SETTINGS, SOURCES, Stream, assert_equal_states, make_data, splits, state_of

HARD = dataclasses.replace(
    SETTINGS, epochs=2.4, augment=True, ema_decay=0.9, accumulate=2, validations_per_epoch=3
)


class Killed(BaseException):
    """Stands for the end of the process."""


class Noise:
    """An augmentation that draws from every generator there is, and dies at some call."""

    def __init__(self, last_call: int | None = None) -> None:
        self.calls_left = last_call

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Killed
        noise = torch.randn(images.shape, generator=generator) + random.random() + float(np.random.rand())
        return images + 0.1 * noise + 0.01 * torch.rand(images.shape)


class NoisyStream(Stream):
    """A stream that draws from the global generators, as a random transform does."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for image, label in super().__iter__():
            yield image + 0.1 * torch.rand(()) + 0.1 * random.random(), label


def interrupted(
    student: nn.Module, data: Callable[[], Any], path: Path, kills: list[int], **options: Any
) -> FinetuneResult:
    """Run, killed in the given steps, each counted from the last start; then run to the end."""
    for kill in kills:
        with pytest.raises(Killed):
            finetune(
                student,
                splits(data(), augment=Noise(kill)),
                checkpointing=Checkpointing(path, interval=4, resume=True),
                **options,
            )
    return finetune(
        student,
        splits(data(), augment=Noise()),
        checkpointing=Checkpointing(path, interval=4, resume=True),
        **options,
    )


def resuming(path: Path) -> Checkpointing:
    return Checkpointing(path, resume=True)


def assert_same(resumed: FinetuneResult, whole: FinetuneResult) -> None:
    assert_equal_states(state_of(resumed.model), state_of(whole.model))
    assert_equal_states(state_of(resumed.last_model), state_of(whole.last_model))
    assert resumed.best_step == whole.best_step
    assert [dataclasses.replace(row, images_per_second=None) for row in resumed.history] == [
        dataclasses.replace(row, images_per_second=None) for row in whole.history
    ]


KINDS: dict[str, Callable[[], Any]] = {
    "map-style": lambda: TensorDataset(*make_data()),
    **{kind: lambda make=make: make(*make_data()) for kind, make in SOURCES.items()},  # type: ignore[misc]
    "loader with a generator": lambda: DataLoader(
        TensorDataset(*make_data()), batch_size=25, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
}


@pytest.mark.parametrize(("kind", "optimizer"), [*((kind, "sgd") for kind in KINDS), ("map-style", "adamw")])
def test_an_interrupted_run_ends_alike(
    dense: nn.Module, student: nn.Module, tmp_path: Path, kind: str, optimizer: str
) -> None:
    settings = dataclasses.replace(HARD, images_per_epoch=200, optimizer=optimizer)
    options = {"teacher": dense, "settings": settings}
    whole = finetune(student, splits(KINDS[kind](), augment=Noise()), **options)  # type: ignore[arg-type]
    # Before the first state, within the first pass, and in the second one.
    resumed = interrupted(student, KINDS[kind], tmp_path / "state", [2, 6, 7], **options)
    assert_same(resumed, whole)


def test_random_numbers_of_a_stream_go_on_where_they_were(student: nn.Module, tmp_path: Path) -> None:
    settings = dataclasses.replace(HARD, images_per_epoch=200)
    validation = TensorDataset(*make_data(50))

    def stream() -> Any:
        return NoisyStream(*make_data())

    options = {"settings": settings, "validation": validation}
    whole = finetune(student, splits(stream(), augment=Noise()), **options)  # type: ignore[arg-type]
    assert_same(interrupted(student, stream, tmp_path / "state", [6, 9], **options), whole)


def test_a_finished_run_trains_no_further(student: nn.Module, data: TensorDataset, tmp_path: Path) -> None:
    checkpointing = Checkpointing(tmp_path / "state", resume=True)
    first = finetune(student, splits(data), settings=SETTINGS, checkpointing=checkpointing)
    # What was held out is looked at again, four views of each of three batches: no image is trained on.
    noise = Noise(12)
    again = finetune(student, splits(data, augment=noise), settings=SETTINGS, checkpointing=checkpointing)
    assert_same(again, first)
    assert noise.calls_left == 0


def test_without_resume_a_state_is_not_read(student: nn.Module, data: TensorDataset, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("rubbish")
    finetune(student, splits(data), settings=SETTINGS, checkpointing=Checkpointing(tmp_path / "state"))
    _, state = read_state(tmp_path / "state")
    assert state.step == 30


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x08" + bytes(7) + b'{"a":1}x'])
def test_a_damaged_state_is_refused(
    student: nn.Module, data: TensorDataset, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ArtefactError, match="cannot read the training state"):
        finetune(
            student,
            splits(data),
            settings=SETTINGS,
            checkpointing=Checkpointing(tmp_path / "state", resume=True),
        )


def test_another_safetensors_file_is_refused(student: nn.Module, data: TensorDataset, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "state")
    with pytest.raises(ArtefactError, match="is no training state"):
        finetune(
            student,
            splits(data),
            settings=SETTINGS,
            checkpointing=Checkpointing(tmp_path / "state", resume=True),
        )


def test_the_state_of_another_run_is_refused(
    dense: nn.Module, student: nn.Module, data: TensorDataset, tmp_path: Path
) -> None:
    path = tmp_path / "state"
    finetune(student, splits(data), settings=SETTINGS, checkpointing=Checkpointing(path))
    resume = Checkpointing(path, resume=True)
    for model, settings, words in (
        (student, dataclasses.replace(SETTINGS, seed=1), "its settings is"),
        (dense, SETTINGS, "hash of the weights before"),
    ):
        with pytest.raises(SpecError, match=words) as raised:
            finetune(model, splits(data), settings=settings, checkpointing=resume)
        assert "\n" not in str(raised.value)


def test_a_stream_that_has_changed_is_noticed(student: nn.Module, tmp_path: Path) -> None:
    images, labels = make_data()
    validation = TensorDataset(images[:50], labels[:50])
    options: dict[str, Any] = {
        "settings": dataclasses.replace(HARD, images_per_epoch=200),
        "validation": validation,
    }
    streams = iter([Stream(images, labels), Stream(images, labels.flip(0))])
    with pytest.raises(DataError, match="other labels than in the interrupted run"):
        interrupted(student, lambda: next(streams), tmp_path / "state", [6], **options)
    short = splits(Stream(images[:32], labels[:32]), augment=Noise())
    with pytest.raises(DataError, match="gave 4 batches before and ends after 2 now"):
        finetune(student, short, checkpointing=resuming(tmp_path / "state"), **options)


def test_the_log_goes_on_where_the_state_is(student: nn.Module, data: TensorDataset, tmp_path: Path) -> None:
    log = LogSettings(tmp_path / "log.jsonl", interval=1)
    interrupted(student, lambda: data, tmp_path / "state", [6, 5], settings=HARD, log=log)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 25))


def test_the_caller_s_random_states_are_left_alone(student: nn.Module, data: TensorDataset) -> None:
    loader = KINDS["loader with a generator"]()
    before = library_states(), torch.get_rng_state(), loader.generator.get_state()
    finetune(student, splits(loader, augment=Noise()), settings=HARD, validation=data)
    after = library_states(), torch.get_rng_state(), loader.generator.get_state()
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])


def test_library_states_survive_json() -> None:
    before = library_states()
    random.gauss(0, 1), np.random.normal()
    states = json.loads(json.dumps(library_states()))
    expected = random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand()
    set_library_states(states)
    assert (random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand()) == expected
    set_library_states(before)


# a process of its own, and SIGKILL -----------------------------------------------------------------


class Slow(IterableDataset[tuple[Tensor, Tensor]]):
    """Images that take their time, so that a signal meets the run at work."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 200

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for image, label in zip(*make_data(), strict=True):
            time.sleep(self.seconds)
            yield image, label


def run_in_process(folder: Path, seconds: float) -> FinetuneResult:
    torch.set_num_threads(1)
    student = torch.nn.Sequential(*_layers())
    student.load_state_dict(load_file(folder / "student"))
    data: DataSplits = splits(Slow(seconds), augment=Noise())
    checkpointing = Checkpointing(folder / "state", interval=1, resume=True)
    return finetune(student, data, settings=HARD, checkpointing=checkpointing)


def _layers() -> list[nn.Module]:
    from groupify.conversion.surgery import restructure
    from groupify.structures import SiteRecipe, Structure
    from tests.training.nets import make_net

    return list(restructure(make_net(), [SiteRecipe("3", Structure(groups=8))]).children())


@pytest.mark.slow
def test_a_killed_process_is_resumed_bit_for_bit(student: nn.Module, tmp_path: Path) -> None:
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        save_file(student.state_dict(), tmp_path / name / "student")
    whole = run_in_process(tmp_path / "whole", 0.0)

    command = [sys.executable, "-m", "tests.training.test_resume", str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    state = tmp_path / "killed" / "state"
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        wait_for_step(state, 2, process)
        time.sleep(random.Random(0).uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
    assert 0 < _step(state) < 24
    resumed = run_in_process(tmp_path / "killed", 0.0)
    assert_equal_states(state_of(resumed.model), state_of(whole.model))
    assert_equal_states(state_of(resumed.last_model), state_of(whole.last_model))


def wait_for_step(state: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 500
    while _step(state) < step:
        assert process.poll() is None, "the process ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _step(path: Path) -> int:
    return read_state(path)[1].step if path.exists() else 0


if __name__ == "__main__":
    run_in_process(Path(sys.argv[1]), 0.004)
