from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from groupify.errors import ArtefactError, ConversionError
from groupify.models.preprocessing import Preprocessing
from groupify.onnx import torch_operators
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from groupify.onnx.tracing import OPSET
from tests.onnx.nets import INPUT_SHAPE, SmallNet, TwoHeads, randomise


def run(path: Path, batch: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"input": batch.numpy()})]


def test_one_file_with_named_ends_and_a_dynamic_batch(net: nn.Module, tmp_path: Path) -> None:
    exported = export_onnx(net, tmp_path / "net.onnx", input_shape=INPUT_SHAPE)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert exported.file_bytes == (tmp_path / "net.onnx").stat().st_size
    assert (exported.input_names, exported.output_names) == (("input",), ("output",))
    model = onnx.load(str(exported.path))
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert exported.opset == OPSET
    for size in (1, 2, 5):
        batch = torch.randn(size, *INPUT_SHAPE, generator=torch.Generator().manual_seed(size))
        torch.testing.assert_close(run(exported.path, batch)[0], net(batch), atol=1e-5, rtol=1e-5)


def test_static_batch_refuses_any_other(net: nn.Module, tmp_path: Path) -> None:
    exported = export_onnx(net, tmp_path / "net.onnx", input_shape=INPUT_SHAPE, static_batch=1)
    model = onnx.load(str(exported.path))
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    batch = torch.ones(1, *INPUT_SHAPE)
    torch.testing.assert_close(run(exported.path, batch)[0], net(batch), atol=1e-5, rtol=1e-5)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run(exported.path, torch.ones(2, *INPUT_SHAPE))


def test_metadata_is_recorded_and_no_path_of_this_machine_leaks(net: nn.Module, tmp_path: Path) -> None:
    preprocessing = Preprocessing(
        (12, 12),
        resize=16,
        crop="center",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.2),
        interpolation="bilinear",
    )
    exported = export_onnx(
        net,
        tmp_path / "net.onnx",
        input_shape=INPUT_SHAPE,
        preprocessing=preprocessing,
        metadata={"groupify.recipe_sha256": "abc"},
    )
    model = onnx.load(str(exported.path))
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert entries["groupify.recipe_sha256"] == "abc"
    assert "groupify.version" in entries
    assert json.loads(entries["preprocessing"]) == {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
        "resize": 16,
        "crop": "center",
        "interpolation": "bilinear",
        "size": [12, 12],
    }
    contents = exported.path.read_bytes()
    assert b"site-packages" not in contents
    assert b"nets.py" not in contents


def test_nodes_are_named_after_their_modules(exported: Path) -> None:
    names = [node.name for node in onnx.load(str(exported)).graph.node]
    assert "stem/Conv" in names
    assert any(name.startswith("relu/") for name in names)
    assert len(set(names)) == len(names)


def test_batch_norms_behind_plain_convs_are_folded(tmp_path: Path) -> None:
    net = randomise(SmallNet(shuffle=False))
    exported = export_onnx(net, tmp_path / "net.onnx", input_shape=INPUT_SHAPE)
    operators = {node.op_type for node in onnx.load(str(exported.path)).graph.node}
    assert "Conv" in operators
    assert "BatchNormalization" not in operators


def test_dictionary_outputs_keep_their_keys(tmp_path: Path) -> None:
    net = randomise(TwoHeads()).eval()
    exported = export_onnx(net, tmp_path / "heads.onnx", input_shape=INPUT_SHAPE)
    assert exported.output_names == ("out", "aux")
    batch = torch.randn(2, *INPUT_SHAPE, generator=torch.Generator().manual_seed(0))
    expected = net(batch)
    out, aux = run(exported.path, batch)
    torch.testing.assert_close(out, expected["out"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(aux, expected["aux"], atol=1e-5, rtol=1e-5)


def test_the_model_is_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    net = randomise(SmallNet()).train()
    net.get_submodule("bn2").eval()
    calls: list[str] = []
    net.register_forward_hook(lambda *_: calls.append("called"))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = {name: module.training for name, module in net.named_modules()}
    hooks = [len(module._forward_hooks) for module in net.modules()]
    export_onnx(net, tmp_path / "net.onnx", input_shape=INPUT_SHAPE)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert [len(module._forward_hooks) for module in net.modules()] == hooks
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert capsys.readouterr() == ("", "")
    assert not recwarn.list


def test_wrong_input_shape_is_one_line(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"shape \(1, 4, 12, 12\)") as caught:
        export_onnx(net, tmp_path / "net.onnx", input_shape=(4, 12, 12))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if bool(y.sum() > 0) else -y


def test_untraceable_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConversionError, match=r"DataDependent.*data-dependent.*values of its input"
    ) as caught:
        export_onnx(DataDependent(), tmp_path / "net.onnx", input_shape=INPUT_SHAPE)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="float16"):
        export_onnx(SmallNet().half(), tmp_path / "net.onnx", input_shape=INPUT_SHAPE)


def test_missing_folder(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot write"):
        export_onnx(net, tmp_path / "missing" / "net.onnx", input_shape=INPUT_SHAPE)


class WindowAttention(nn.Module):
    """Attention inside each of four windows, over (batch, windows, heads, positions, width)."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.mask = nn.Parameter(torch.randn(16, 16)) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.conv(x)
        tiles = maps.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1)
        windows = tiles.flatten(3, 4).flatten(1, 2)
        query, key, value = windows.unflatten(3, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5)
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, self.mask, scale=0.7)
        return attended.mean((1, 3)).flatten(1)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_windows_is_exported(tmp_path: Path, masked: bool) -> None:
    torch.manual_seed(0)
    model = WindowAttention(masked=masked).eval()
    file = export_onnx(model, tmp_path / "model.onnx", input_shape=(3, 8, 8))
    assert check_parity(model, file.path, input_shape=(3, 8, 8), batch_sizes=(1, 3)).max_rel_diff < 1e-4


def test_pytorch_s_operators_are_read_once(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry: Any = pytest.importorskip("torch.onnx._internal.exporter._registration").ONNXRegistry
    read, versions = registry.from_torchlib, []

    def counted(**how: Any) -> Any:
        versions.append(how["opset_version"])
        return read(**how)

    monkeypatch.setattr(registry, "from_torchlib", staticmethod(counted))
    monkeypatch.setattr(torch_operators, "_READ", {})
    files = [
        export_onnx(net, tmp_path / f"{number}.onnx", input_shape=INPUT_SHAPE).path.read_bytes()
        for number in range(2)
    ]
    assert files[0] == files[1]
    assert versions == [OPSET]
    assert registry.from_torchlib is counted
    # What one export adds or takes away is its own.
    with torch_operators.operators_read_once():
        registry.from_torchlib(opset_version=OPSET).functions.clear()
        assert registry.from_torchlib(opset_version=OPSET).functions
