from __future__ import annotations

import gzip
import pickle
import pickletools
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from groupify.data import files
from groupify.data.batches import (
    UNLABELLED,
    calibration_images,
    check_labels,
    iterate_batches,
    split_validation,
)
from groupify.data.files import read_idx, write_idx
from groupify.data.images import CropAndFlip, FlipAndShift, ImageArrays, ImageFolder
from groupify.data.splits import DataSplits, load_data
from groupify.errors import DataError, GroupifyWarning, SpecError, WrongTypeError
from groupify.models import demo
from groupify.models.preprocessing import Preprocessing, PreprocessingOptions
from groupify.models.sources import load_model
from groupify.models.specs import ModelSpec

SPEC = ModelSpec("demo", {}, (3, 28, 28), None)
GREY = ModelSpec("demo", {}, (1, 28, 28), None)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered_images(count: int) -> TensorDataset:
    """Images whose pixels all hold their index, which is their label too."""
    labels = torch.arange(count)
    return TensorDataset(labels.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4), labels)


def labels_of(part: Subset[Any]) -> list[int]:
    return [int(part[index][1]) for index in range(len(part))]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, count: int) -> None:
        self.samples = numbered_images(count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.samples[index] for index in range(len(self.samples)))


class Loop(Dataset[Any]):
    """A map-style data set without a base other than torch's."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


KINDS: dict[str, Callable[[int], Any]] = {
    "map": numbered_images,
    "stream": Stream,
    "loader": lambda count: DataLoader(numbered_images(count), batch_size=3),
    "stream loader": lambda count: DataLoader(Stream(count), batch_size=3),
    "list of batches": lambda count: list(DataLoader(numbered_images(count), batch_size=3)),
    "list of samples": lambda count: Loop([numbered_images(count)[index] for index in range(count)]),
}


# ---- batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 1, 7, 10, 99])
def test_batches_of_every_kind(kind: str, limit: int | None) -> None:
    batches = list(iterate_batches(KINDS[kind](10), 4, limit=limit))
    labels = torch.cat([labels for _, labels in batches])
    images = torch.cat([images for images, _ in batches])
    expected = torch.arange(10)[:limit]
    assert torch.equal(labels, expected)
    assert torch.equal(images[:, 0, 0, 0].long(), expected)
    assert images.dtype == torch.float32
    if "batches" not in kind and "loader" not in kind:
        assert all(len(images) == 4 for images, _ in batches[:-1])


def test_shuffled_batches_depend_on_the_seed() -> None:
    def order(seed: int) -> list[int]:
        batches = iterate_batches(numbered_images(50), 8, shuffle_seed=seed)
        return torch.cat([labels for _, labels in batches]).tolist()

    assert sorted(order(1)) == list(range(50))
    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_data(kind: str) -> None:
    if kind.endswith("loader") or kind == "map":
        data: Any = [] if kind == "loader" else Stream(0) if kind == "stream loader" else numbered_images(0)
    else:
        data = KINDS[kind](0)
    with pytest.raises(DataError, match="data set is empty") as error:
        list(iterate_batches(data, 4))
    one_line(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["map", "loader"])
def test_image_that_is_not_finite(value: float, kind: str) -> None:
    images = torch.zeros(10, 1, 4, 4)
    images[7, 0, 2, 2] = value
    data: Any = TensorDataset(images, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(DataError, match="image 7 holds NaN or infinite") as error:
        list(iterate_batches(DataLoader(data, batch_size=4) if kind == "loader" else data, 4))
    one_line(error)


@pytest.mark.parametrize("label", [-1, 5])
def test_label_out_of_range(label: int) -> None:
    labels = torch.tensor([0, label, 1])
    assert len(list(iterate_batches(TensorDataset(torch.zeros(3, 1, 4, 4), labels), 2))) == 2
    with pytest.raises(DataError, match=rf"label {label} is out of range: the model has 5 classes") as error:
        check_labels(labels, 5)
    one_line(error)


IMAGE = torch.zeros(1, 4, 4)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (Loop([(IMAGE.byte(), 0)]), "images are torch.uint8: expected floats"),
        (Loop([(Image.new("L", (4, 4)), 0)]), "an image is a Image: expected a float tensor"),
        (Loop([(IMAGE, 0), (torch.zeros(1, 5, 4), 0)]), r"shapes \(1, 4, 4\) and \(1, 5, 4\)"),
        (Loop([(IMAGE, 0.5)]), "labels are torch.float32: expected class numbers"),
        (Loop([(IMAGE, "cat")]), "expected class numbers"),
        (Loop([()]), "an item of the data is empty"),
        ([(IMAGE[0], torch.zeros(4).long())], r"batch of images has shape \(4, 4\)"),
        ([(IMAGE, 3)], r"shape \(1, 4, 4\) with one label, where a batch was expected: give single samples"),
        ([(IMAGE[None], torch.zeros(2).long())], r"batch of 1 images has labels of shape \(2,\)"),
        (3, "data of type int"),
    ],
)
def test_bad_items(data: Any, match: str) -> None:
    with pytest.raises(DataError, match=match) as error:
        list(iterate_batches(data, 2))
    one_line(error)


def test_bad_batch_size_is_refused_at_the_call() -> None:
    bad: list[dict[str, Any]] = [{"batch_size": 0}, {"batch_size": 1, "limit": 0}]
    for arguments in bad:
        with pytest.raises(DataError, match="expected at least 1"):
            iterate_batches(numbered_images(3), **arguments)


@pytest.mark.parametrize("kind", ["samples", "batches"])
def test_images_without_labels(kind: str) -> None:
    data: Any = Loop([IMAGE, IMAGE]) if kind == "samples" else [IMAGE[None], IMAGE[None]]
    labels = torch.cat([labels for _, labels in iterate_batches(data, 2)])
    assert labels.tolist() == [UNLABELLED, UNLABELLED]


# ---- calibration and validation


@pytest.mark.parametrize("kind", KINDS)
@given(total=st.integers(1, 40), count=st.integers(1, 50), seed=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_calibration_is_a_seeded_subset_without_replacement(
    kind: str, total: int, count: int, seed: int
) -> None:
    images = calibration_images(KINDS[kind](total), count, seed=seed)
    assert images.shape == (min(count, total), 1, 4, 4)
    chosen = images[:, 0, 0, 0].tolist()
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(range(total))
    assert torch.equal(images, calibration_images(KINDS[kind](total), count, seed=seed))


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_reaches_the_whole_data_set(kind: str) -> None:
    hits = {
        int(value)
        for seed in range(40)
        for value in calibration_images(KINDS[kind](12), 3, seed=seed)[:, 0, 0, 0]
    }
    assert hits == set(range(12))


def test_calibration_of_an_endless_stream() -> None:
    class Endless(IterableDataset[tuple[Tensor, int]]):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            while True:
                yield IMAGE, 0

    assert calibration_images(Endless(), 5, seed=0).shape == (5, 1, 4, 4)


def test_calibration_needs_an_image() -> None:
    with pytest.raises(DataError, match="0 calibration images"):
        calibration_images(numbered_images(3), 0, seed=0)


@given(total=st.integers(2, 60), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_validation_split(total: int, fraction: float, seed: int) -> None:
    data = numbered_images(total)
    parts = split_validation(data, fraction, seed)
    train, validation = map(labels_of, parts)
    assert sorted(train + validation) == list(range(total))
    assert train
    assert validation
    assert abs(len(validation) - total * fraction) <= 1
    again = split_validation(data, fraction, seed)
    assert labels_of(again[1]) == validation


@pytest.mark.parametrize(
    ("data", "fraction", "match"),
    [
        (numbered_images(1), 0.5, "expected at least 2"),
        (numbered_images(9), 0.0, "between 0 and 1"),
        (numbered_images(9), 1.0, "between 0 and 1"),
        (Stream(9), 0.5, "a Stream cannot be split"),
        (DataLoader(numbered_images(9)), 0.5, "a DataLoader cannot be split"),
    ],
)
def test_bad_validation_split(data: Any, fraction: float, match: str) -> None:
    with pytest.raises(DataError, match=match):
        split_validation(data, fraction, 0)


# ---- images in memory


def byte_images(count: int = 5, channels: int = 1, size: int = 6) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=seeded(0)).byte()


def plain(size: int, mean: float = 0.5, std: float = 0.5, *, channels: int = 1) -> Preprocessing:
    return Preprocessing((size, size), None, "none", (mean,) * channels, (std,) * channels, "bilinear")


def test_normalisation_and_repeated_channel() -> None:
    images = byte_images()
    data = ImageArrays(images, torch.arange(5), plain(6, 0.286, 0.353, channels=3))
    batch, labels = data.batch(torch.tensor([3, 1]))
    expected = (images[[3, 1]].float() / 255 - 0.286) / 0.353
    assert batch.shape == (2, 3, 6, 6)
    torch.testing.assert_close(batch, expected.expand(-1, 3, -1, -1))
    assert labels.tolist() == [3, 1]
    assert labels.dtype == torch.int64
    for image, label in (data[3], data.__getitems__([3])[0], data[-2]):
        assert torch.equal(image, batch[0])
        assert label == 3
    with pytest.raises(IndexError):
        data[5]


def test_a_subset_is_read_by_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ImageArrays(byte_images(20), torch.arange(20), plain(6))
    train, _ = split_validation(data, 0.5, 0)
    deeper, _ = split_validation(train, 0.5, 0)
    whole_batches = [labels for _, labels in iterate_batches(deeper, 3)]
    assert torch.cat(whole_batches).tolist() == labels_of(deeper)
    monkeypatch.setattr(ImageArrays, "__getitem__", None)
    assert len(list(iterate_batches(deeper, 3))) == 2


def test_data_loader_reads_images_in_memory() -> None:
    data = ImageArrays(byte_images(), torch.arange(5), plain(6))
    images, labels = next(iter(DataLoader(data, batch_size=5)))
    assert torch.equal(images, data.batch(torch.arange(5))[0])
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_images_are_resized_to_the_model() -> None:
    images = torch.full((2, 1, 6, 6), 51, dtype=torch.uint8)
    data = ImageArrays(images, torch.zeros(2), replace(plain(9, 0, 1), size=(9, 12)))
    batch, _ = data.batch(torch.arange(2))
    torch.testing.assert_close(batch, torch.full((2, 1, 9, 12), 0.2))


@pytest.mark.parametrize(
    ("images", "labels", "channels", "match"),
    [
        (byte_images()[:0], torch.zeros(0), None, "data set is empty"),
        (byte_images(), torch.zeros(4), None, "5 images but 4 labels"),
        (byte_images().float(), torch.zeros(5), None, "expected torch.uint8"),
        (byte_images(channels=3), torch.zeros(5), 1, "have 3 channels, the model takes 1"),
    ],
)
def test_bad_arrays(images: Tensor, labels: Tensor, channels: int | None, match: str) -> None:
    with pytest.raises(DataError, match=match):
        ImageArrays(images, labels, plain(6, channels=channels or 1))


@given(
    count=st.integers(1, 6),
    channels=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    shift=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_augmentation_keeps_shape_and_pixels(
    count: int, channels: int, height: int, width: int, shift: int, seed: int
) -> None:
    images = torch.randn(count, channels, height, width, generator=seeded(seed))
    before = images.clone()
    augmented = FlipAndShift(shift)(images, seeded(seed))
    assert augmented.shape == images.shape
    assert torch.equal(images, before)
    for image, new in zip(images, augmented, strict=True):
        # Whole pixels move: all channels of a position together.
        pixels = {tuple(pixel) for pixel in image.flatten(1).t().tolist()}
        moved = [tuple(pixel) for pixel in new.flatten(1).t().tolist()]
        assert set(moved) <= pixels
        if shift == 0:
            assert sorted(moved) == sorted(tuple(pixel) for pixel in image.flatten(1).t().tolist())
    assert torch.equal(augmented, FlipAndShift(shift)(images, seeded(seed)))


def test_a_crop_is_a_part_of_the_image_resized_to_all_of_it() -> None:
    """Of a picture of its own coordinates, slopes and offsets tell which part a crop is."""
    size, count = 40, 500
    places = (torch.arange(size) + 0.5) / size
    picture = torch.stack([places.expand(size, size), places[:, None].expand(size, size)])
    images = picture.expand(count, -1, -1, -1)
    crops = CropAndFlip()(images, seeded(0))
    assert torch.equal(crops, CropAndFlip()(images, seeded(0)))
    assert 0 <= float(crops.min()) < float(crops.max()) <= 1
    middle, step = size // 2, slice(size // 2, size // 2 + 2)
    width = crops[:, 0, middle, step].diff().squeeze() * size
    height = crops[:, 1, step, middle].diff().squeeze() * size
    assert 0.4 < float((width < 0).float().mean()) < 0.6
    area, ratio = width.abs() * height, width.abs() / height
    assert float(area.min()) == pytest.approx(0.08, abs=0.02)
    assert float(area.max()) == pytest.approx(1, abs=0.05)
    assert float(ratio.min()) == pytest.approx(3 / 4, abs=0.01)
    assert float(ratio.max()) == pytest.approx(4 / 3, abs=0.01)
    centre = crops[:, :, middle - 1 : middle + 1, middle - 1 : middle + 1].mean((2, 3))
    for across, half in zip(centre.t(), (width.abs() / 2, height / 2), strict=True):
        assert bool((across - half > -1e-5).all())
        assert bool((across + half < 1 + 1e-5).all())


def test_augmentation_of_the_inside_is_a_shift_and_a_flip() -> None:
    image = torch.arange(100.0).view(1, 1, 10, 10)
    seen = set()
    augmented = FlipAndShift(2)(image.expand(400, -1, -1, -1), seeded(0))
    candidates = {
        (flip, down, right): (image.flip(3) if flip else image).roll((down, right), (2, 3))[0, 0, 3:7, 3:7]
        for flip in (False, True)
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    for new in augmented[:, 0, 3:7, 3:7]:
        matches = [key for key, candidate in candidates.items() if torch.equal(candidate, new)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert seen == set(candidates)


# ---- files


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    zipped=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_idx_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], zipped: bool, seed: int
) -> None:
    array = torch.randint(0, 256, shape, generator=seeded(seed)).byte()
    path = tmp_path_factory.mktemp("idx") / "array.gz"
    write_idx(path, array)
    if not zipped:
        content = gzip.decompress(path.read_bytes())
        path = path.with_suffix("")
        path.write_bytes(content)
    assert torch.equal(read_idx(path), array)


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(
    folder: Path, images: int = 4, labels: int = 4, *, label: int = 1, zipped: bool = True
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        contents = {
            f"{prefix}-images-idx3-ubyte": idx_bytes(np.full((images, 28, 28), 255, np.uint8)),
            f"{prefix}-labels-idx1-ubyte": idx_bytes(np.full(labels, label, np.uint8)),
        }
        for name, content in contents.items():
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist(tmp_path: Path, layout: str, zipped: bool) -> None:
    write_fashion(tmp_path / layout, zipped=zipped)
    splits = load_data(f"fashion-mnist:{tmp_path}", SPEC, num_classes=10)
    assert splits.labelled
    assert splits.num_classes == 10
    assert isinstance(splits.augment, FlipAndShift)
    for part in (splits.train, splits.test):
        images, labels = next(iterate_batches(part or [], 4))
        assert images.shape == (4, 3, 28, 28)
        torch.testing.assert_close(images, torch.full_like(images, (1 - 0.286) / 0.353))
        assert labels.tolist() == [1, 1, 1, 1]
    grey = load_data(f"fashion-mnist:{tmp_path}", GREY)
    assert next(iterate_batches(grey.test or [], 4))[0].shape == (4, 1, 28, 28)


def test_fashion_mnist_is_searched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FASHION_MNIST_FOLDERS", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(DataError, match=r"no Fashion-MNIST in .*a or .*b: expected") as error:
        load_data("fashion-mnist", SPEC)
    one_line(error)
    write_fashion(tmp_path / "b" / "FashionMNIST" / "raw")
    assert load_data("fashion-mnist", SPEC).num_classes == 10


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1], "holds 3135 bytes of data"),
        ("train-images-idx3-ubyte", lambda content: content[:9], "its idx header needs 16 bytes, it has 9"),
        ("train-images-idx3-ubyte", lambda content: b"<html>" + content, "starts with 0x3c68746d"),
        ("t10k-labels-idx1-ubyte", lambda content: b"", "starts with 0x;"),
        ("t10k-labels-idx1-ubyte", lambda content: b"\0\0\x0d\1" + content[4:], "expected an idx file"),
        ("t10k-labels-idx1-ubyte", lambda _: idx_bytes(np.zeros((2, 2), np.uint8)), "has 2 dimensions"),
        ("t10k-labels-idx1-ubyte", lambda _: idx_bytes(np.zeros(3, np.uint8)), "4 test images but 3 labels"),
    ],
)
def test_damaged_idx(tmp_path: Path, name: str, change: Callable[[bytes], bytes], match: str) -> None:
    write_fashion(tmp_path, zipped=False)
    damage(tmp_path / name, change)
    with pytest.raises(DataError, match=match) as error:
        load_data(f"fashion-mnist:{tmp_path}", SPEC)
    one_line(error)


def test_damaged_gzip(tmp_path: Path) -> None:
    for change in (lambda content: content[:40], lambda _: b"no gzip", lambda c: c[:30] + b"\xff" * 20):
        write_fashion(tmp_path)
        damage(tmp_path / "train-images-idx3-ubyte.gz", change)
        with pytest.raises(DataError, match=r"cannot read .*train-images") as error:
            load_data(f"fashion-mnist:{tmp_path}", SPEC)
        one_line(error)


def test_missing_companion(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"has no t10k-labels-idx1-ubyte\[.gz\]"):
        load_data(f"fashion-mnist:{tmp_path}", SPEC)


def test_empty_and_out_of_range_fashion_mnist(tmp_path: Path) -> None:
    write_fashion(tmp_path / "empty", 0, 0)
    with pytest.raises(DataError, match="data set is empty"):
        load_data(f"fashion-mnist:{tmp_path / 'empty'}", SPEC)
    write_fashion(tmp_path / "label", label=10)
    with pytest.raises(DataError, match="label 10 is out of range: the data set has 10 classes"):
        load_data(f"fashion-mnist:{tmp_path / 'label'}", SPEC)


def test_model_with_another_number_of_classes(tmp_path: Path) -> None:
    write_fashion(tmp_path, label=7)
    with pytest.raises(DataError, match="label 7 is out of range: the model has 5 classes") as error:
        load_data(f"fashion-mnist:{tmp_path}", SPEC, num_classes=5)
    one_line(error)
    with pytest.warns(GroupifyWarning, match="has 10 classes, the model 1000") as caught:
        load_data(f"fashion-mnist:{tmp_path}", SPEC, num_classes=1000)
    assert caught[0].filename == __file__


# ---- CIFAR-10


def test_cifar10_binary(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    images = byte_images(12, 3, 32)
    labels = torch.arange(12).byte() % 10
    records = torch.cat([labels[:, None], images.flatten(1)], 1)
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(
            records[2 * number - 2 : 2 * number].numpy().tobytes()
        )
    (folder / "test_batch.bin").write_bytes(records[10:].numpy().tobytes())
    spec = ModelSpec("demo", {}, (3, 32, 32), None)
    for root in (tmp_path, folder):
        splits = load_data(f"cifar10:{root}", spec, num_classes=10)
        assert isinstance(splits.train, ImageArrays)
        assert isinstance(splits.test, ImageArrays)
        assert torch.equal(splits.train.images, images[:10])
        assert torch.equal(splits.test.images, images[10:])
        assert splits.test.labels.tolist() == [0, 1]
    with pytest.raises(DataError, match="have 3 channels, the model takes 1"):
        load_data(f"cifar10:{tmp_path}", GREY)
    damage(folder / "test_batch.bin", lambda content: content[:-1])
    with pytest.raises(DataError, match="has 6145 bytes: expected a multiple of 3073"):
        load_data(f"cifar10:{tmp_path}", spec)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3.bin is missing"):
        load_data(f"cifar10:{tmp_path}", spec)


def dump_like_python2(value: Any) -> bytes:
    """Pickle with the string opcodes of Python 2, which wrote the files of CIFAR-10."""
    dump = bytearray(pickle.dumps(value, protocol=3))
    old = {"SHORT_BINBYTES": b"U", "BINBYTES": b"T", "BINUNICODE": b"T"}
    for opcode, _, position in pickletools.genops(bytes(dump)):
        if opcode.name in old:
            assert position is not None
            dump[position : position + 1] = old[opcode.name]
    return bytes(dump)


def write_cifar_python(folder: Path, test: Any = None) -> Tensor:
    folder.mkdir()
    images = byte_images(6, 3, 32)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for index, name in enumerate(names):
        batch = {b"data": images[index : index + 1].flatten(1).numpy(), b"labels": [index]}
        (folder / name).write_bytes(dump_like_python2(batch))
    if test is not None:
        content = test if isinstance(test, bytes) else dump_like_python2(test)
        (folder / "test_batch").write_bytes(content)
    return images


def test_cifar10_python_version(tmp_path: Path) -> None:
    images = write_cifar_python(tmp_path / "cifar-10-batches-py")
    splits = load_data(f"cifar10:{tmp_path}", ModelSpec("demo", {}, (3, 32, 32), None))
    assert isinstance(splits.train, ImageArrays)
    assert isinstance(splits.test, ImageArrays)
    assert torch.equal(splits.train.images, images[:5])
    assert torch.equal(splits.test.images, images[5:])
    assert splits.train.labels.tolist() == [0, 1, 2, 3, 4]


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_cifar10_runs_no_code(tmp_path: Path) -> None:
    target = tmp_path / "was-run"
    write_cifar_python(tmp_path / "cifar-10-batches-py", {b"data": Malicious(target), b"labels": [0]})
    with pytest.raises(DataError, match="it names ") as error:
        load_data(f"cifar10:{tmp_path}", SPEC)
    one_line(error)
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        [1, 2],
        {b"data": b"bytes", b"labels": [0]},
        {b"data": np.zeros((1, 3072), np.float32), b"labels": [0]},
        {b"data": np.zeros((1, 3071), np.uint8), b"labels": [0]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]},
    ],
)
def test_damaged_cifar10(tmp_path: Path, content: Any) -> None:
    write_cifar_python(tmp_path / "cifar-10-batches-py", content)
    with pytest.raises(DataError, match="test_batch is not a batch of CIFAR-10's Python version") as error:
        load_data(f"cifar10:{tmp_path}", SPEC)
    one_line(error)


def test_missing_cifar10(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no CIFAR-10 in .*unpack"):
        load_data(f"cifar10:{tmp_path}", SPEC)


# ---- image folders


def write_images(root: Path, colours: dict[str, tuple[int, int, int]], count: int = 2) -> None:
    for name, colour in colours.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 30), colour).save(root / name / f"{index}.png")


COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_image_folder(tmp_path: Path, test_name: str) -> None:
    write_images(tmp_path / "train", COLOURS)
    write_images(tmp_path / test_name, COLOURS, count=1)
    preprocessing = Preprocessing((20, 16), 24, "center", (0.5, 0.25, 0.0), (0.5, 1.0, 2.0), "bicubic")
    splits = load_data(f"imagefolder:{tmp_path}", ModelSpec("x", {}, (3, 20, 16), preprocessing))
    assert splits.num_classes == 2
    assert isinstance(splits.augment, CropAndFlip)
    assert splits.train is not None
    images, labels = next(iterate_batches(splits.train, 4))
    assert images.shape == (4, 3, 20, 16)
    assert labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(images[3].mean((1, 2)), torch.tensor([1.0, -0.25, 0.0]))
    assert splits.test is not None
    assert next(iterate_batches(splits.test, 4))[1].tolist() == [0, 1]


def test_image_folder_as_torchvision_prepares_it(tmp_path: Path) -> None:
    from torchvision.models import ResNet18_Weights

    from groupify.models.sources import load_model

    (tmp_path / "noise").mkdir()
    pixels = torch.randint(0, 256, (280, 300, 3), generator=seeded(0)).byte().numpy()
    image = Image.fromarray(pixels)
    image.save(tmp_path / "noise" / "x.png")
    splits = load_data(f"imagefolder:{tmp_path}", load_model("resnet18", weights="none").spec)
    assert splits.train is None
    images, _ = next(iterate_batches(splits.test or [], 1))
    torch.testing.assert_close(images[0], ResNet18_Weights.DEFAULT.transforms()(image))


def test_image_folder_without_preprocessing_is_never_prepared_as_for_imagenet(tmp_path: Path) -> None:
    write_images(tmp_path, COLOURS)
    for channels in (1, 3):
        spec = ModelSpec("x", {}, (channels, 20, 20), None)
        with pytest.raises(
            SpecError, match="nothing says how images become inputs of x: give --mean and --std"
        ):
            load_data(f"imagefolder:{tmp_path}", spec)
        said = PreprocessingOptions(mean=(0.5,), std=(0.25,))
        splits = load_data(f"imagefolder:{tmp_path}", spec, preprocessing=said)
        images, _ = next(iterate_batches(splits.test or [], 4))
        assert images.shape == (4, channels, 20, 20)
        assert splits.preprocessing == Preprocessing(
            (20, 20), 20, "center", (0.5,) * channels, (0.25,) * channels, "bilinear"
        )
        if channels == 3:
            assert images[3, :, 0, 0].tolist() == [2, -2, -2]


def test_small_images_are_enlarged_with_a_warning(tmp_path: Path) -> None:
    write_images(tmp_path, COLOURS)
    spec = ModelSpec("x", {}, (3, 64, 64), plain(64, channels=3))
    with pytest.warns(GroupifyWarning, match="as 30×40 to 64×64, and are enlarged.*--input-size"):
        splits = load_data(f"imagefolder:{tmp_path}", spec)
    assert next(iterate_batches(splits.test or [], 4))[0].shape == (4, 3, 64, 64)


@pytest.mark.parametrize("crop", ["center", "none"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_images_in_memory_and_in_files_are_prepared_alike(
    tmp_path: Path, crop: str, interpolation: str
) -> None:
    pixels = torch.randint(0, 256, (1, 3, 30, 44), generator=seeded(0)).byte()
    (tmp_path / "x").mkdir()
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "x" / "x.png")
    preprocessing = Preprocessing(
        (12, 16), 20 if crop == "center" else None, crop, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), interpolation
    )
    file, _ = ImageFolder(tmp_path, ["x"], preprocessing)[0]
    memory, _ = ImageArrays(pixels, torch.zeros(1), preprocessing)[0]
    assert file.shape == memory.shape == (3, 12, 16)
    # Pillow rounds to whole pixel values, twice.
    assert (file - memory).abs().max() < 0.02


def test_what_the_user_says_holds_for_every_data_set() -> None:
    said = PreprocessingOptions(mean=(0.1, 0.2, 0.3), std=(0.5,), resize=32)
    splits = load_data("demo", SPEC, preprocessing=said)
    expected = Preprocessing((28, 28), 32, "center", (0.1, 0.2, 0.3), (0.5,) * 3, "bilinear")
    assert splits.preprocessing == expected
    own = load_data("demo", SPEC)
    assert own.preprocessing == demo.PREPROCESSING
    (image, _), (before, _) = splits.test[0], own.test[0]  # type: ignore[index]
    assert image.shape == before.shape == (3, 28, 28)
    assert image.min().item() == pytest.approx(-0.6)


def no_root(root: Path) -> None:
    root.rmdir()


def no_classes(root: Path) -> None:
    (root / "picture.png").write_bytes(b"")


def empty_class(root: Path) -> None:
    write_images(root, COLOURS)
    (root / "void").mkdir()


def no_test_part(root: Path) -> None:
    write_images(root / "train", COLOURS)


def odd_classes(root: Path) -> None:
    write_images(root / "train", COLOURS)
    write_images(root / "val", {**COLOURS, "green": (0, 255, 0)})


@pytest.mark.parametrize(
    ("prepare", "match"),
    [
        (no_root, "no folder .*: expected ROOT/train"),
        (no_classes, "has no sub-folders"),
        (empty_class, "no valid file for the classes void"),
        (no_test_part, "has a folder train, but none of val"),
        (odd_classes, "different classes: 'green' is in only one"),
    ],
)
def test_bad_image_folder(tmp_path: Path, prepare: Callable[[Path], None], match: str) -> None:
    root = tmp_path / "images"
    root.mkdir()
    prepare(root)
    with pytest.raises(DataError, match=match) as error:
        load_data(f"imagefolder:{root}", SPEC)
    one_line(error)


def test_damaged_image(tmp_path: Path) -> None:
    write_images(tmp_path, COLOURS)
    damage(tmp_path / "red" / "1.png", lambda content: content[:50])
    splits = load_data(f"imagefolder:{tmp_path}", replace(SPEC, preprocessing=demo.PREPROCESSING))
    with pytest.raises(DataError, match=r"cannot read the image .*1.png") as error:
        list(iterate_batches(splits.test or [], 4))
    one_line(error)


# ---- specs


def test_synthetic_images_have_no_labels() -> None:
    spec = ModelSpec("x", {}, (2, 5, 7), None)
    splits = load_data("synthetic", spec, num_classes=3, seed=1)
    assert not splits.labelled
    images, labels = next(iterate_batches(splits.train or [], 3))
    assert images.shape == (3, 2, 5, 7)
    assert set(labels.tolist()) == {UNLABELLED}
    again, _ = next(iterate_batches(load_data("synthetic", spec, seed=1).train or [], 3))
    test, _ = next(iterate_batches(splits.test or [], 3))
    other, _ = next(iterate_batches(load_data("synthetic", spec, seed=2).train or [], 3))
    assert torch.equal(images, again)
    assert not torch.equal(images, test)
    assert not torch.equal(images, other)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("fashion-mist", "unknown data 'fashion-mist'.*did you mean 'fashion-mnist'"),
        ("demo:", "ends in a colon"),
        ("demo:x", "unknown data 'demo:x'"),
        ("synthetic:x", "unknown data 'synthetic:x'"),
        ("cifar10", "give cifar10:ROOT"),
        ("imagefolder", "give imagefolder:ROOT"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
    ],
)
def test_bad_spec(spec: str, match: str) -> None:
    with pytest.raises(SpecError, match=match) as error:
        load_data(spec, SPEC)
    one_line(error)


def test_data_of_another_input_shape() -> None:
    for spec in ("demo", f"imagefolder:{Path(__file__).parent}"):
        with pytest.raises(DataError, match="input shape"):
            load_data(spec, ModelSpec("x", {}, (3, 4, 28, 28), None))


@pytest.fixture
def user_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "user_data.py").write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "from groupify.data.splits import DataSplits\n"
        "def one():\n    return TensorDataset(torch.zeros(4, 1, 2, 2), torch.zeros(4).long())\n"
        "def pair():\n    return one(), DataLoader(one(), batch_size=2)\n"
        "def named():\n    return {'train': one(), 'val': one()}\n"
        "def splits():\n    return DataSplits('', one(), one(), 3, None, False)\n"
        "def samples():\n    return (item for item in one())\n"
        "def nothing_to_read():\n    return iter(())\n"
        "def generator():\n    return (batch for batch in DataLoader(one(), batch_size=3))\n"
        "def tensor():\n    return torch.zeros(4, 1, 2, 2)\n"
        "def odd():\n    return {'tset': one()}\n"
        "def number():\n    return 3\n"
        "def text():\n    return 'demo'\n"
        "def empty():\n    return DataLoader(TensorDataset(torch.zeros(0, 1), torch.zeros(0)))\n"
        "def broken():\n    raise KeyError('a\\nb')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_data", raising=False)
    return "user_data"


@pytest.mark.parametrize(("name", "has_train"), [("one", False), ("pair", True), ("named", True)])
def test_user_data(user_data: str, name: str, has_train: bool) -> None:
    splits = load_data(f"{user_data}:{name}", SPEC)
    assert splits.labelled
    assert splits.num_classes is None
    assert (splits.train is not None) is has_train
    assert sum(len(labels) for _, labels in iterate_batches(splits.test or [], 3)) == 4


def test_user_data_that_is_read_only_once(user_data: str) -> None:
    for name in ("generator", "tensor"):
        part = load_data(f"{user_data}:{name}", SPEC).test
        for _ in range(2):
            assert sum(len(images) for images, _ in iterate_batches(part or [], 3)) == 4


def test_user_data_splits(user_data: str) -> None:
    splits = load_data("user_data:splits", SPEC)
    assert isinstance(splits, DataSplits)
    assert splits.spec == "user_data:splits"
    assert not splits.labelled
    assert splits.num_classes == 3


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("samples", DataError, r"an image of shape \(1, 2, 2\) with one label, where a batch was expected"),
        ("nothing_to_read", DataError, "the data set is empty"),
        ("odd", SpecError, r"returned the keys \['tset'\]: expected train, test"),
        ("number", SpecError, "returned a int for test"),
        ("text", SpecError, "returned a str for test"),
        ("empty", DataError, "the test part is empty"),
        ("broken", SpecError, r"user_data:broken': KeyError: 'a\\nb'"),
        ("nothing", SpecError, "no 'nothing' in user_data"),
    ],
)
def test_bad_user_data(user_data: str, name: str, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match) as error:
        load_data(f"user_data:{name}", SPEC)
    one_line(error)


def test_arguments_of_another_type_are_told() -> None:
    source = load_model("demo")
    with pytest.raises(WrongTypeError, match="spec is a NoneType: expected a name like demo"):
        load_data(None, source.spec)  # type: ignore[arg-type]
    with pytest.raises(WrongTypeError, match=r"model_spec is a Source: expected .*; give its \.spec"):
        load_data("demo", source)  # type: ignore[arg-type]
