"""The steps of quantising on their own: ranges, equalised channels, corrected biases, the stepwise run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from groupify.onnx.exporting import export_onnx
from groupify.onnx.int8.bias_correction import correct_biases
from groupify.onnx.int8.equalisation import equalise, find_pairs
from groupify.onnx.int8.quantisation import quantize_onnx
from groupify.onnx.int8.ranges import Feed, Histogram, best_ranges
from groupify.onnx.runtime import OnnxModule, open_session
from groupify.onnx.stepwise import StepwiseRun
from tests.onnx.fake_quantised import fake_quantised
from tests.onnx.nets import INPUT_SHAPE, SmallNet, randomise

IMAGES = torch.randn(48, *INPUT_SHAPE, generator=torch.Generator().manual_seed(3))


def feeds(images: Tensor = IMAGES) -> list[Feed]:
    return [{"input": batch.numpy()} for batch in images.split(16)]


def exported(net: nn.Module, folder: Path) -> Path:
    return export_onnx(net.eval(), folder / "net.onnx", input_shape=INPUT_SHAPE).path


def outputs(model: onnx.ModelProto, images: Tensor = IMAGES) -> Tensor:
    session = open_session(model.SerializeToString())
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def chain(activation: nn.Module | None = None, spread: float = 100.0) -> nn.Sequential:
    """A conv of three factors whose channels differ in scale, then a strided and a depthwise conv."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False),
        nn.Conv2d(16, 24, 1),
        activation or nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.ReLU(),
        nn.Conv2d(24, 8, 1),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )
    randomise(net)
    scale = torch.logspace(0, 1, 16, spread)
    first, second = net.get_parameter("0.weight"), net.get_parameter("1.weight")
    first.data *= scale.reshape(-1, 1, 1, 1)
    second.data /= scale.reshape(4, 1, 4, 1, 1).expand(4, 4, 4, 1, 1).reshape(16, 4, 1, 1)
    return net.eval()


# ---- ranges


def test_a_rare_value_is_clipped_and_a_common_one_is_not() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).numpy()
    histogram = Histogram(float(values.min()), 60.0)
    for _ in range(40):
        histogram.add(values)
    histogram.add(np.asarray([60.0], np.float32))
    low, high = histogram.best_range()
    assert low == pytest.approx(values.min())
    assert high < 20
    even = Histogram(0.0, 1.0)
    even.add(np.linspace(0, 1, 10_000, dtype=np.float32))
    assert even.best_range() == (0.0, 1.0)


def test_every_activation_gets_a_range_that_holds_zero(net: nn.Module, tmp_path: Path) -> None:
    model = onnx.load(str(exported(net, tmp_path)))
    found = best_ranges(model, feeds())
    computed = {output for node in model.graph.node for output in node.output}
    assert found.keys() - {"input"} <= computed
    assert {
        node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Relu", "Add")
    } <= found.keys()
    assert all(low <= 0 <= high for low, high in found.values())
    relu = next(node.output[0] for node in model.graph.node if node.op_type == "Relu")
    assert found[relu][0] == 0


def test_outputs_keep_their_peaks(tmp_path: Path) -> None:
    """A map with one bright place in many images, as of a detector, says where it is."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 1, 1, bias=False))
    images = IMAGES * 0.1
    images[:, :, 0, 0] = 0
    images[3, :, 5, 5] = 50.0
    for name in ("0.weight", "2.weight"):
        net.get_parameter(name).data.fill_(0.5)
    path = exported(net, tmp_path)
    found = best_ranges(onnx.load(str(path)), feeds(images))
    assert found["output"][1] == pytest.approx(float(OnnxModule(path)(images).max()), rel=1e-5)


# ---- equalised channels


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Identity()])
def test_equalised_nets_compute_the_same(activation: nn.Module, tmp_path: Path) -> None:
    model = onnx.load(str(exported(chain(activation), tmp_path)))
    before = outputs(model)
    assert equalise(model, feeds()) == 4
    torch.testing.assert_close(outputs(model), before, atol=1e-4, rtol=1e-4)


def test_equalised_channels_have_ranges_alike(tmp_path: Path) -> None:
    model = onnx.load(str(exported(chain(), tmp_path)))
    spread = []
    for _ in range(2):
        weights = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
        largest = np.abs(weights["0.weight"]).max(axis=(1, 2, 3))
        spread.append(largest.max() / largest.min())
        equalise(model, feeds())
    assert spread[0] > 50
    assert spread[1] < spread[0] / 10


def test_channels_that_something_else_reads_stay(tmp_path: Path) -> None:
    model = onnx.load(str(exported(randomise(SmallNet(shuffle=False)), tmp_path)))
    # The stem is read by the residual sum as well; bn2 feeds that sum.
    assert [(pair.first.name, pair.second.name) for pair in find_pairs(model.graph)] == [
        ("bn1/Conv", "bn2/Conv")
    ]
    clipped = onnx.load(str(exported(chain(nn.ReLU6()), tmp_path)))
    assert len(find_pairs(clipped.graph)) == 3


# ---- the run step by step, and the biases


@pytest.mark.parametrize(
    "net", [chain(), chain(nn.ReLU6()), randomise(SmallNet())], ids=["chain", "relu6", "sum"]
)
def test_a_quantised_net_runs_step_by_step_as_in_one(net: nn.Module, tmp_path: Path) -> None:
    path = exported(net, tmp_path)
    int8 = quantize_onnx(path, tmp_path / "int8.onnx", images=IMAGES).path
    model = onnx.load(str(int8))
    run = StepwiseRun(model, feeds())
    *steps, last = run.steps
    for node in steps:
        run.advance(node)
    found = torch.cat([torch.from_numpy(values) for values in run.outputs(last)])
    # The same values, but for a step here and there: sums are rounded in another order.
    off = (found - OnnxModule(int8)(IMAGES)).abs()
    assert off.mean() < 0.005 * found.abs().max()
    assert off.max() < 0.05 * found.abs().max()


@pytest.mark.parametrize("seed", range(3))
def test_pytorch_and_the_integer_kernels_agree(seed: int, tmp_path: Path) -> None:
    net = randomise(SmallNet(groups=(1, 4, 16)[seed], shuffle=False), seed)
    int8 = quantize_onnx(exported(net, tmp_path), tmp_path / "int8.onnx", images=IMAGES)
    assert int8.error is not None
    assert int8.error < 0.01
    expected, found = fake_quantised(int8.path, IMAGES), OnnxModule(int8.path)(IMAGES)
    # Sums are rounded in another order, so that a value may fall to the other side of a step here and there.
    off = (expected - found).abs() / expected.abs().max()
    assert off.max() < 0.01
    assert off.mean() < 0.001


def test_a_wrong_bias_is_put_right(tmp_path: Path) -> None:
    path = exported(randomise(SmallNet(shuffle=False)), tmp_path)
    model = onnx.load(str(path))
    int8 = quantize_onnx(path, tmp_path / "int8.onnx", images=IMAGES, only_for_timing=True).path
    quantised = onnx.load(str(int8))
    right = outputs(model)
    for entry in quantised.graph.initializer:
        if entry.name == "bn1.bias_quantized" or (
            entry.name.endswith("bias_quantized") and "conv1" in entry.name
        ):
            shifted = numpy_helper.to_array(entry) + 4000
            entry.CopyFrom(numpy_helper.from_array(shifted.astype(np.int32), entry.name))
    wrong = (outputs(quantised) - right).square().mean()
    assert correct_biases(quantised, model, feeds()) == 4
    assert (outputs(quantised) - right).square().mean() < wrong / 5


class Resized(nn.Module):
    """Sizes that are computed, and nothing but biases that an exporter stores as one."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2)
        self.same = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.same(self.down(x).relu()).relu()
        return nn.functional.interpolate(y, size=x.shape[-2:], mode="nearest")


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("count", [48, 35])
def test_sizes_that_are_computed_and_biases_that_are_shared(zero: bool, count: int, tmp_path: Path) -> None:
    net = randomise(nn.Sequential(Resized(), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    for name, parameter in net.named_parameters():
        if zero and name.endswith("bias"):
            parameter.data.zero_()
    path = exported(net, tmp_path)
    int8 = quantize_onnx(path, tmp_path / "int8.onnx", images=IMAGES[:count])
    assert int8.error is not None
    assert int8.error < 0.01
    run = correct_biases(onnx.load(str(int8.path)), onnx.load(str(path)), feeds(IMAGES[:count]))
    assert run == (0 if zero else 3)


def test_class_scores_are_not_rounded_to_steps(tmp_path: Path) -> None:
    path = exported(randomise(SmallNet(shuffle=False)), tmp_path)
    int8 = quantize_onnx(path, tmp_path / "int8.onnx", images=IMAGES).path
    assert len(OnnxModule(int8)(IMAGES).unique()) > 200
    kinds = [node.op_type for node in onnx.load(str(int8)).graph.node]
    assert kinds[-1] == "Gemm"


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.ReLU(), nn.Identity()])
def test_what_stays_float32_is_not_quantised_by_the_runtime(activation: nn.Module, tmp_path: Path) -> None:
    net = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 16, 2, 2, groups=8),
            activation,
            nn.Conv2d(16, 4, 1),
        )
    )
    transposed, last = net.get_parameter("2.weight"), net.get_parameter("4.weight")
    scale = torch.logspace(-1.7, 0, 8)  # too unlike for weights of one step
    transposed.data *= scale.reshape(-1, 1, 1, 1)
    last.data /= scale.repeat_interleave(2).reshape(1, -1, 1, 1)
    int8 = quantize_onnx(exported(net, tmp_path), tmp_path / "int8.onnx", images=IMAGES)
    assert [node.name for node in int8.left_in_float] == ["2/ConvTranspose"]
    feed = {"input": IMAGES.numpy()}
    as_run, as_written = (open_session(int8.path, optimise=flag).run(None, feed)[0] for flag in (True, False))
    assert np.abs(as_run - as_written).mean() < 0.001 * np.abs(as_written).max()


def test_factors_of_unlike_channels_lose_less(tmp_path: Path) -> None:
    path = exported(chain(), tmp_path)
    plain = quantize_onnx(path, tmp_path / "plain.onnx", images=IMAGES, only_for_timing=True)
    tuned = quantize_onnx(path, tmp_path / "tuned.onnx", images=IMAGES)
    assert (plain.equalised, plain.corrected, plain.error) == (0, 0, None)
    assert tuned.equalised == 4
    expected = OnnxModule(path)(IMAGES)

    def missed(file: Path) -> float:
        return float((OnnxModule(file)(IMAGES) - expected).square().mean() / expected.var())

    assert missed(tuned.path) < 0.7 * missed(plain.path)
    assert tuned.error == pytest.approx(missed(tuned.path), rel=1.0)
    assert OnnxModule(tuned.path).metadata == OnnxModule(path).metadata
