"""A model as one int8 file, checked on the way."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from groupify.errors import DataError
from groupify.onnx.comparison import Agreement, compare_files
from groupify.onnx.exporting import export_onnx
from groupify.onnx.int8.quantisation import QuantizedModel, judging_images, quantize_onnx
from groupify.onnx.parity import Parity, check_parity

if TYPE_CHECKING:
    from groupify.models.preprocessing import Preprocessing

# Enough real images to see a wrong export; parity is not an accuracy measurement.
_PARITY_IMAGES = 4


def run_at_other_sizes(float32: Path, int8: Path, images: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    """Run a float32 file and its int8 variant on images enlarged to other sizes; their outputs must fit.

    Args:
        images: shape (N, *shapes[0]); the first ones are taken.
        shapes: of one input, the first that of the images.

    Raises:
        GroupifyError: ONNX Runtime cannot run a file at that size, or the shapes of the outputs differ.
    """
    modes = {1: "linear", 2: "bilinear", 3: "trilinear"}
    for shape in shapes[1:]:
        larger = F.interpolate(images[:_PARITY_IMAGES].float(), size=shape[1:], mode=modes[len(shape) - 1])
        compare_files(float32, int8, images=larger)


@dataclass(frozen=True)
class ExportedInt8:
    """An int8 file and how near it is to the model.

    Attributes:
        file: the file, what stayed float32 in it and why, how its ranges were found, its error.
        parity: of the float32 file that it was made from, against the model in PyTorch.
        agreement: of its outputs with those of the float32 file, on the images that judged it.
    """

    file: QuantizedModel
    parity: Parity
    agreement: Agreement


def export_int8(
    model: nn.Module,
    path: Path | str,
    images: Tensor,
    *,
    preprocessing: Preprocessing | None = None,
    static_batch: int | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportedInt8:
    """Export a dense or converted model to an int8 ONNX file, by way of a float32 file that is checked.

    Args:
        model: any module of one input that ``torch.export`` can trace.
        path: the file to write; an existing one is replaced.
        images: unlabelled calibration images, preprocessed as for inference, shape (N, C, H, W); some
            hundred. From 16 on, the last quarter sets nothing and judges.
        preprocessing: what the images went through, recorded in the metadata.
        static_batch: a fixed batch size; None leaves it dynamic.
        dynamic_size: leave height and width open as well, as for ``export``; both files are run at another
            size too.
        opset: of the ONNX operators, as for ``export``.
        metadata: more entries for the file's metadata.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> exported = groupify.export_int8(net, "net.int8.onnx", torch.randn(64, 3, 16, 16))
        >>> exported.file.left_in_float
        ()

    Raises:
        DataError: no images.
        ConversionError: the model cannot be exported or quantised.
        ParityError: the float32 file computes something else than the model.
        ArtefactError: the file cannot be written.
    """
    if images.dim() < 2 or len(images) == 0:
        raise DataError(
            f"calibration images of shape {tuple(images.shape)}, expected (N, C, H, W) with N ≥ 1, better "
            "some hundred"
        )
    shape = tuple(images.shape[1:])
    judges = judging_images(images)
    with tempfile.TemporaryDirectory(prefix="groupify-") as folder:
        float32 = export_onnx(
            model, Path(folder) / "float32.onnx", input_shape=shape, preprocessing=preprocessing,
            static_batch=static_batch, dynamic_size=dynamic_size, opset=opset, metadata=metadata,
        ).path  # fmt: skip
        parity = check_parity(
            model, float32, input_shape=shape, images=judges[:_PARITY_IMAGES], dynamic_size=dynamic_size
        )
        quantized = quantize_onnx(float32, path, images=images)
        agreement = compare_files(float32, quantized.path, images=judges)
        run_at_other_sizes(float32, quantized.path, judges, parity.shapes)
    return ExportedInt8(quantized, parity, agreement)
