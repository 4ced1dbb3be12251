from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from groupify.onnx.exporting import export_onnx
from tests.onnx.nets import INPUT_SHAPE, SmallNet, randomise


@pytest.fixture(scope="session")
def net() -> nn.Module:
    return randomise(SmallNet()).eval()


@pytest.fixture(scope="session")
def exported(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The net as a file that no test may change."""
    return export_onnx(net, tmp_path_factory.mktemp("net") / "net.onnx", input_shape=INPUT_SHAPE).path
