"""What is common in convolutional nets, beside two convs: it converts exactly, and so do their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import groupify
from groupify.errors import ConversionError
from groupify.onnx.parity import check_parity
from tests.cases.nets import TORCH_2_9, grouped_already
from tests.cases.small import CHANNELS, PAIRS, TINY, assert_converts, convert_small, together

Use = Callable[["Parts", Tensor], Tensor]


class Parts(nn.Module):
    """A stem, two convs, and all that the situations put between them."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        c = CHANNELS
        self.use = use
        self.stem, self.c1, self.c2 = (nn.Conv2d(n, c, 3, padding=1) for n in (3, c, c))
        self.head = nn.Linear(c, 5)
        self.slope, self.group_norm, self.wide = nn.PReLU(c), nn.GroupNorm(2, c), nn.Conv2d(c, 2 * c, 1)
        self.instance_norm = nn.InstanceNorm2d(c, affine=True)
        self.depthwise, self.up = (
            nn.Conv2d(c, c, 3, padding=1, groups=c),
            nn.ConvTranspose2d(c, c, 2, 2, groups=2),
        )
        self.recurrent = nn.LSTM(c, 4, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(c, 2, batch_first=True)
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.ReLU(), nn.Conv2d(c, c, 1)
        )
        self.scalar, self.one = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor([-1.0]))
        self.mix = nn.Parameter(torch.sin(torch.arange(c * c).float()).reshape(c, c))
        self.empty, self.drop = nn.Sequential(), nn.Dropout2d(0.5)
        self.lists = nn.ModuleList([nn.ModuleList([nn.ReLU()]), nn.ModuleDict({"a": nn.Tanh()})])
        with torch.no_grad():
            self.slope.weight.copy_(torch.linspace(-1, 1, c))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, torch.relu(self.stem(x)))

    def pooled(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def through(between: Use) -> Use:
    """Put something between the two convs."""
    return lambda net, x: net.pooled(torch.relu(net.c2(between(net, torch.relu(net.c1(x))))))


def split_and_gate(net: Parts, x: Tensor) -> Tensor:
    a, b = net.wide(torch.relu(net.c1(x))).chunk(2, 1)
    return net.pooled(net.c2(a * torch.sigmoid(b)))


def channel_shuffle(net: Parts, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def recurrent(net: Parts, x: Tensor) -> Tensor:
    rows = torch.relu(net.c2(torch.relu(net.c1(x)))).mean(2).transpose(1, 2)
    result: Tensor = net.head(net.recurrent(rows)[0].mean(1))
    return result


def attending(net: Parts, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    mixed = net.attention(tokens, tokens, tokens, need_weights=False)[0]
    result: Tensor = x + mixed.transpose(1, 2).reshape(x.shape)
    return result


def checkpointed(net: Parts, x: Tensor) -> Tensor:
    again = torch.utils.checkpoint.checkpoint
    return net.pooled(again(net.c2, again(net.c1, x, use_reentrant=False), use_reentrant=False))


def spatial_attention(net: Parts, x: Tensor) -> Tensor:
    maps = torch.cat([x.mean(1, True), x.amax(1, True)], 1)
    return x * torch.sigmoid(maps.mean(1, True))


def nested(net: Parts, x: Tensor) -> Tensor:
    for inner in net.lists:
        assert isinstance(inner, nn.ModuleList | nn.ModuleDict)
        for layer in inner.values() if isinstance(inner, nn.ModuleDict) else inner:
            x = layer(x)
    return x


def residual(net: Parts, x: Tensor) -> Tensor:
    return net.pooled(torch.relu(net.c2(torch.relu(net.c1(x))) + x))


def pyramid(net: Parts, x: Tensor) -> Tensor:
    small = torch.relu(net.c1(F.max_pool2d(x, 2)))
    return net.pooled(net.c2(x + F.interpolate(small, size=x.shape[-2:], mode="bilinear")))


SITUATIONS: dict[str, Use] = {
    "prelu": lambda net, x: net.pooled(net.slope(net.c2(net.slope(net.c1(x))))),
    "group norm": lambda net, x: net.pooled(net.group_norm(net.c2(torch.relu(net.group_norm(net.c1(x)))))),
    "instance norm": through(lambda net, x: net.instance_norm(x)),
    "split and gate": split_and_gate,
    "channel shuffle": through(channel_shuffle),
    "squeeze and excite": through(lambda net, x: x * torch.sigmoid(net.excite(x))),
    "depthwise": through(lambda net, x: torch.relu(net.depthwise(x))),
    "transposed": through(lambda net, x: net.up(x)),
    "recurrent head": recurrent,
    "attention": through(attending),
    "einsum": through(lambda net, x: torch.einsum("nchw,kc->nkhw", x, net.mix)),
    "matmul": lambda net, x: net.head(net.c2(torch.relu(net.c1(x))).mean((2, 3)) @ net.mix.t()),
    "checkpointing": checkpointed,
    "scalar parameter": lambda net, x: net.pooled(net.c2(torch.exp(net.scalar) * net.c1(x) + net.one)),
    "empty shortcut": lambda net, x: net.pooled(net.c2(torch.relu(net.c1(x)) + net.empty(x))),
    "dropout": through(lambda net, x: net.drop(F.dropout(x, 0.5, net.training))),
    "nested lists": through(nested),
    "spatial attention": through(spatial_attention),
    "expanded vector": through(lambda net, x: x + x.mean((2, 3), True).expand(-1, -1, 8, 8)),
    "residual": residual,
    "pyramid": pyramid,
    "halves of space": through(lambda net, x: torch.cat([x[..., ::2], x[..., 1::2]], -1)),
}  # fmt: skip


def test_ordinary_nets_that_are_grouped_already_come_back() -> None:
    nets = {name: grouped_already(Parts(use), PAIRS) for name, use in SITUATIONS.items()}
    together(nets, assert_converts)


def several(net: Parts, x: Tensor) -> Tensor:
    """Many of them one behind the other, since an export takes its time."""
    x = net.instance_norm(net.slope(net.up(net.depthwise(x))))
    x = spatial_attention(net, x * torch.sigmoid(net.excite(x)))
    gate, value = net.wide(channel_shuffle(net, x)).chunk(2, 1)
    x = attending(net, F.max_pool2d(gate.sigmoid() * value, 2))
    return residual(net, net.group_norm(torch.exp(net.scalar) * x + net.one))


def test_what_is_exported_computes_the_same(tmp_path: Path) -> None:
    model = convert_small(grouped_already(Parts(several), PAIRS)).model
    batch = None
    if TORCH_2_9:  # which exports attention for a fixed batch only
        batch = 1
        with pytest.raises(ConversionError, match="give static_batch=1"):
            groupify.export(model, tmp_path / "m.onnx", input_shape=TINY)
    groupify.export(model, tmp_path / "m.onnx", input_shape=TINY, static_batch=batch)
    check_parity(model, tmp_path / "m.onnx", input_shape=TINY)
