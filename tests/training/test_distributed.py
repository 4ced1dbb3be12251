"""Two processes with gloo train as one does, but for rounding; the first one alone converts and speaks."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.utils.data import TensorDataset

from groupify.conversion.surgery import restructure
from groupify.data.ranks import Ranks, process_group
from groupify.errors import GroupifyWarning, SpecError
from groupify.pipeline import run as pipeline_run
from groupify.scores import evaluate
from groupify.structures import SiteRecipe, Structure
from groupify.training import finetuning
from groupify.training.finetuning import FinetuneResult, finetune
from groupify.training.holdout import hold_out
from groupify.training.processes import Speeds, measure_speeds
from groupify.training.settings import FinetuneSettings
from groupify.training.shared_norm import SharedBatchNorm, synchronise_batch_norms
from tests.conftest import ROOT, Run
from tests.training.nets import SETTINGS, SOURCES, make_data, make_net, splits

# Batches of 15 of 160 images: shares of 8 and 7, and of 5 and 5 at the end.
TRAINING = dataclasses.replace(SETTINGS, epochs=1.3, batch_size=15, validations_per_epoch=2)
FINETUNES: dict[str, tuple[str, FinetuneSettings]] = {
    "plain": ("map-style", TRAINING),
    "all, AdamW": (
        "stream with a length",
        dataclasses.replace(
            TRAINING, optimizer="adamw", learning_rate=0.001, ema_decay=0.9, distill="attention",
            channels_last=True,
        ),
    ),
    "no labels": ("batches", dataclasses.replace(TRAINING, labels=False, freeze_batch_norms=True)),
    # The outputs of this net hardly vary, so that its relative error is steep.
    "outputs": ("map-style", dataclasses.replace(TRAINING, labels=False, learning_rate=1e-4)),
    "own loss": ("stream with a length", TRAINING),
}  # fmt: skip


def seeded_net(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_net()


def squared(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores - nn.functional.one_hot(labels, scores.shape[1])).square().mean()


def run_finetune(name: str, *, distributed: bool) -> FinetuneResult:
    kind, settings = FINETUNES[name]
    dense = seeded_net(0)
    for module in dense.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each process drops others
    student = restructure(dense, [SiteRecipe("3", Structure(groups=4))])
    images, labels = make_data()
    train = TensorDataset(images, labels) if kind == "map-style" else SOURCES[kind](images, labels)
    task, loss = ("outputs" if name == "outputs" else "auto"), (squared if name == "own loss" else None)
    return finetune(
        student,
        splits(train),
        teacher=dense,
        settings=settings,
        loss=loss,
        task=task,
        distributed=distributed,
    )


def rows_of(result: FinetuneResult) -> list[list[float]]:
    return [
        [row.step, row.loss or 0.0, row.validation_top1 or 0.0, row.validation_loss] for row in result.history
    ]


def work(folder: Path) -> None:
    """What each of the processes does; the first one writes."""
    torch.set_num_threads(1)
    with process_group() as ranks:
        assert ranks.world == 2
        measured: dict[str, Any] = {}
        states: dict[str, dict[str, Tensor]] = {}
        for name in FINETUNES:
            result = run_finetune(name, distributed=True)
            states[f"finetune {name}"] = result.last_model.state_dict()
            measured[f"finetune {name}"] = rows_of(result)
        measured["warnings"] = warnings_of_processes()
        data = TensorDataset(*make_data(33))
        accuracy = evaluate(seeded_net(0).eval(), data, batch_size=8, ranks=ranks)
        measured["evaluate"] = [[accuracy.top1, accuracy.images]]
        shared = seeded_net(ranks.rank)
        if ranks.first:
            shared.to(memory_format=torch.channels_last)
        save(ranks.share_weights(shared).state_dict(), folder / f"shared {ranks.rank}")
        if ranks.first:
            (folder / "measured").write_text(json.dumps(measured))
            for name, state in states.items():
                save(state, folder / name)


def warnings_of_processes() -> list[str]:
    """What is said of two processes that are slower than one, and of others that are faster or done soon."""
    said, threads, measure = [], torch.get_num_threads(), measure_speeds
    for share, least in ((0.0, 1), (1e6, 1), (0.0, 1000)):

        def with_share(*given: Any, share: float = share) -> Speeds:
            found = measure(*given)
            assert min(found.together, found.alone) > 0
            assert torch.get_num_threads() == threads
            return dataclasses.replace(found, together=share * found.alone)

        with (
            mock.patch.object(finetuning, "measure_speeds", with_share),
            mock.patch.object(finetuning, "LEAST_STEPS", least),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            run_finetune("plain", distributed=True)
        said += [str(one.message) for one in caught if one.category is GroupifyWarning]
    return said


def save(state: dict[str, Tensor], file: Path) -> None:
    save_file({key: value.clone().contiguous() for key, value in state.items()}, file)


def torchrun(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return subprocess.run(
        list(map(str, (*launcher, *command))),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = torchrun("-m", "tests.training.test_distributed", folder, folder=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def assert_alike(
    folder: Path, name: str, model: nn.Module, rows: list[list[float]], tolerance: float
) -> None:
    for measured, expected in zip(json.loads((folder / "measured").read_text())[name], rows, strict=True):
        assert measured == pytest.approx(expected, rel=10 * tolerance, abs=10 * tolerance)
    state = load_file(folder / name)
    for key, value in model.state_dict().items():
        # In front of a batch norm a bias has no gradient but rounding, which AdamW scales up.
        if not name.endswith("AdamW") or not key.endswith(("0.bias", "3.bias", "running_mean")):
            torch.testing.assert_close(
                state[key], value, rtol=tolerance, atol=tolerance, msg=f"{name}: {key}"
            )
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    images = make_data(20)[0]
    torch.testing.assert_close(other(images), model(images), rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.slow
def test_every_rank_gets_the_weights_of_the_first(of_two: Path) -> None:
    for rank in (0, 1):
        received = load_file(of_two / f"shared {rank}")
        for key, value in seeded_net(0).state_dict().items():
            assert torch.equal(received[key], value), (rank, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", FINETUNES)
def test_a_training_on_two_ranks_is_that_of_one(of_two: Path, name: str) -> None:
    result = run_finetune(name, distributed=False)
    rows = rows_of(result)
    assert len(rows) > 2
    assert_alike(of_two, f"finetune {name}", result.last_model, rows, 2e-4)


@pytest.mark.slow
def test_processes_that_are_slower_than_one_are_told_before_the_work(of_two: Path) -> None:
    (said,) = json.loads((of_two / "measured").read_text())["warnings"]
    assert re.fullmatch(
        r"2 processes train 0 images/s here, one process with \d+ threads? \d+: train without torchrun, "
        "which is faster",
        said,
    )


@pytest.mark.slow
def test_an_accuracy_is_that_of_all_images(of_two: Path) -> None:
    accuracy = evaluate(seeded_net(0).eval(), TensorDataset(*make_data(33)))
    assert json.loads((of_two / "measured").read_text())["evaluate"] == [[accuracy.top1, 33]]


@pytest.mark.slow
def test_the_command_line_under_torchrun(run: Run, tmp_path: Path) -> None:
    net = ("tests.cli_nets:net", "--input-size", "3,8,8", "--weights", "none")
    # The structures are chosen in one process.
    planned = run("plan", *net, "--quiet", "--save-plan", "plan.json")
    assert planned.code == 0, planned.err
    convert = (
        "convert", *net, "--data", "tests.cli_nets:data", "--calibrate", 90, "--plan", "plan.json", "--json",
    )  # fmt: skip
    training = (
        "--epochs", 2, "--batch-size", 16, "--log-file", "log.jsonl", "--log-every", 3, "--resume",
    )  # fmt: skip
    done = torchrun("-m", "groupify", *convert, *training, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one document, not two
    assert report["accuracy"]["images"] == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "net-planned", "plan.json"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps.count(12) == 2  # one training line and one validation

    # Each of two processes looked at half of the test images, with the model that one process gets.
    alone = run(*convert, "-o", "alone")
    assert alone.code == 0, alone.err
    assert json.loads(alone.out)["accuracy"]["converted"] == report["accuracy"]["converted"]


# without processes ---------------------------------------------------------------------------------


def test_structures_are_chosen_before_torchrun(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither groups nor a budget: each process would choose for itself."""
    monkeypatch.setattr(pipeline_run, "process_group", lambda: contextlib.nullcontext(Ranks(0, 2)))
    net = ("tests.cli_nets:net", "--input-size", "3,8,8", "--weights", "none", "--quiet")
    refused = run("convert", *net)
    assert refused.code == 2
    assert "structures are chosen for each conv in one process: write the plan with" in refused.err
    assert "MODEL --save-plan FILE', then give --plan FILE under torchrun; or give --groups 4" in refused.err
    assert list(tmp_path.iterdir()) == []
    # Groups leave nothing to choose: the first process converts, and would give the others its weights.
    monkeypatch.setattr(Ranks, "share_weights", share_with_nobody)
    assert run("convert", *net, "--groups", 2, "--min-group-width", 1).err.endswith("nobody to share with\n")


def share_with_nobody(ranks: Ranks, model: nn.Module) -> nn.Module:
    raise SpecError("nobody to share with")


@pytest.mark.parametrize("kind", ["map-style", *SOURCES])
@pytest.mark.parametrize("world", [2, 3])
def test_shares_make_up_each_batch(kind: str, world: int) -> None:
    images, labels = make_data()
    data = TensorDataset(images, labels) if kind == "map-style" else SOURCES[kind](images, labels)
    settings = dataclasses.replace(TRAINING, images_per_epoch=200)
    part, _ = hold_out(data, None, settings)
    whole = list(part.batches(settings, 1))
    for first in (0, 3):
        shares = [list(part.batches(settings, 1, first, Ranks(rank, world))) for rank in range(world)]
        for (batch, count), *parts in zip(whole[first:], *shares, strict=True):
            assert [number for _, number in parts] == [count] * world
            for rank, (share, _) in enumerate(parts):
                assert torch.equal(share[0].tensors[0], batch[0].tensors[0][rank::world])
                assert torch.equal(share[1], batch[1][rank::world])


@pytest.fixture
def alone_in_a_group() -> Any:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm2d(6), (5, 6, 4, 3)),
        (lambda: nn.BatchNorm1d(6, momentum=None), (5, 6)),
        (lambda: nn.BatchNorm2d(6, affine=False), (2, 6, 1, 1)),
        (lambda: nn.BatchNorm3d(6, track_running_stats=False), (2, 6, 2, 2, 2)),
    ],
)
def test_a_shared_batch_norm_is_a_batch_norm(
    alone_in_a_group: Ranks, make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    own = make()
    shared = synchronise_batch_norms(nn.Sequential(make()), alone_in_a_group)[0]  # type: ignore[index]
    assert isinstance(shared, SharedBatchNorm)
    for _ in range(3):
        values = 3 + 2 * torch.randn(shape, generator=generator)
        inputs = [values.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(each) for norm, each in zip((own, shared), inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0])
        weights = torch.randn(outputs[0].shape, generator=generator)
        for output in outputs:
            (output * weights).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    assert list(shared.state_dict()) == list(own.state_dict())
    for key, value in own.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[key], value)
    torch.testing.assert_close(shared.eval()(values), own.eval()(values))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
