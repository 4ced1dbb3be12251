"""ONNX files that are only timed: latency depends on shapes and precision, not on weights or ranges."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from groupify.onnx.exporting import export_onnx
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.structures import INT8, Precision


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
