from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from groupify.data.batches import UNLABELLED, iterate_batches
from groupify.errors import DataError, GroupifyWarning, SpecError
from groupify.training import loop
from groupify.training.finetuning import finetune
from groupify.training.holdout import hold_out
from groupify.training.learner import Learner, make_optimizer
from groupify.training.settings import FinetuneSettings
from groupify.training.validation import Validation, distance
from tests.training.nets import (
    CLASSES,
    SETTINGS,
    SOURCES,
    ShuffledStream,
    Stream,
    assert_equal_states,
    distinct,
    known,
    make_data,
    make_net,
    splits,
    state_of,
    top1,
)


def test_the_dense_net_learns_its_task(dense: nn.Module) -> None:
    assert top1(dense) > 0.8


@pytest.mark.parametrize("labels", [True, False])
def test_a_truncated_model_recovers(
    dense: nn.Module, student: nn.Module, data: TensorDataset, labels: bool
) -> None:
    images, true_labels = data.tensors
    unlabelled = TensorDataset(images, torch.full_like(true_labels, UNLABELLED))
    result = finetune(
        student,
        splits(data if labels else unlabelled, labelled=labels),
        teacher=dense,
        settings=dataclasses.replace(SETTINGS, labels=labels, epochs=6),
    )
    assert result.best_step > 0
    assert known(result.best_validation_top1) >= known(result.initial_validation_top1)
    assert top1(result.model) > top1(student)
    assert result.validation_images == 40
    assert not result.model.training


def test_nothing_given_is_changed(dense: nn.Module, student: nn.Module, data: TensorDataset) -> None:
    given, teacher = copy.deepcopy(student).train(), copy.deepcopy(dense).train()
    before, random_before = (state_of(given), state_of(teacher)), torch.get_rng_state()
    result = finetune(given, splits(data), teacher=teacher, settings=SETTINGS)
    assert result.model is not given
    assert_equal_states(state_of(given), before[0])
    assert_equal_states(state_of(teacher), before[1])
    assert all(module.training for net in (given, teacher) for module in net.modules())
    assert all(parameter.grad is None for net in (given, teacher) for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_before)


def test_the_same_call_gives_the_same_weights(
    dense: nn.Module, student: nn.Module, data: TensorDataset
) -> None:
    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + 0.1 * torch.randn(images.shape, generator=generator)

    def run(seed: int) -> dict[str, Tensor]:
        settings = dataclasses.replace(SETTINGS, augment=True, seed=seed)
        return state_of(
            finetune(student, splits(data, augment=augment), teacher=dense, settings=settings).model
        )

    first = run(0)
    torch.rand(3)
    assert_equal_states(first, run(0))
    assert not torch.equal(first["3.weight"], run(1)["3.weight"])


def test_a_fine_tune_that_hurts_returns_the_given_weights(dense: nn.Module, data: TensorDataset) -> None:
    labels = data.tensors[1].roll(1)
    wrong = TensorDataset(data.tensors[0], (labels + 1) % CLASSES)
    settings = dataclasses.replace(SETTINGS, learning_rate=1.0, distillation_weight=0.0)
    result = finetune(dense, splits(wrong), settings=settings, validation=data)
    assert result.best_step == 0
    assert_equal_states(state_of(result.model), state_of(dense))
    assert min(known(row.validation_top1) for row in result.history) < known(result.initial_validation_top1)


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ([0.1] * 100, True), ([1.2, -1.0] * 50, True), ([0.0] * 100, False), ([1.0, -1.2] * 50, False),
        ([math.nan, 1.0] * 50, False),
    ],
    ids=["less on all images", "less, within its error", "the same", "more, within its error", "NaN"],
)  # fmt: skip
def test_trained_weights_win_by_the_least_loss(
    dense: nn.Module, data: TensorDataset, monkeypatch: pytest.MonkeyPatch, gains: list[float], kept: bool
) -> None:
    before, after = torch.full((100,), 2.0), 2.0 - torch.tensor(gains)
    found = iter([before] + [after] * 99)

    def validate(*_: object) -> tuple[Validation, Tensor]:
        losses = next(found)
        return Validation(0.9, float(losses.mean()), 100, CLASSES), losses

    monkeypatch.setattr(loop, "validate", validate)
    result = finetune(dense, splits(data), settings=SETTINGS)
    assert (result.best_step > 0) is kept
    gain = result.history[-1].gain
    assert gain is not None
    assert gain.mean == pytest.approx(sum(gains) / 100, nan_ok=True)
    # The standard error of a mean, by hand: the deviation of +a and -b, over the root of 99.
    if not math.isnan(gain.mean):
        assert gain.error == pytest.approx((max(gains) - min(gains)) / 2 / 99**0.5, rel=1e-6, abs=1e-9)


def test_a_loss_that_is_not_finite_ends_the_run(dense: nn.Module, data: TensorDataset) -> None:
    settings = dataclasses.replace(SETTINGS, learning_rate=1e30)
    with pytest.warns(GroupifyWarning, match="a gradient is not finite at step") as caught:
        result = finetune(dense, splits(data), settings=settings)
    assert len(caught) == 1
    assert result.best_step == 0
    assert result.steps < 30
    assert_equal_states(state_of(result.model), state_of(dense))


def test_the_weights_before_a_step_that_cannot_be_taken_are_kept(
    dense: nn.Module, student: nn.Module, data: TensorDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=1, validations_per_epoch=1)
    backward, count = Learner._backward, iter(range(100))

    def spoilt(self: Learner, *batch: Any) -> Any:
        found = backward(self, *batch)
        if next(count) == 6:
            next(iter(self.model.parameters())).grad[0] = torch.inf  # type: ignore[index]
        return found

    monkeypatch.setattr(Learner, "_backward", spoilt)
    with pytest.warns(GroupifyWarning, match="not finite at step 7: training stopped before it"):
        result = finetune(student, splits(data), teacher=dense, settings=settings)
    assert [row.step for row in result.history] == [0, 6]
    assert (result.steps, result.best_step) == (6, 6)
    assert all(value.isfinite().all() for value in result.last_model.state_dict().values())


def test_held_out_images_are_augmented_unless_they_are_the_callers_own(
    dense: nn.Module, student: nn.Module, data: TensorDataset
) -> None:
    seen: list[Tensor] = []

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(images)
        return images + torch.rand(1, generator=generator)

    settings = dataclasses.replace(SETTINGS, epochs=1, validations_per_epoch=1)
    given = splits(data, augment=augment)
    own = finetune(student, given, teacher=dense, settings=settings)
    assert sum(map(len, seen)) == 2 * 4 * own.validation_images  # two validations, four views of each image
    assert finetune(student, given, teacher=dense, settings=settings).history[1].gain == own.history[1].gain
    plain = finetune(student, splits(data), teacher=dense, settings=settings)
    assert plain.history[0].validation_top1 == own.history[0].validation_top1
    assert plain.history[0].validation_loss != own.history[0].validation_loss
    seen.clear()
    finetune(student, given, teacher=dense, settings=settings, validation=data)
    assert not seen


def test_what_was_lost_by_hand() -> None:
    class Constant(nn.Module):
        def __init__(self, *chances: float) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.tensor(chances).log())

        def forward(self, images: Tensor) -> Tensor:
            return self.scores.expand(len(images), -1)

    data = TensorDataset(torch.rand(5, 3, 2, 2), torch.zeros(5, dtype=torch.int64))
    student, teacher = Constant(0.25, 0.75), Constant(0.5, 0.5)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert distance(student, teacher, data, SETTINGS) == pytest.approx(expected, rel=1e-5)


def test_the_defaults_follow_what_was_lost(dense: nn.Module, student: nn.Module, data: TensorDataset) -> None:
    rates = [FinetuneSettings().resolved(lost).learning_rate for lost in (0.0, 0.01, 0.04, 5.0)]
    assert rates == pytest.approx([0.0005, 0.002, 0.004, 0.01])
    frozen = [FinetuneSettings().resolved(lost).freeze_batch_norms for lost in (0.01, 1.0, None)]
    assert frozen == [True, False, False]
    sgd = FinetuneSettings(optimizer="sgd").resolved(0.01)
    assert (sgd.learning_rate, sgd.freeze_batch_norms) == (0.02, False)
    given = FinetuneSettings(learning_rate=0.5, freeze_batch_norms=False)
    assert given.resolved(0.01) == given
    for model, lost_little in ((dense, True), (student, False)):
        result = finetune(model, splits(data), teacher=dense, settings=FinetuneSettings(batch_size=16))
        assert result.settings.freeze_batch_norms is lost_little
        assert result.settings.is_resolved
        assert result.settings.as_recipe()["learning_rate"] == result.settings.learning_rate


def test_the_defaults_improve_a_model_that_lost_a_little_and_recover_one_that_lost_all(
    dense: nn.Module, student: nn.Module, data: TensorDataset
) -> None:
    near = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in near.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.add_(0.2 * parameter.square().mean().sqrt() * noise)
    settings = FinetuneSettings(epochs=3, batch_size=16, validation_fraction=0.2)
    for model in (near, student):
        result = finetune(model, splits(data), teacher=dense, settings=settings)
        assert result.best_step > 0
        assert result.best.gain is not None
        assert result.best.gain.mean > 0
        assert result.best.validation_loss < result.history[0].validation_loss


def test_the_history_tells_each_validation(dense: nn.Module, student: nn.Module, data: TensorDataset) -> None:
    result = finetune(student, splits(data), teacher=dense, settings=SETTINGS)
    # 160 images in batches of 16: 10 steps an epoch, a validation after every 2 or 3 of them.
    steps = [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30]
    assert result.steps == 30
    assert [row.step for row in result.history] == steps
    assert [row.epoch for row in result.history] == pytest.approx([step / 10 for step in steps])
    first, second = result.history[:2]
    assert (first.loss, first.learning_rate, first.images_per_second) == (None, None, None)
    # Warm-up of 3 steps: the second step has 2/4 of the peak.
    assert second.learning_rate == pytest.approx(0.025)
    assert second.images_per_second is not None
    assert second.images_per_second > 0
    best = min(result.history, key=lambda row: row.validation_loss)
    assert result.best_step == best.step


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (0.25, 2), (0.01, 1), (1.5, 15)])
def test_fractions_of_an_epoch(student: nn.Module, data: TensorDataset, epochs: float, steps: int) -> None:
    result = finetune(student, splits(data), settings=dataclasses.replace(SETTINGS, epochs=epochs))
    assert result.steps == steps
    assert result.history[-1].step == steps


def test_an_epoch_reads_each_training_image_once_and_no_held_out_one(data: TensorDataset) -> None:
    part, held_out = hold_out(data, None, SETTINGS)
    passes = [
        torch.cat([call.tensors[0] for (call, _), _ in part.batches(SETTINGS, epoch)]) for epoch in (0, 1)
    ]
    validation = torch.cat([images for images, _ in iterate_batches(held_out, 16)])
    assert not torch.equal(passes[0], passes[1])
    for images in passes:
        together = torch.cat([images, validation]).flatten(1)
        assert torch.equal(distinct(together), distinct(data.tensors[0].flatten(1)))
        assert len(together) == len(data)


def test_of_many_images_no_more_are_held_out_than_it_takes() -> None:
    data = TensorDataset(torch.zeros(60_000, 1, 1, 1), torch.zeros(60_000, dtype=torch.int64))
    for many in (data, DataLoader(data, batch_size=100)):
        part, held_out = hold_out(many, None, SETTINGS)
        assert sum(len(labels) for _, labels in iterate_batches(held_out, 1_000)) == 5_000
        assert part.steps_per_epoch == math.ceil(55_000 / (SETTINGS.batch_size if many is data else 100))


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_data_trains_on_what_is_not_held_out(student: nn.Module, kind: str) -> None:
    images, labels = make_data()
    data = SOURCES[kind](images, labels)
    known = kind not in ("stream", "loader of a stream")
    settings = dataclasses.replace(SETTINGS, images_per_epoch=None if known else 200)
    part, held_out = hold_out(data, None, settings)
    validation = torch.cat([batch for batch, _ in iterate_batches(held_out, 16)])
    trained = torch.cat([call.tensors[0] for (call, _), _ in part.batches(settings, 0)])
    assert len(validation) == 40
    together = torch.cat([trained, validation]).flatten(1)
    assert torch.equal(distinct(together), distinct(images.flatten(1)))

    result = finetune(student, splits(data), settings=dataclasses.replace(settings, epochs=1))
    # The 160 images in batches of the settings' 16 or the loader's 25.
    assert result.steps == (10 if "stream" in kind and "loader" not in kind else 7)
    assert result.validation_images == 40
    again = finetune(student, splits(data), settings=dataclasses.replace(settings, epochs=1))
    assert_equal_states(state_of(result.model), state_of(again.model))


def test_a_stream_of_unknown_length_needs_it(student: nn.Module) -> None:
    with pytest.raises(DataError, match="images_per_epoch=N"):
        finetune(student, splits(Stream(*make_data())), settings=SETTINGS)


def test_a_stream_that_is_shorter_than_its_held_out_part(student: nn.Module) -> None:
    settings = dataclasses.replace(SETTINGS, images_per_epoch=2000)
    with pytest.raises(DataError, match="ends after 200 images, where 400 of 2000 are to be held out"):
        finetune(student, splits(Stream(*make_data())), settings=settings)


def test_a_stream_in_changing_order_cannot_be_split(student: nn.Module) -> None:
    settings = dataclasses.replace(SETTINGS, images_per_epoch=200)
    with pytest.raises(DataError, match="starts with other images"):
        finetune(student, splits(ShuffledStream(*make_data())), settings=settings)


def test_a_stream_in_changing_order_trains_with_validation_data(
    student: nn.Module, data: TensorDataset
) -> None:
    settings = dataclasses.replace(SETTINGS, images_per_epoch=200, epochs=1)
    stream = ShuffledStream(*make_data())
    result = finetune(student, splits(stream), settings=settings, validation=data)
    assert result.steps == 13
    assert result.validation_images == 200


@pytest.mark.parametrize("kind", ["map-style", "loader", "shuffled loader", "batches"])
def test_with_validation_data_all_of_the_training_data_is_used(
    student: nn.Module, data: TensorDataset, kind: str
) -> None:
    train = data if kind == "map-style" else SOURCES[kind](*make_data())
    settings = dataclasses.replace(SETTINGS, epochs=1)
    result = finetune(student, splits(train), settings=settings, validation=data)
    assert result.steps == (13 if kind == "map-style" else 8)
    assert result.validation_images == 200


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"train": None}, {}, DataError, "no training part"),
        ({"labelled": False}, {}, SpecError, "has no labels"),
        ({}, {"labels": False}, SpecError, "neither labels nor a teacher"),
        ({"train": TensorDataset(*make_data(1))}, {}, DataError, "at least 2"),
        ({"train": TensorDataset(*make_data(2))}, {}, DataError, "fewer than two images"),
        ({"train": []}, {}, DataError, "empty"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    student: nn.Module,
    data: TensorDataset,
    changes: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as raised:
        finetune(
            student, splits(**{"train": data, **changes}), settings=dataclasses.replace(SETTINGS, **options)
        )
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [(CLASSES, "label 4 is out of range"), (-7, "label -7 is out of range"), (UNLABELLED, "have no labels")],
)
def test_bad_labels_are_refused(student: nn.Module, bad: int, message: str) -> None:
    images, labels = make_data()
    labels[:] = torch.where(torch.arange(len(labels)) % 3 == 0, bad, labels)
    with pytest.raises((DataError, SpecError), match=message):
        finetune(student, splits(TensorDataset(images, labels)), settings=SETTINGS)


def test_nan_images_are_refused(student: nn.Module) -> None:
    images, labels = make_data()
    images[::2, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        finetune(student, splits(TensorDataset(images, labels)), settings=SETTINGS)


def test_a_model_that_is_no_classifier_is_refused(data: TensorDataset) -> None:
    settings = dataclasses.replace(SETTINGS, labels=True)
    with pytest.raises(SpecError, match=r"no class scores: \(N, 4, 6, 6\)\): give a loss"):
        finetune(nn.Conv2d(3, 4, 3), splits(data), settings=settings)


def test_a_model_with_nothing_to_train_is_refused(student: nn.Module, data: TensorDataset) -> None:
    with pytest.raises(SpecError, match="nothing to train"):
        finetune(copy.deepcopy(student).requires_grad_(False), splits(data), settings=SETTINGS)


def test_norms_and_biases_do_not_decay() -> None:
    optimizer = make_optimizer(make_net(), SETTINGS)
    weights, others = optimizer.param_groups
    assert [parameter.dim() for parameter in weights["params"]] == [4, 4, 2]
    assert weights["weight_decay"] == SETTINGS.weight_decay
    assert {parameter.dim() for parameter in others["params"]} == {1}
    assert others["weight_decay"] == 0


def test_mixed_precision_trains(
    dense: nn.Module, student: nn.Module, data: TensorDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groupify.training.finetuning.bfloat16_is_slow", lambda: False)
    result = finetune(
        student, splits(data), teacher=dense, settings=dataclasses.replace(SETTINGS, amp="bfloat16")
    )
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert known(result.best_validation_top1) >= known(result.initial_validation_top1)


def test_mixed_precision_where_it_is_slow_is_warned_of(
    student: nn.Module, data: TensorDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groupify.training.finetuning.bfloat16_is_slow", lambda: True)
    settings = dataclasses.replace(SETTINGS, epochs=0.1, amp="bfloat16")
    with pytest.warns(GroupifyWarning, match=r"no fast instructions for bfloat16.*float32"):
        finetune(student, splits(data), settings=settings)


def test_a_double_precision_model_trains(student: nn.Module, data: TensorDataset) -> None:
    model = copy.deepcopy(student).double()
    result = finetune(model, splits(data), settings=dataclasses.replace(SETTINGS, epochs=0.5))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float64}


def test_inception_style_outputs_train(student: nn.Module, data: TensorDataset) -> None:
    class WithAuxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(student)

        def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            logits: Tensor = self.net(images)
            return (logits, logits) if self.training else logits

    assert (
        finetune(WithAuxiliary(), splits(data), settings=dataclasses.replace(SETTINGS, epochs=0.5)).steps == 5
    )


def test_progress_is_silent_without_a_terminal(
    student: nn.Module, data: TensorDataset, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finetune(student, splits(data), settings=settings, progress=True)
    assert capfd.readouterr() == ("", "")


def test_items_are_read_one_by_one_from_any_dataset(student: nn.Module) -> None:
    class Plain(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return 200

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            images, labels = make_data()
            return images[index], int(labels[index])

    assert finetune(student, splits(Plain()), settings=dataclasses.replace(SETTINGS, epochs=0.3)).steps == 3
