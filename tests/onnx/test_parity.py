from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from groupify.errors import GroupifyError, ParityError
from groupify.onnx.comparison import compare_outputs
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from tests.onnx.nets import INPUT_SHAPE, TwoHeads, randomise


def corrupted(source: Path, target: Path, weight: str, value: float | None = None) -> Path:
    """Copy an ONNX file with one element of one weight changed."""
    model = onnx.load(str(source))
    initializer = next(entry for entry in model.graph.initializer if entry.name == weight)
    array = numpy_helper.to_array(initializer).copy()
    array.flat[0] = array.flat[0] + 1 if value is None else value
    initializer.CopyFrom(numpy_helper.from_array(array, weight))
    onnx.save(model, str(target))
    return target


def test_a_good_file_passes(net: nn.Module, exported: Path) -> None:
    images = torch.rand(4, *INPUT_SHAPE, generator=torch.Generator().manual_seed(3))
    parity = check_parity(net, exported, input_shape=INPUT_SHAPE, images=images, batch_sizes=(1, 3))
    assert 0 < parity.max_abs_diff < 1e-5
    assert 0 < parity.max_rel_diff < 1e-5
    assert parity.top1_agreement == 1.0
    assert parity.batch_sizes == (1, 3)
    assert parity.real_images == 4
    assert exported.exists()


@pytest.mark.parametrize(("shape", "decided"), [((4, 3), True), ((4, 1), False), ((4, 3, 5, 5), False)])
def test_only_class_scores_have_a_top_class(shape: tuple[int, ...], decided: bool) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = compare_outputs({"out": values}, {"out": values}).top1_agreement
    assert found == (1.0 if decided else None)


def test_several_outputs_are_compared(tmp_path: Path) -> None:
    net = randomise(TwoHeads()).eval()
    path = export_onnx(net, tmp_path / "heads.onnx", input_shape=INPUT_SHAPE).path
    assert check_parity(net, path, input_shape=INPUT_SHAPE).max_abs_diff < 1e-5
    bad = corrupted(path, tmp_path / "bad.onnx", "aux.weight")
    with pytest.raises(ParityError, match="aux"):
        check_parity(net, bad, input_shape=INPUT_SHAPE)


@pytest.mark.parametrize("layer", ["stem", "conv1", "conv2", "fc"])
def test_a_corrupted_weight_is_named_and_the_file_kept_aside(
    net: nn.Module, exported: Path, tmp_path: Path, layer: str
) -> None:
    bad = corrupted(exported, tmp_path / "bad.onnx", f"{layer}.weight")
    with pytest.raises(
        ParityError, match=rf"first diverging node '\S+' \(weights '{layer}.weight'\)"
    ) as caught:
        check_parity(net, bad, input_shape=INPUT_SHAPE)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.onnx.failed"]


def test_nan_in_the_first_of_two_outputs_never_passes(tmp_path: Path) -> None:
    net = randomise(TwoHeads()).eval()
    path = export_onnx(net, tmp_path / "heads.onnx", input_shape=INPUT_SHAPE).path
    bad = corrupted(path, tmp_path / "bad.onnx", "out.weight", float(np.nan))
    with pytest.raises(ParityError, match="differs"):
        check_parity(net, bad, input_shape=INPUT_SHAPE, tolerance=math.inf)


def test_nan_never_passes(net: nn.Module, exported: Path, tmp_path: Path) -> None:
    bad = corrupted(exported, tmp_path / "bad.onnx", "fc.weight", float(np.nan))
    with pytest.raises(ParityError, match="differs"):
        check_parity(net, bad, input_shape=INPUT_SHAPE)


def test_the_model_keeps_its_modes_and_hooks(exported: Path, net: nn.Module, tmp_path: Path) -> None:
    bad = corrupted(exported, tmp_path / "bad.onnx", "stem.weight")
    net.train()
    try:
        with pytest.raises(ParityError):
            check_parity(net, bad, input_shape=INPUT_SHAPE)
        assert all(module.training for module in net.modules())
        assert not any(module._forward_hooks for module in net.modules())
    finally:
        net.eval()


def test_a_file_of_fixed_batch_is_checked_at_that_batch(net: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(net, tmp_path / "net.onnx", input_shape=INPUT_SHAPE, static_batch=2).path
    assert check_parity(net, path, input_shape=INPUT_SHAPE).batch_sizes == (2,)


def test_bad_arguments(net: nn.Module, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(GroupifyError, match="batch sizes"):
        check_parity(net, exported, input_shape=INPUT_SHAPE, batch_sizes=())
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"no protobuf")
    with pytest.raises(GroupifyError, match="cannot open"):
        check_parity(net, garbage, input_shape=INPUT_SHAPE)
