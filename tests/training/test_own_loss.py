"""Training for other tasks than classes: a loss of the user's own, and outputs distilled without labels."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import groupify
from groupify.data.batches import iterate_batches
from groupify.data.splits import DataSplits
from groupify.errors import DataError, GroupifyError, SpecError, WrongTypeError
from groupify.scores import Judge
from groupify.training.finetuning import finetune
from groupify.training.history import LogSettings
from groupify.training.holdout import hold_out
from groupify.training.output_errors import Spread, relative_errors
from groupify.training.own_loss import losses_of_images
from groupify.training.settings import FinetuneSettings
from groupify.training.state import Checkpointing
from tests.training.nets import (
    assert_equal_states,
    make_data,
    make_net,
    splits,
    state_of,
)

SETTINGS = FinetuneSettings(epochs=2, batch_size=16, validation_fraction=0.2, validations_per_epoch=2)
COUNT = 120


def make_images() -> Tensor:
    return torch.randn(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_maps() -> Tensor:
    """A class for each pixel: which channel is brightest around it."""
    return F.avg_pool2d(make_images(), 3, stride=1, padding=1).argmax(1)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return make()


def near(model: nn.Module, share: float = 0.3) -> nn.Module:
    """The same with weights that are off, as after a conversion."""
    found, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in found.parameters():
            value.add_(share * value.square().mean().sqrt() * torch.randn(value.shape, generator=generator))
    return found


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))


class TwoHeads(nn.Module):
    """Outputs of very different sizes, and labels that are no floats."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.body(images)
        return {"image": 100 * found[:, :4], "sums": found[:, 4:].sum((2, 3)), "best": found.argmax(1)}


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """A segmentation net that has learned its task."""
    net, images, maps = seeded(segmenter), make_images(), make_maps()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(images), maps).backward()
        optimizer.step()
    return net.eval()


def of_pixels(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels)


def of_images(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none").mean((1, 2))


def segmentation() -> TensorDataset:
    return TensorDataset(make_images(), make_maps())


def held_out_of(data: DataSplits) -> tuple[Tensor, Tensor]:
    """The images that a training holds out, and their labels."""
    assert data.train is not None
    _, held_out = hold_out(data.train, None, SETTINGS)
    return next(iterate_batches(held_out, COUNT, labelled="any"))


# a loss of the user's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("taught", [True, False])
def test_maps_are_learned_with_a_loss_of_the_user_s(dense: nn.Module, taught: bool) -> None:
    student = near(dense)
    result = finetune(
        student, splits(segmentation()), teacher=dense if taught else None, settings=SETTINGS, loss=of_pixels
    )
    assert result.best_step > 0
    assert result.best.validation_loss < result.history[0].validation_loss
    assert result.loss == "of_pixels"
    assert result.recovery["loss"] == "of_pixels"
    assert result.settings.labels is True
    assert result.initial_validation_top1 is None
    assert {row.validation_top1 for row in result.history} == {None}
    with torch.no_grad():
        before, after = (float(of_pixels(net(make_images()), make_maps())) for net in (student, result.model))
    assert after < before


def test_a_number_is_asked_for_image_by_image(dense: nn.Module) -> None:
    student, data = near(dense), splits(segmentation())
    together, apart = (
        finetune(student, data, teacher=dense, settings=SETTINGS, loss=loss)
        for loss in (of_pixels, of_images)
    )
    images, maps = held_out_of(data)
    with torch.no_grad():
        expected = of_images(student(images), maps)
    assert together.history[0].validation_loss == pytest.approx(float(expected.mean()))
    for one, other in zip(together.history[1:], apart.history[1:], strict=True):
        assert one.gain is not None
        assert other.gain is not None
        assert one.gain.mean == pytest.approx(other.gain.mean, rel=1e-3, abs=1e-5)
        assert one.gain.error == pytest.approx(other.gain.error, rel=1e-3, abs=1e-5)


def test_losses_of_images_by_hand() -> None:
    outputs = {"out": torch.tensor([[1.0, 3.0], [0.0, 0.0]]), "scale": torch.tensor(2.0)}

    def squared(found: Any, labels: Tensor) -> Tensor:
        errors: Tensor = found["scale"] * (found["out"] - labels).square()
        return errors.mean()

    assert losses_of_images(squared, outputs, torch.zeros(2, 2)).tolist() == [10.0, 0.0]


def test_a_loss_takes_the_place_of_the_cross_entropy_of_classes() -> None:
    def smooth(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, reduction="none", label_smoothing=0.1)

    images, labels = make_data()
    dense = seeded(make_net)
    data, settings = splits(TensorDataset(images, labels)), dataclasses.replace(SETTINGS, epochs=1)
    own = finetune(dense, data, settings=settings, loss=smooth)
    built_in = finetune(dense, data, settings=dataclasses.replace(settings, label_smoothing=0.1))
    assert_equal_states(state_of(own.last_model), state_of(built_in.last_model))
    assert own.initial_validation_top1 == built_in.initial_validation_top1
    assert own.history[0].validation_loss != built_in.history[0].validation_loss  # which smooths nothing
    chances = F.one_hot(labels, 4).float()
    soft = finetune(dense, splits(TensorDataset(images, chances)), settings=settings, loss=smooth)
    assert_equal_states(state_of(soft.last_model), state_of(own.last_model))
    assert soft.initial_validation_top1 is None


def pairs() -> list[tuple[Tensor, Tensor]]:
    return list(zip(make_images(), make_maps(), strict=True))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(make_images().split(40), make_maps().split(40), strict=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: _Items([{"image": image, "label": maps} for image, maps in pairs()]),
        lambda: DataLoader(segmentation(), batch_size=16, shuffle=True),
        lambda: list(batches()),
        batches,
    ],
    ids=["dicts", "loader", "batches", "generator"],
)
def test_labels_of_any_form_come_with_every_kind_of_data(dense: nn.Module, make: Callable[[], Any]) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=0.5, images_per_epoch=COUNT)
    result = groupify.finetune(near(dense), make(), teacher=dense, settings=settings, loss=of_pixels)
    assert result.loss == "of_pixels"
    assert result.validation_images == 24


class _Items(torch.utils.data.Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_an_interrupted_run_goes_on_with_the_same_loss_alone(dense: nn.Module, tmp_path: Path) -> None:
    student, data = near(dense), splits(list(batches()))
    state = tmp_path / "state"

    def run(loss: Any, *, resume: bool = False, epochs: float = 2.0) -> Any:
        settings = dataclasses.replace(SETTINGS, epochs=epochs, images_per_epoch=COUNT)
        kept = Checkpointing(state, interval=1, resume=resume)
        return finetune(student, data, teacher=dense, settings=settings, loss=loss, checkpointing=kept)

    whole = run(of_pixels)
    again = run(of_pixels, resume=True)
    assert_equal_states(state_of(again.last_model), state_of(whole.last_model))
    assert again.history == whole.history
    with pytest.raises(SpecError, match="its loss is 'of_pixels', not 'of_images'"):
        run(of_images, resume=True)


def test_the_log_says_nothing_of_an_accuracy(dense: nn.Module, tmp_path: Path) -> None:
    log = LogSettings(tmp_path / "log", interval=1)
    finetune(near(dense), splits(segmentation()), settings=SETTINGS, loss=of_pixels, log=log)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {line["accuracy"] for line in lines if "accuracy" in line} == {None}
    assert {line["validation_top1"] for line in lines if "validation_top1" in line} == {None}


# outputs without labels -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [segmenter, TwoHeads])
def test_outputs_are_distilled_by_the_error_that_plans_are_judged_by(make: Callable[[], nn.Module]) -> None:
    dense = seeded(make).eval()
    student, data = near(dense), splits(segmentation(), labelled=False)
    result = finetune(student, data, teacher=dense, settings=SETTINGS)
    judge = Judge(dense, held_out_of(data)[0])
    assert result.history[0].validation_loss == pytest.approx(judge.judge(student).divergence, rel=1e-4)
    assert result.best.validation_loss == pytest.approx(judge.judge(result.model).divergence, rel=1e-4)
    assert result.best_step > 0
    assert result.best.validation_loss < 0.9 * result.history[0].validation_loss
    assert result.settings.labels is False
    again = finetune(student, data, teacher=dense, settings=SETTINGS)
    assert_equal_states(state_of(again.last_model), state_of(result.last_model))


def test_relative_errors_by_hand() -> None:
    first, second = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[300.0], [500.0]])
    spread = Spread()
    for row in range(2):
        spread.add([first[row : row + 1], second[row : row + 1]])
    variances = Spread.variances(spread.sums)
    assert variances == pytest.approx((5.0, 100.0**2))
    ours = [first + torch.tensor([[1.0, 3.0], [0.0, 0.0]]), second + torch.tensor([[0.0], [50.0]])]
    # (1 + 9) / 2 of 5, and 0; 0, and 2,500 of 10,000; each the mean of two outputs.
    assert relative_errors(ours, [first, second], variances).tolist() == pytest.approx([0.5, 0.125])


def test_an_output_that_never_changes_is_held_to_its_own_size() -> None:
    assert Spread.variances([(4, 8.0, 16.0), (4, 0.0, 0.0)]) == (4.0, 1.0)


def test_an_embedding_is_no_class_scores_where_that_is_said() -> None:
    dense = seeded(make_net).eval()
    data = splits(TensorDataset(*make_data()))
    settings = dataclasses.replace(SETTINGS, epochs=1)
    as_scores, as_outputs = (
        finetune(
            near(dense), data, teacher=dense, settings=dataclasses.replace(settings, labels=False), task=task
        )
        for task in ("auto", "outputs")
    )
    assert as_scores.initial_validation_top1 is not None
    assert as_outputs.initial_validation_top1 is None
    # Class numbers beside an embedding are of no use without a loss for them.
    assert (
        finetune(near(dense), data, teacher=dense, settings=settings, task="outputs").settings.labels is False
    )


def test_rates_follow_the_relative_error(dense: nn.Module) -> None:
    student = near(dense)
    settings = dataclasses.replace(SETTINGS, epochs=0.3)
    result = finetune(student, splits(segmentation(), labelled=False), teacher=dense, settings=settings)
    lost = result.history[0].validation_loss
    assert result.settings.learning_rate == pytest.approx(min(max(0.02 * lost**0.5, 0.0005), 0.01))
    assert result.settings.freeze_batch_norms is (lost < 0.3)


# what is refused ------------------------------------------------------------------------------------


def fails(outputs: Tensor, labels: Tensor) -> Tensor:
    raise ValueError("no such\nthing")


def of_empty_images(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, torch.full_like(labels, -100))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[GroupifyError], str]] = {
    "labels without a loss": (
        {}, {"labels": True}, SpecError, r"task is 'outputs' \(no class scores: \(N, 3, 8, 8\)\): give a loss"
    ),
    "a loss and no labels": ({"loss": of_pixels}, {"labels": False}, SpecError, "'of_pixels' is for labels"),
    "no function": ({"loss": 3}, {}, WrongTypeError, "loss is a int: expected a function of outputs"),
    "nothing to learn from": ({"teacher": None}, {}, SpecError, "neither labels nor a teacher"),
    "classes of maps": ({"task": "classes"}, {}, SpecError, "the task is 'classes', but the model's outputs"),
    "a loss that fails": (
        {"loss": fails}, {}, SpecError, r"fails on labels of shape \(16, 8, 8\): ValueError: no such thing"
    ),
    "one for each pixel": (
        {"loss": lambda outputs, labels: (outputs.argmax(1) - labels).abs().float()}, {}, SpecError,
        r"float32 of shape \(16, 8, 8\): expected a tensor of floats, .* one for each image, \(16,\)",
    ),
    "a Python number": ({"loss": lambda outputs, labels: 1.0}, {}, SpecError, "gives a float: expected"),
    "not finite": ({"loss": of_empty_images}, {}, SpecError, "not finite for 24 of 24 held-out images"),
    "without a gradient": (
        {"loss": lambda outputs, labels: outputs.detach().square().mean(), "teacher": None}, {}, SpecError,
        "the loss has no gradient",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused(dense: nn.Module, case: str) -> None:
    options, changes, error, message = REFUSED[case]
    data = splits(segmentation(), labelled=case == "labels without a loss")
    settings = dataclasses.replace(SETTINGS, **changes)
    with pytest.raises(error, match=message) as raised:
        finetune(near(dense), data, settings=settings, **{"teacher": dense, **options})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TensorDataset(make_images()), "the data has no labels, and the loss compares outputs with them"),
        (TensorDataset(make_images(), torch.full((COUNT,), -1)), "have no labels"),
        ([(make_images(), make_maps()[:7])], r"shape \(7, 8, 8\): expected an entry for each image"),
        ([(make_images(), [{"boxes": 1}] * COUNT)], "labels of type list: expected a tensor"),
        (_Items([(image, torch.zeros(size)) for size, image in enumerate(make_images()[:9], 1)]),
         r"labels of shapes \(\d,\) and \(\d,\) in one batch"),
    ],
)  # fmt: skip
def test_labels_that_a_loss_cannot_have_are_refused(dense: nn.Module, data: Any, message: str) -> None:
    with pytest.raises((DataError, SpecError), match=message):
        groupify.finetune(near(dense), data, teacher=dense, settings=SETTINGS, loss=of_pixels)


def test_an_augmentation_that_leaves_maps_behind_is_refused(dense: nn.Module) -> None:
    data = splits(segmentation(), labelled=False, augment=lambda images, generator: images.flip(3))
    settings = dataclasses.replace(SETTINGS, augment=True)
    with pytest.raises(SpecError, match="the augmentation changes images and not what the loss 'of_pixels'"):
        finetune(near(dense), data, settings=settings, loss=of_pixels)
    assert finetune(near(dense), data, teacher=dense, settings=settings).steps > 0


# with compress --------------------------------------------------------------------------------------


def test_a_result_is_trained_by_a_loss_and_measured_by_a_metric(dense: nn.Module) -> None:
    images, maps = make_images(), make_maps()

    def pixels_right(model: nn.Module) -> float:
        return float((model(images).argmax(1) == maps).float().mean())

    rules = groupify.Rules(cpu="any", min_group_width=1, exclude=("0",))
    result = groupify.compress(dense, images, budget="macs=70%", rules=rules, metric=pixels_right)
    test = TensorDataset(images, maps)
    data = DataSplits("maps", test, test, None, None, labelled=True)
    tuned = result.finetune(data, settings=SETTINGS, loss=of_pixels)
    change = tuned.measured_by_metric
    assert change is not None
    assert change.recovered == pytest.approx(pixels_right(tuned.model))
    assert change.converted == pytest.approx(pixels_right(result.model))
    assert f"metric pixels_right (higher is better): dense {change.dense:.4g} → " in repr(tuned)
    assert tuned.accuracy.recovered is None
    assert tuned.recipe.recovery is not None
    assert tuned.recipe.recovery["loss"] == "of_pixels"
    distilled = groupify.finetune(result, images, settings=SETTINGS)
    assert distilled.tuned is not None
    assert distilled.tuned.settings.labels is False
    with pytest.raises(SpecError, match="task is 'classes', and the result was made for 'auto'"):
        groupify.finetune(result, images, task="classes")
