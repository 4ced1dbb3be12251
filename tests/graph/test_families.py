"""Any order of any permutation class leaves the output of torchvision's families unchanged."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.channels import Channels, channel_classes
from groupify.graph.permute import apply_orders

# Convs of which some output has to stay: it is the model's own, or (shufflenet) no other meets its readers.
FAMILIES: dict[str, set[str]] = {
    "resnet18": set(),
    "resnext50_32x4d": set(),
    "vgg11": set(),
    "densenet121": set(),
    "googlenet": set(),
    "inception_v3": set(),
    "squeezenet1_1": {"classifier.1"},
    "efficientnet_v2": set(),
    "regnet_y_400mf": set(),
    "mobilenet_v2": set(),
    "mobilenet_v3_small": set(),
    "mnasnet0_5": set(),
    "shufflenet_v2_x1_0": {"stage3.0.branch1.2", "stage3.0.branch2.5", "stage4.0.branch1.0"},
    "convnext_tiny": set(),
    "deeplabv3_resnet50": {"classifier.4"},
    "lraspp_mobilenet_v3_large": {"classifier.low_classifier", "classifier.high_classifier"},
}


# How many classes there are of each size.
CLASSES: dict[str, dict[int, int]] = {
    # One class for each residual stream, and one inside each of the two blocks of a stage.
    "resnet18": {64: 3, 128: 3, 256: 3, 512: 3},
    # One for each of the eight convs and of the two hidden linear layers.
    "vgg11": {64: 1, 128: 1, 256: 2, 512: 4, 4096: 2},
    # Each dense layer has 128 inner and 32 new channels; concatenated channels stay with their producer.
    "densenet121": {64: 1, 128: 58 + 1, 32: 58, 256: 1, 512: 1},
    # Inside the blocks of a grouped conv alone may channels change places: those in front of it and those
    # behind, 32 groups each. The others are those of the residual streams.
    "resnext50_32x4d": {
        64: 1, 256: 1, 512: 1, 1024: 1, 2048: 1, 4: 2 * 32 * 3, 8: 2 * 32 * 4, 16: 2 * 32 * 6, 32: 2 * 32 * 3,
    },
}  # fmt: skip


def build(name: str) -> nn.Module:
    """The architecture with weights and statistics of which each matters."""
    options: dict[str, Any] = {"weights": None}
    if name.startswith(("deeplab", "fcn", "lraspp")):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    generator = torch.Generator().manual_seed(0)
    model: nn.Module = (
        efficientnet_v2() if name == "efficientnet_v2" else torchvision.models.get_model(name, **options)
    )
    model.eval()
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (tensor.dim() == 1 or "layer_scale" in key):
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise - 0.5 if key.endswith(("bias", "mean")) else noise + 0.5)
    return model


def efficientnet_v2() -> nn.Module:
    """The blocks of an EfficientNetV2, the fused and the others, fewer of each."""
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    blocks = [
        FusedMBConvConfig(1, 3, 1, 8, 8, 2),
        FusedMBConvConfig(4, 3, 2, 8, 16, 2),
        MBConvConfig(4, 3, 2, 16, 24, 2),
    ]
    model: nn.Module = EfficientNet(blocks, dropout=0.2, last_channel=64)
    return model


def find(model: nn.Module, x: Tensor) -> Channels:
    captured = capture(model, Call((x,)))
    assert captured.graph is not None, captured.problem
    return channel_classes(captured.graph, Call((x,)))


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(x)
    tensor: Tensor = result["out"] if isinstance(result, dict) else result
    return tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_any_order_leaves_the_output_unchanged(name: str) -> None:
    model = build(name)
    generator = torch.Generator().manual_seed(0)
    size = 75 if name == "inception_v3" else 32 if name.startswith(("vgg", "dense", "efficient")) else 64
    x = torch.randn(2, 3, size, size, generator=generator)
    channels = find(model, x)
    orders = {i: torch.randperm(c.size, generator=generator) for i, c in enumerate(channels.classes)}
    permuted = apply_orders(model, channels, orders)
    before, after = output(model, x), output(permuted, x)
    assert float((before - after).abs().max()) <= 1e-5 * float(before.abs().max())

    movable = {atom for c in channels.classes for atom in c.atoms.tolist()}
    staying = {
        use.name.removesuffix(".weight")
        for use in channels.uses
        if use.dim == 0
        and model.get_parameter(use.name).dim() == 4
        and not movable.issuperset(use.atoms.tolist())
    }
    assert staying == FAMILIES[name]
    if name in CLASSES:
        assert Counter(c.size for c in channels.classes) == CLASSES[name]


def test_flattened_channels_move_with_all_their_positions() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 2))
    channels = find(net, torch.zeros(1, 3, 4, 4))
    (only,) = channels.classes
    (linear,) = (where for use, where in only.places.items() if channels.uses[use].name == "3.weight")
    assert linear.tolist() == [list(range(4 * c, 4 * c + 4)) for c in range(6)]


def test_the_given_model_is_left_untouched() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)).eval()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    channels = find(net, torch.zeros(1, 3, 4, 4))
    apply_orders(net, channels, {0: torch.arange(5, -1, -1)})
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())
