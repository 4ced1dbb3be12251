"""ONNX files that are only timed: latency depends on shapes and precision, not on weights or ranges."""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from groupify.conversion.surgery import restructure
from groupify.measure.benchmarks import speed_ups
from groupify.onnx.exporting import export_onnx
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.structures import INT8, Plan, Precision

TimeFiles = Callable[..., Mapping[str, float]]


def export_for_timing(
    model: nn.Module, path: Path, input_shape: tuple[int, ...], precision: Precision
) -> Path:
    """Export a model; in int8 with ranges that a random image sets.

    Args:
        model: any module that ``export_onnx`` takes.
        path: the file to write.
        input_shape: (C, H, W) of one image.
        precision: what the file computes in.

    Returns:
        The path.

    Raises:
        GroupifyError: the model cannot be exported, or not be quantised.
    """
    if precision != INT8:
        return export_onnx(model, path, input_shape=input_shape).path
    image = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    exported = export_onnx(model, path.with_name(f"{path.stem}.float32.onnx"), input_shape=input_shape).path
    try:
        return quantize_onnx(exported, path, images=image, only_for_timing=True).path
    finally:
        exported.unlink()


class DenseFiles:
    """The files of a dense model, each made when it is first asked for; they go when this does.

    Args:
        model: any module that ``export_onnx`` takes; left untouched.
        input_shape: (C, H, W) of one image.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        self._model, self._shape = model, input_shape
        self._files: dict[Precision, Path] = {}

    def __getitem__(self, precision: Precision) -> Path:
        if precision not in self._files:
            path = self._folder / f"{precision}.onnx"
            self._files[precision] = export_for_timing(self._model, path, self._shape, precision)
        return self._files[precision]

    @functools.cached_property
    def _folder(self) -> Path:
        folder = tempfile.mkdtemp(prefix="groupify-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)


def share_of_dense(
    model: nn.Module,
    dense: Path,
    plan: Plan,
    *,
    threads: int = 1,
    progress: bool = False,
    time_files: TimeFiles = speed_ups,
) -> float:
    """Return the latency of a model with a plan ÷ that of the dense model, timed in turns.

    The weights are truncated: latency does not depend on them.

    Args:
        model: the dense model; left untouched.
        dense: its file, in the precision of the plan.
        plan: what becomes of its convs.
        threads: intra-op threads.
        progress: show a bar on stderr.
        time_files: returns by how much files are faster than one of them.

    Raises:
        GroupifyError: the model cannot be exported, or ONNX Runtime refuses it.
    """
    planned = restructure(model, plan.recipes)
    with tempfile.TemporaryDirectory(prefix="groupify-") as folder:
        own = export_for_timing(planned, Path(folder, "planned.onnx"), plan.input_shape, plan.precision)
        found = time_files(
            {"dense": dense, "planned": own}, "dense", input_shape=plan.input_shape, threads=threads,
            progress=progress,
        )  # fmt: skip
    return 1 / found["planned"]
