"""The int8 file beside the float one, and what is measured of it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from groupify.data.batches import calibration_images
from groupify.data.splits import DataSplits
from groupify.errors import SpecError
from groupify.onnx.agreement import compare_files
from groupify.onnx.quantisation import OnnxModule, quantize_onnx
from groupify.reporting.results import Int8File
from groupify.scores import evaluate

# Each is run through the float file with all its activations kept, so more would take memory and time.
_CALIBRATION_IMAGES = 256
_COMPARED_IMAGES = 256
# Enough real images to see a wrong export; parity is not an accuracy measurement.
_PARITY_IMAGES = 4


def check_quantize(quantize: bool, data: str | None) -> None:
    """Refuse int8 without data, before any work.

    Raises:
        SpecError: there is nothing to calibrate with.
    """
    if quantize and data is None:
        raise SpecError("--quantize needs --data to calibrate with, for example --data demo")


def int8_path(path: Path) -> Path:
    """Return where the int8 variant of an ONNX file belongs: ``model.onnx`` → ``model.int8.onnx``."""
    return path.with_name(f"{path.name.removesuffix('.onnx')}.int8.onnx")


def parity_images(data: DataSplits | None) -> Tensor | None:
    """Return a few real images for the parity check, test images where there are such."""
    part = None if data is None else data.test if data.test is not None else data.train
    return None if part is None else calibration_images(part, _PARITY_IMAGES, seed=0)


def write_int8(path: Path, data: DataSplits, *, threads: int, seed: int, progress: bool) -> Int8File:
    """Write the int8 variant beside a float ONNX file and measure all but its latency.

    Args:
        path: the float file.
        data: training images calibrate it (test images where there are no others), test images measure it.
        threads: intra-op threads of the measurements.
        seed: chooses the images.
        progress: show bars on stderr.

    Raises:
        DataError: no images, or images that cannot be read.
        ArtefactError: the file cannot be written.
    """
    test = data.test
    images = calibration_images(data.for_calibration, _CALIBRATION_IMAGES, seed=seed)
    quantized = quantize_onnx(path, int8_path(path), images=images)
    # Images that did not set the ranges, where there are such.
    fresh = images if test is None else calibration_images(test, _COMPARED_IMAGES, seed=seed)
    agreement = compare_files(path, quantized.path, images=fresh, threads=threads)
    top1 = None
    if data.labelled and test is not None:
        top1 = evaluate(OnnxModule(quantized.path, threads=threads), test, progress=progress).top1
    return Int8File(
        file_bytes=quantized.file_bytes,
        calibration_images=quantized.calibration_images,
        reduced_range=quantized.reduced_range,
        agreement=agreement,
        top1=top1,
    )


def int8_notes(int8: Int8File | None) -> tuple[str, ...]:
    """Return that int8 does not pay on this machine, where it was timed and does not."""
    if int8 is None or int8.speed_up_over_float is None or int8.speed_up_over_float >= 1:
        return ()
    return (
        f"int8 is slower than float on this machine: {int8.speed_up_over_float:.2f}× its speed; ONNX "
        "Runtime has no blocked kernel for int8 convs, so deploy the float file here",
    )
