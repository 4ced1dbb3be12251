"""Files for any height and width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import groupify
from groupify.errors import ConversionError, ParityError, SpecError
from groupify.measure.benchmarks import benchmark_onnx
from groupify.onnx.any_size import other_shape
from groupify.onnx.parity import check_parity
from groupify.onnx.runtime import OnnxModule

SHAPE = (3, 16, 24)


class UNet(nn.Module):
    """Takes multiples of 4 only: its maps are halved twice and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 1)
        self.up, self.up2 = nn.ConvTranspose2d(16, 16, 2, 2), nn.ConvTranspose2d(32, 8, 2, 2)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        a = F.relu(self.a(images))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        c = self.up(F.relu(self.c(F.max_pool2d(b, 2))))
        scores: Tensor = self.head(torch.cat([a, self.up2(torch.cat([b, c], 1))], 1))
        return scores


class Segmenter(nn.Module):
    """Enlarges its map to the size of the image, whatever that is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 3, 2, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.head(F.relu(self.a(images)))
        return F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False)


class SuperResolution(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.PixelShuffle(2))


class Padded(nn.Module):
    """Pads what does not divide: a branch on the size, which one graph does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet()

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % 4 or width % 4:
            images = F.pad(images, (0, -width % 4, 0, -height % 4))
        scores: Tensor = self.net(images)[..., :height, :width]
        return scores


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, 2, padding=1)
        self.classifier = nn.Sequential(nn.Linear(4 * 8 * 12, 5))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(images).flatten(1))
        return scores


def _made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize(("kind", "step"), [(UNet, 4), (Segmenter, 1), (SuperResolution, 1)])
def test_a_file_takes_any_size_that_the_model_takes(tmp_path: Path, kind: type[nn.Module], step: int) -> None:
    model = _made(kind)
    assert other_shape(model, SHAPE) == (3, 16 + step, 24 + 3 * step)
    exported = groupify.export(model, tmp_path / "net.onnx", input_shape=SHAPE, dynamic_size=True)
    dims = onnx.load(str(exported.path)).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]
    parity = check_parity(model, exported.path, input_shape=SHAPE, dynamic_size=True)
    assert parity.shapes == (SHAPE, (3, 16 + step, 24 + 3 * step))
    images = torch.randn(2, 3, 8, 44)  # smaller and larger than what was traced and checked
    with torch.no_grad():
        torch.testing.assert_close(OnnxModule(exported.path)(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("net", "shape", "names"), [
    (nn.Sequential(nn.Conv1d(2, 4, 3)), (2, 9), ["batch", 2, "length"]),
    (nn.Sequential(nn.Conv3d(2, 4, 1)), (2, 3, 4, 5), ["batch", 2, "depth", "height", "width"]),
])  # fmt: skip
def test_sizes_of_other_dimensions(
    tmp_path: Path, net: nn.Module, shape: tuple[int, ...], names: list[Any]
) -> None:
    groupify.export(net, tmp_path / "net.onnx", example_inputs=torch.randn(2, *shape), dynamic_size=True)
    dims = onnx.load(str(tmp_path / "net.onnx")).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == names


def test_a_flatten_into_a_linear_layer_is_refused_by_name(tmp_path: Path) -> None:
    says = r"takes inputs of one size only: on \(3, 17, 27\) 'classifier.0' \(Linear\) fails \(mat1 and mat2"
    with pytest.raises(ConversionError, match=says):
        groupify.export(_made(Flattened), tmp_path / "net.onnx", input_shape=SHAPE, dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_what_branches_on_the_size_is_refused(tmp_path: Path) -> None:
    says = r"\(3, 16, 24\) is right, so what the model does depends on the size"
    with pytest.raises(ParityError, match=says):
        groupify.export(_made(Padded), tmp_path / "net.onnx", input_shape=SHAPE, dynamic_size=True)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx.failed"]


def test_what_is_not_called_with_images_has_no_size(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="one tensor of images"):
        groupify.export(nn.Linear(4, 2), tmp_path / "net.onnx", input_shape=(4,), dynamic_size=True)


def test_int8_files_too(tmp_path: Path) -> None:
    model = _made(SuperResolution)
    found = groupify.export_int8(model, tmp_path / "net.onnx", torch.randn(24, *SHAPE), dynamic_size=True)
    assert len(found.parity.shapes) == 2
    images = torch.randn(1, 3, 40, 20)
    with torch.no_grad():
        off = (OnnxModule(found.file.path)(images) - model(images)).square().mean() / model(images).var()
    assert off < 0.02


def test_a_result_is_exported_and_timed_at_a_size(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
    rules = groupify.Rules(min_group_width=1)  # whatever the processor
    result = groupify.compress(net, torch.randn(24, *SHAPE), groups=2, rules=rules)
    for precision in ("float32", "int8"):
        written = groupify.export(
            result, tmp_path / f"{precision}.onnx", precision=precision, dynamic_size=True
        )
        assert len(written.parity.shapes) == 2
    files = {"float32": tmp_path / "float32.onnx"}
    small, large = (
        benchmark_onnx(files, input_shape=(3, side, side), seconds=0.1)[0].median_ms for side in (16, 128)
    )
    assert large > 5 * small
