"""A statically quantised (int8) variant beside the float file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from groupify.errors import ArtefactError, ConversionError, DataError
from groupify.machine import int8_dot_products
from groupify.onnx.exposed import save
from groupify.onnx.int8.bias_correction import correct_biases
from groupify.onnx.int8.equalisation import equalise
from groupify.onnx.int8.quantised_graph import keep_linear_outputs, protect_float_layers
from groupify.onnx.int8.quantiser import FloatNode, Quantiser, grouped_transposed
from groupify.onnx.int8.ranges import Feed, Range, best_ranges
from groupify.onnx.int8.space_to_depth import unfold_images
from groupify.onnx.runtime import open_session
from groupify.scores import OutputErrors

__all__ = ["FloatNode", "QuantizedModel", "judging_images", "quantize_onnx"]

_BATCH = 16
# Means of more images do not become better, only slower.
_IMAGES_FOR_BIASES = 128
# From this number on, a quarter of the images does not set anything and judges.
_ENOUGH_TO_JUDGE = 16


@dataclass(frozen=True)
class QuantizedModel:
    """An int8 file: quantize-dequantize (QDQ) pairs, weights quantised per output channel.

    Attributes:
        path: the file.
        file_bytes: its size.
        calibration_images: how many it was made with.
        reduced_range: whether weights have 7 bits, since the CPU's 8-bit products could overflow.
        left_in_float: nodes that it computes in float32, and why.
        ranges: how those of the activations were found.
        equalised: pairs of convs whose channels were scaled alike.
        corrected: layers whose bias was corrected; 0 where the held-out images were better off without.
        error: mean squared difference of the outputs from the float file's, relative to their variance, on
            images that had no part in it where there were enough; None if it is only for timing.
    """

    path: Path
    file_bytes: int
    calibration_images: int
    reduced_range: bool
    left_in_float: tuple[FloatNode, ...] = ()
    ranges: str = "minimum and maximum of some images"
    equalised: int = 0
    corrected: int = 0
    error: float | None = None


def quantize_onnx(
    path: Path | str, target: Path | str, *, images: Tensor, only_for_timing: bool = False
) -> QuantizedModel:
    """Quantise an exported file to int8 with the help of unlabelled images.

    Channels between two convs are scaled alike, exactly (Nagel et al., 2019); each activation gets the range
    with the least squared error; and the biases are corrected in the order in which the layers run, if that
    brings the outputs on held-out images nearer to those of the float file.

    How much it changes is for ``compare_files`` to measure, and what it does to accuracy for
    ``evaluate(OnnxModule(target), data)``. It is not always faster: ONNX Runtime has no blocked kernel for
    int8 convs, so time both. What the quantiser cannot take, such as a transposed conv in groups, stays
    float32.

    Args:
        path: the float file.
        target: the file to write; an existing one is replaced.
        images: normalised inputs, shape (N, C, H, W).
        only_for_timing: leave out all that changes values only: the ranges are those of the first images.

    Raises:
        DataError: no images.
        ConversionError: the file has several inputs, or the quantiser fails, whatever is left in float32.
        ArtefactError: the file cannot be written.
    """
    if len(images) == 0:
        raise DataError("no images to calibrate int8 with: expected at least one, better some hundred")
    file = Path(target)
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
            work = _Quantisation(Path(path), images.float(), Path(folder))
            return work.untuned(file) if only_for_timing else work.tuned(file)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {str(file)!r}: {error.strerror or error}; "
            "choose a folder that exists and is writable"
        ) from error


def judging_images(images: Tensor) -> Tensor:
    """Return those of the calibration images that judge the file: all where they are few."""
    return images[-(len(images) // 4) :] if len(images) >= _ENOUGH_TO_JUDGE else images


class _Quantisation:
    """The steps on one file, in a folder for drafts."""

    def __init__(self, path: Path, images: Tensor, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._images = images
        self._model = onnx.load(str(path))
        names = [source.name for source in self._model.graph.input]
        if len(names) > 1:
            raise ConversionError(
                f"{str(path)!r} has the inputs {', '.join(names)}: int8 is calibrated with images alone; "
                "deploy the float file"
            )
        self._reduced = not int8_dot_products()
        self._plain = self._path
        if unfold_images(self._model):
            self._plain = folder / "unfolded.onnx"
            save(self._model, self._plain)

    def untuned(self, target: Path) -> QuantizedModel:
        """Write a file with the ranges of the first images."""
        quantised, left = self._quantise(self._plain, {})
        draft = self._folder / "plain.onnx"
        _write(quantised, draft)
        os.replace(draft, target)
        return QuantizedModel(target, target.stat().st_size, len(self._images), self._reduced, left)

    def tuned(self, target: Path) -> QuantizedModel:
        """Write the file that is nearest to the float one."""
        judging = judging_images(self._images)
        count = len(self._images) - len(judging) or len(judging)
        fitted = self._images[:count]
        feeds = self._feeds(fitted)
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        pairs = equalise(model, feeds)
        equalised = self._folder / "equalised.onnx"
        save(model, equalised)
        quantised, left = self._quantise(equalised, best_ranges(model, feeds))
        plain, shifted = self._folder / "plain.onnx", self._folder / "shifted.onnx"
        _write(quantised, plain)
        corrected = correct_biases(quantised, model, self._feeds(fitted[:_IMAGES_FOR_BIASES]))
        _write(quantised, shifted)
        judges = self._feeds(judging)
        before, after = (_error(self._path, file, judges) for file in (plain, shifted))
        helps = before is not None and after is not None and after < before
        os.replace(shifted if helps else plain, target)
        return QuantizedModel(
            path=target,
            file_bytes=target.stat().st_size,
            calibration_images=len(self._images),
            reduced_range=self._reduced,
            left_in_float=left,
            ranges="least squared error",
            equalised=pairs,
            corrected=corrected if helps else 0,
            error=after if helps else before,
        )

    def _feeds(self, images: Tensor) -> list[Feed]:
        """Cut images into batches that the file takes, the last one filled up with the first images."""
        source = self._model.graph.input[0]
        fixed = max(0, source.type.tensor_type.shape.dim[0].dim_value)  # some exporters write -1 for any
        size = fixed or _BATCH
        if fixed and len(images) % fixed:
            count = -(-len(images) // fixed) * fixed
            images = images[torch.arange(count) % len(images)]
        return [{source.name: batch.cpu().numpy()} for batch in images.split(size)]

    def _quantise(
        self, path: Path, ranges: Mapping[str, Range]
    ) -> tuple[onnx.ModelProto, tuple[FloatNode, ...]]:
        """Quantise a float file, which gives its metadata; return also what stays float32."""
        draft = self._folder / "quantised.onnx"
        first = self._feeds(self._images[:_BATCH])[0]
        quantiser = Quantiser(path, self._model.graph, draft, self._reduced, first, ranges)
        left = grouped_transposed(self._model.graph)
        problem = quantiser.problem(without=left)
        if problem is not None:
            left += quantiser.culprits(without=left)
            problem = quantiser.problem(without=left)
        if problem is not None:
            raise ConversionError(
                f"ONNX Runtime's quantiser fails on {str(self._path)!r}: {problem}; deploy the float file"
            )
        quantised = onnx.load(str(draft))
        del quantised.metadata_props[:]
        quantised.metadata_props.extend(self._model.metadata_props)
        keep_linear_outputs(quantised.graph)
        protect_float_layers(quantised.graph)
        return quantised, left


def _write(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)


def _error(reference: Path, file: Path, feeds: Sequence[Feed]) -> float | None:
    """Return the relative squared error of a file's outputs; None where none is floating point."""
    errors, threads = OutputErrors(), torch.get_num_threads()
    sessions = [open_session(path, threads=threads) for path in (reference, file)]
    for feed in feeds:
        right, found = (
            [torch.as_tensor(value) for value in session.run(None, dict(feed))] for session in sessions
        )
        if not any(value.is_floating_point() for value in right):
            return None
        errors.add_dense(right)
        errors.add("int8", right, found)
    return errors.relative("int8")
