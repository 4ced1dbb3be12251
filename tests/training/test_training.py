"""Optimisers, parts of batches, averages, attention, logs: what a fine-tune can be asked for."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from groupify.errors import ArtefactError, SpecError
from groupify.models.sources import load_model
from groupify.training.finetuning import FinetuneResult, finetune
from groupify.training.history import LogSettings
from groupify.training.learner import AveragedWeights, make_optimizer
from groupify.training.objective import attention_layers, attention_loss, features
from tests.training.nets import (
    CLASSES,
    SETTINGS,
    assert_equal_states,
    known,
    make_data,
    make_net,
    splits,
    state_of,
)

SHORT = dataclasses.replace(SETTINGS, epochs=1, validations_per_epoch=1)


def no_norm_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
        )


def assert_close_states(first: nn.Module, second: nn.Module, tolerance: float) -> None:
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.filterwarnings("ignore:this CPU has no fast instructions")
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "learning_rate": 0.01},
        {"schedule": "one-cycle"},
        {"distill": "attention"},
        {"ema_decay": 0.9},
        {"channels_last": True, "amp": "bfloat16"},
        {"accumulate": 4},
        {"label_smoothing": 0.1, "distill": "none"},
    ],
)
def test_a_truncated_model_recovers_each_way(
    dense: nn.Module, student: nn.Module, data: TensorDataset, changes: dict[str, object]
) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=4, **changes)  # type: ignore[arg-type]
    result = finetune(student, splits(data), teacher=dense, settings=settings)
    assert known(result.initial_validation_top1) < 0.75 < known(result.best_validation_top1)
    again = finetune(student, splits(data), teacher=dense, settings=settings)
    assert_equal_states(state_of(result.model), state_of(again.model))
    assert_equal_states(state_of(result.last_model), state_of(again.last_model))


def test_adamw_has_rates_relative_to_the_weights() -> None:
    net = make_net()
    optimizer = make_optimizer(net, dataclasses.replace(SHORT, optimizer="adamw"))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    scales = {id(group["params"][0]): group["scale"] for group in optimizer.param_groups}
    for parameter in net.parameters():
        size = float(parameter.detach().pow(2).mean()) ** 0.5
        assert scales[id(parameter)] == pytest.approx(max(size, 1e-3))


def test_factors_train_alike_however_their_sizes_are_divided(data: TensorDataset) -> None:
    def factored(size: float) -> nn.Module:
        net = no_norm_net()
        assert isinstance(net, nn.Sequential)
        first = nn.Conv2d(3, 5, 1, bias=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            nn.init.normal_(first.weight)
        second = nn.Conv2d(5, 8, 3)
        second.load_state_dict({"weight": torch.ones(8, 5, 3, 3) * torch.arange(8.0).view(-1, 1, 1, 1) / 100,
                                "bias": torch.zeros(8)})  # fmt: skip
        with torch.no_grad():
            first.weight *= size
            second.weight /= size
        return nn.Sequential(first, second, *net[1:])

    settings = dataclasses.replace(SHORT, optimizer="adamw", learning_rate=0.01)
    rows = [finetune(factored(size), splits(data), settings=settings).history[-1] for size in (1.0, 8.0)]
    assert rows[1].validation_loss == pytest.approx(rows[0].validation_loss, rel=1e-4)
    assert rows[0].validation_loss != rows[0].loss


@pytest.mark.parametrize("accumulate", [2, 3, 8, 100])
def test_a_batch_in_parts_is_the_batch(data: TensorDataset, accumulate: int) -> None:
    whole = finetune(no_norm_net(), splits(data), settings=SHORT)
    parts = finetune(no_norm_net(), splits(data), settings=dataclasses.replace(SHORT, accumulate=accumulate))
    assert parts.steps == whole.steps
    assert_close_states(parts.last_model, whole.last_model, 1e-5)


def test_channels_last_changes_rounding_only(
    dense: nn.Module, student: nn.Module, data: TensorDataset
) -> None:
    results = [
        finetune(
            student,
            splits(data),
            teacher=dense,
            settings=dataclasses.replace(SHORT, epochs=0.3, channels_last=channels_last),
        )
        for channels_last in (False, True)
    ]
    assert_close_states(results[0].last_model, results[1].last_model, 1e-3)
    strides = [parameter.stride() for parameter in results[1].model.parameters()]
    assert strides == [parameter.stride() for parameter in student.parameters()]


def test_the_last_weights_are_kept_beside_the_best(dense: nn.Module, data: TensorDataset) -> None:
    images, labels = make_data()
    wrong = splits(TensorDataset(images, (labels + 1) % CLASSES))
    result = finetune(dense, wrong, settings=SHORT, validation=data)
    assert result.best_step == 0
    assert_equal_states(state_of(result.model), state_of(dense))
    assert not torch.equal(result.last_model.state_dict()["0.weight"], dense.state_dict()["0.weight"])
    assert not result.last_model.training


def test_frozen_batch_norms_keep_their_statistics(student: nn.Module, data: TensorDataset) -> None:
    settings = dataclasses.replace(SHORT, freeze_batch_norms=True)
    last = finetune(student, splits(data), settings=settings).last_model.state_dict()
    for name, value in student.state_dict().items():
        kept = "running" in name or "num_batches" in name
        assert torch.equal(value, last[name]) == kept, name


# averages ------------------------------------------------------------------------------------------


def test_the_average_by_hand() -> None:
    model = nn.BatchNorm2d(1)
    average = AveragedWeights(model, 0.5)
    expected = 1.0
    for step, value in ((1, 2.0), (2, 4.0), (100, 8.0)):
        nn.init.constant_(model.weight, value)
        assert model.num_batches_tracked is not None
        model.num_batches_tracked.fill_(step)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert average.model.get_parameter("weight").item() == pytest.approx(expected)
        assert average.model.get_buffer("num_batches_tracked").item() == step


def test_the_average_is_what_is_returned(student: nn.Module, data: TensorDataset) -> None:
    plain = finetune(student, splits(data), settings=SHORT)
    averaged = finetune(student, splits(data), settings=dataclasses.replace(SHORT, ema_decay=0.9))
    key = "0.weight"
    start, last = student.state_dict()[key], plain.last_model.state_dict()[key]
    mean = averaged.last_model.state_dict()[key]
    # The same training; the average lags behind it.
    assert 0 < float((mean - start).norm()) < float((last - start).norm())
    assert averaged.model.get_parameter(key).requires_grad


# attention -----------------------------------------------------------------------------------------


def test_attention_by_hand() -> None:
    # Squared and averaged over channels: (1, 0) and (3, 4)/5 as unit maps.
    ours = torch.tensor([[[[2.0, 0.0]], [[1.0, 0.0]]]])
    theirs = torch.tensor([[[[math.sqrt(3), 2.0]]]])
    assert attention_loss([ours], [theirs]).item() == pytest.approx(0.4**2 + 0.8**2)
    assert attention_loss([ours, theirs], [theirs, theirs]).item() == pytest.approx(0.4)


def test_attention_ignores_the_order_and_the_scale_of_the_channels() -> None:
    features = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    assert attention_loss([features], [3 * features.flip(1)]).item() == pytest.approx(0, abs=1e-10)


def test_attention_is_compared_at_the_end_of_each_stage() -> None:
    net = load_model("resnet18", weights="none", input_shape=(3, 64, 64)).model
    layers = attention_layers(net, net, torch.randn(1, 3, 64, 64))
    assert layers == ("relu", "layer1", "layer2", "layer3", "layer4")
    with features(net, layers) as found:
        net(torch.randn(1, 3, 64, 64))
        assert [found[name].shape[1] for name in layers] == [64, 64, 128, 256, 512]
    assert not any(module._forward_hooks for module in net.modules())


def test_a_net_without_images_inside_has_no_attention(data: TensorDataset) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES))
    settings = dataclasses.replace(SHORT, distill="attention")
    with pytest.raises(SpecError, match="distil the logits"):
        finetune(net, splits(data), teacher=net, settings=settings)


def test_attention_pulls_the_maps_together(dense: nn.Module, student: nn.Module, data: TensorDataset) -> None:
    settings = dataclasses.replace(
        SETTINGS, epochs=2, labels=False, distillation_weight=0.0, attention_weight=20.0
    )

    def distance(result: FinetuneResult) -> float:
        images = data.tensors[0][:50]
        maps: list[Tensor] = []
        for model in (result.last_model, dense):
            with torch.no_grad(), features(model, ("5",)) as found:
                model.eval()(images)
                maps.append(found["5"])
        return attention_loss(maps[:1], maps[1:]).item()

    without, with_attention = (
        distance(
            finetune(
                student, splits(data), teacher=dense, settings=dataclasses.replace(settings, distill=distill)
            )
        )
        for distill in ("logits", "attention")
    )
    assert with_attention < 0.8 * without


def test_nothing_to_learn_from_is_refused(dense: nn.Module, data: TensorDataset) -> None:
    settings = dataclasses.replace(SHORT, labels=False, distill="none")
    with pytest.raises(SpecError, match="neither labels nor a teacher"):
        finetune(copy.deepcopy(dense), splits(data), teacher=dense, settings=settings)


# logs ----------------------------------------------------------------------------------------------


def test_the_log_has_a_line_per_interval_and_validation(
    dense: nn.Module, student: nn.Module, data: TensorDataset, tmp_path: Path
) -> None:
    log = LogSettings(tmp_path / "log.jsonl", interval=4)
    result = finetune(student, splits(data), teacher=dense, settings=SHORT, log=log)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [4, 8, 10]
    assert [line["epoch"] for line in training] == pytest.approx([0.4, 0.8, 1.0])
    assert all(0 <= line["accuracy"] <= 1 and line["images_per_second"] > 0 for line in training)
    (validation,) = [line for line in lines if "loss" not in line]
    assert validation["step"] == 10
    assert validation["validation_top1"] == result.history[-1].validation_top1
    # The mean over the lines, weighted by their steps, is the row's.
    mean = (4 * training[0]["loss"] + 4 * training[1]["loss"] + 2 * training[2]["loss"]) / 10
    assert result.history[-1].loss == pytest.approx(mean)


def test_the_bar_shows_the_running_numbers(
    student: nn.Module, data: TensorDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    finetune(student, splits(data), settings=SHORT, log=LogSettings(interval=2), progress=True)
    numbers = r"loss \d+\.\d{3}, accuracy \d+\.\d%, \d+ images/s, rate [\d.e-]+, validation \d+\.\d\d%"
    assert re.search(numbers, terminal.getvalue())


def test_a_log_that_cannot_be_written(student: nn.Module, data: TensorDataset, tmp_path: Path) -> None:
    log = LogSettings(tmp_path / "missing" / "log.jsonl")
    with pytest.raises(ArtefactError, match="cannot write the log"):
        finetune(student, splits(data), settings=SHORT, log=log)


def test_tensorboard_is_optional(
    student: nn.Module, data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SpecError, match="pip install tensorboard"):
        finetune(student, splits(data), settings=SHORT, log=LogSettings(tensorboard=tmp_path))


def test_tensorboard_gets_the_scalars(
    student: nn.Module, data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            assert (folder, purge_step) == (str(tmp_path), None)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    finetune(student, splits(data), settings=SHORT, log=LogSettings(tensorboard=tmp_path, interval=5))
    assert [(name, step) for name, _, step in written if name == "loss"] == [("loss", 5), ("loss", 10)]
    assert written[-1][0] == "closed"
