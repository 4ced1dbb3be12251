"""Models of several inputs on the whole way: planned, converted, saved, exported, measured and trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import groupify
from groupify.data.splits import DataSplits
from groupify.errors import ConversionError, DataError, GroupifyError, SpecError
from groupify.graph.call import Call
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.onnx.parity import check_parity
from groupify.onnx.runtime import OnnxModule
from groupify.planning.search import Images
from tests.cases.nets import EXACT, grouped_already, noise
from tests.cases.small import CHANNELS, PAIRS, TINY
from tests.cases.test_calls_of_the_models_own import Batch, Body, Indexed, Masked, Siamese, Two

RULES = groupify.Rules(min_group_width=1)


class Vector(Body):
    """An image, and a vector by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, CHANNELS)

    def forward(self, image: Tensor, log: Any = None, *, vector: Tensor, flip: bool = False) -> Tensor:
        x = image.flip(-1) if flip else image
        return self.end(self.start(x) + self.project(vector)[:, :, None, None])


class Nested(Body):
    def forward(self, images: tuple[Tensor, list[Tensor]], scale: float = 1.0) -> list[Tensor]:
        left, (right, weight) = images
        y = self.start(left) * scale + self.start(right) * weight[:, None, None, None]
        return [self.end(y), y.mean((2, 3)) > 0]


class Ignoring(Body):
    def forward(self, image: Tensor, unused: Tensor) -> dict[str, Tensor]:
        return {"image": self.end(self.start(image))}


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def vectors(count: int) -> Tensor:
    return noise(count, (4,), 5)


WAYS: dict[str, tuple[Callable[[], Body], Callable[[int], Arguments], list[str]]] = {
    "two images": (Siamese, lambda n: ((noise(n, TINY), noise(n, TINY, 1)), {}), ["left", "right"]),
    "image and map": (Two, lambda n: ((noise(n, TINY),), {"extra": noise(n, (1, 8, 8))}), ["image", "extra"]),
    "keywords in any order": (
        Two,
        lambda n: ((), {"strength": 0.5, "extra": noise(n, (1, 8, 8)), "image": noise(n, TINY)}),
        ["image", "extra"],
    ),
    "keyword only": (Vector, lambda n: ((noise(n, TINY),), {"vector": vectors(n)}), ["image", "vector"]),
    "None and a flag": (
        Vector,
        lambda n: ((noise(n, TINY), None), {"vector": vectors(n), "flip": True}),
        ["image", "vector"],
    ),
    "dictionary": (
        Batch,
        lambda n: (({"weight": noise(n, ()), "image": noise(n, TINY)},), {}),
        ["batch.weight", "batch.image"],
    ),
    "nested": (
        Nested,
        lambda n: (((noise(n, TINY), [noise(n, TINY, 1), noise(n, ())]),), {}),
        ["images_0", "images_1_0", "images_1_1"],
    ),
    "integers": (
        Indexed,
        lambda n: ((noise(n, TINY), torch.arange(n) % 10), {}),
        ["image", "label"],
    ),
    "booleans": (
        Masked,
        lambda n: ((noise(n, TINY),), {"mask": noise(n, (1, 8, 8)) > 0}),
        ["x", "mask"],
    ),
    "ignored": (Ignoring, lambda n: ((noise(n, TINY), vectors(n)), {}), ["image", "unused"]),
}


@pytest.mark.parametrize("way", [pytest.param(way, id=name) for name, way in WAYS.items()])
def test_a_file_has_an_input_for_each_tensor(
    way: tuple[Callable[[], Body], Callable[[int], Arguments], list[str]], tmp_path: Path
) -> None:
    make, arguments, names = way
    net = grouped_already(make(), PAIRS)
    path = groupify.export(net, tmp_path / "net.onnx", example_inputs=arguments(2)).path
    assert [value.name for value in onnxruntime.InferenceSession(path).get_inputs()] == names
    parity = check_parity(net, path, example_inputs=arguments(4), batch_sizes=(1, 3))
    assert parity.max_rel_diff < 1e-4
    args, kwargs = arguments(5)
    with torch.no_grad():
        wanted = outputs(net(*args, **kwargs))
    given = outputs(OnnxModule(path)(*args, **kwargs))
    for ours, theirs in zip(given, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["keyword only", "None and a flag", "nested"])
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    make, arguments, _ = WAYS[name]
    net = grouped_already(make(), PAIRS)
    plan = groupify.plan(net, example_inputs=arguments(1), groups=PAIRS, rules=RULES)
    assert plan.input_shape == TINY
    model = groupify.convert(net, plan, example_inputs=arguments(1)).model
    args, kwargs = arguments(8)
    with torch.no_grad():
        for ours, wanted in zip(outputs(model(*args, **kwargs)), outputs(net(*args, **kwargs)), strict=True):
            torch.testing.assert_close(ours, wanted, atol=2e-3, rtol=1e-3)
    spec = ModelSpec("somewhere:Net", {}, plan.input_shape, preprocessing=None)
    recipe = groupify.Recipe(spec, WeightsOrigin("checkpoint", "mine"), plan.recipes)
    groupify.save(tmp_path / "net", model, recipe)
    loaded = groupify.load(tmp_path / "net", model=make())
    path = groupify.export(loaded, tmp_path / "net.onnx", example_inputs=arguments(2)).path
    check_parity(model, path, example_inputs=arguments(2))
    (latency,) = groupify.benchmark({"net": path}, example_inputs=arguments(2), seconds=0.01)
    assert latency.median_ms > 0


def outputs(value: Any) -> list[Tensor]:
    return Call.of(value if isinstance(value, tuple) else (value,)).tensors


def pairs(batch: Any) -> Arguments:
    """A batch of images, vectors and labels."""
    return (batch[0],), {"vector": batch[1]}


def data(count: int = 32) -> TensorDataset:
    labels = torch.arange(count) % 5
    return TensorDataset(noise(count, TINY) + labels[:, None, None, None], vectors(count), labels)


DATA: dict[str, Callable[[], Any]] = {
    "data set": data,
    "loader": lambda: DataLoader(data(), batch_size=8),
    "generator": lambda: iter(list(DataLoader(data(), batch_size=8))),
}


@pytest.mark.parametrize("kind", DATA)
def test_any_data_calibrates_and_is_evaluated(kind: str) -> None:
    net = grouped_already(Vector(), PAIRS)
    plan = groupify.plan(net, example_inputs=pairs(data()[:2]), groups=PAIRS, rules=RULES)
    calibration = groupify.Calibration(DATA[kind](), inputs=pairs, fit=EXACT)
    assert calibration.count == 32
    model = groupify.convert(net, plan, calibration).model
    args, kwargs = pairs(data()[:])
    with torch.no_grad():
        torch.testing.assert_close(model(*args, **kwargs), net(*args, **kwargs), atol=2e-3, rtol=1e-3)
        right = int((net(*args, **kwargs).argmax(1) == data()[:][2]).sum())
    found = groupify.evaluate(net, DATA[kind](), inputs=pairs, batch_size=10)
    assert (found.images, found.top1) == (32, right / 32)
    assert groupify.evaluate(net, DATA[kind](), inputs=pairs, limit=9).images == 9


def test_dictionaries_and_streams_are_data_too() -> None:
    def inputs(batch: Any) -> Arguments:
        return (batch["image"],), {"vector": batch["vector"]}

    samples = [{"image": x, "vector": v, "label": int(y)} for x, v, y in zip(*data().tensors, strict=True)]

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(samples)

    assert groupify.evaluate(grouped_already(Vector(), PAIRS), Stream(), inputs=inputs).images == 32
    assert groupify.Calibration(Stream(), inputs=inputs, batch_size=5).count == 32


def test_a_plan_for_a_budget_reads_images() -> None:
    def inputs(batch: Tensor) -> Arguments:
        return (batch,), {"vector": batch.mean((2, 3)) @ torch.ones(3, 4)}

    net = grouped_already(Vector(), PAIRS)
    images = Images.split(noise(16, TINY), inputs=inputs)
    example = inputs(noise(2, TINY))
    found = groupify.plan_for_budget(
        net, budget="macs=80%", images=images, example_inputs=example, rules=RULES
    )
    assert found.plan.converted
    assert found.plan.inputs == ("image", "vector")
    with pytest.raises(SpecError, match="latency is for models of one input"):
        groupify.plan_for_budget(net, budget="latency=2x", example_inputs=example, rules=RULES)


def test_quantising_a_file_of_several_inputs_is_refused(tmp_path: Path) -> None:
    _, arguments, _ = WAYS["two images"]
    path = groupify.export(Siamese(), tmp_path / "net.onnx", example_inputs=arguments(2)).path
    with pytest.raises(ConversionError, match="has the inputs left, right"):
        quantize_onnx(path, tmp_path / "int8.onnx", images=noise(4, TINY))
    with pytest.raises(GroupifyError, match="has the inputs left, right"):
        OnnxModule(path)(noise(4, TINY))


def varying(batch: Any) -> Arguments:
    return (batch, batch.mean(1, keepdim=True)), {"strength": float(batch[0, 0, 0, 0])}


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "nothing": (lambda: groupify.plan(Two(), groups=2), "neither of input_shape and example_inputs"),
    "both": (lambda: groupify.plan(Two(), TINY, groups=2, example_inputs=noise(2)), "both of input_shape"),
    "no shape": (lambda: groupify.plan(Two(), noise(2), groups=2), "input_shape is a Tensor"),  # type: ignore[arg-type]
    "no tensor": (lambda: groupify.plan(Two(), groups=2, example_inputs={"x": 3}), "of no tensors"),
    "too few": (
        lambda: groupify.plan(Two(), groups=2, example_inputs=noise(2, TINY)),
        "it needs 'extra' too: give example_inputs",
    ),
    "too many": (
        lambda: groupify.plan(Siamese(), groups=2, example_inputs=(noise(2, TINY),) * 3),
        "give example_inputs that it runs on",
    ),
    "to export": (lambda: groupify.export(Two(), "net.onnx", input_shape=TINY), "needs 'extra' too"),
    "to convert": (
        lambda: groupify.convert(
            Masked().eval(),
            groupify.plan(
                Masked().eval(), groups=2, rules=RULES,
                example_inputs=(noise(2, TINY), noise(2, (1, 8, 8))),
            ),
        ),
        "made for a model called with x, mask, and this conversion would call it with x",
    ),
    "not a pair": (
        lambda: groupify.Calibration(noise(2, TINY), inputs=lambda batch: batch),
        "inputs gave a Tensor for a batch",
    ),
    "not finite": (
        lambda: groupify.Calibration(noise(2, TINY), inputs=lambda batch: ((batch / 0,), {})),
        "NaN or infinite",
    ),
    "no labels": (
        lambda: groupify.evaluate(
            Two(), [noise(2, TINY)], inputs=lambda batch: ((batch, batch.mean(1, keepdim=True)), {})
        ),
        "the images have no labels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_call_is_refused(what: str) -> None:
    do, words = REFUSED[what]
    with pytest.raises(GroupifyError, match=words):
        do()


def test_a_number_that_differs_from_batch_to_batch_is_never_taken_for_a_constant() -> None:
    net = grouped_already(Two(), PAIRS)
    plan = groupify.plan(net, example_inputs=varying(noise(2, TINY)), groups=PAIRS, rules=RULES)
    calibration = groupify.Calibration(noise(32, TINY), inputs=varying, fit=EXACT, batch_size=8)
    notes = groupify.convert(net, plan, calibration).notes
    assert any("24 images" in note for note in notes), notes


def splits(train: Any, augment: Any = None) -> DataSplits:
    return DataSplits("mine", train, None, 5, augment, True)


@pytest.mark.parametrize("distill", ["logits", "attention"])
def test_a_model_of_several_inputs_is_trained(distill: str) -> None:
    net = grouped_already(Vector(), PAIRS)
    settings = groupify.FinetuneSettings(epochs=1, batch_size=8, accumulate=2, distill=distill)
    result = groupify.finetune(net, splits(data()), teacher=net, settings=settings, inputs=pairs)
    assert result.steps > 1
    assert result.validation_images > 0
    again = groupify.finetune(
        net, splits(DataLoader(data(), batch_size=8)), settings=settings, inputs=pairs, validation=data()
    )
    assert again.validation_images == 32


def test_what_cannot_be_trained_with_inputs_is_refused() -> None:
    net, settings = grouped_already(Vector(), PAIRS), groupify.FinetuneSettings(epochs=1, augment=True)
    with pytest.raises(SpecError, match="augmentation is of images alone"):
        groupify.finetune(net, splits(data(), lambda x, _: x), settings=settings, inputs=pairs)
    batches = list(DataLoader(data(), batch_size=8))
    settings = groupify.FinetuneSettings(epochs=1, augment=False)
    with pytest.raises(DataError, match="cannot be split"):
        groupify.finetune(net, splits(batches), settings=settings, inputs=pairs)
