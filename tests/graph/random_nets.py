"""Small nets put together from a list of random steps, for property tests of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

SIZE = 4
CHANNELS = 8

# Name of the operation, and three numbers that choose its operands and options.
Step = tuple[str, int, int, int]

OPERATIONS = (
    "conv", "grouped", "depthwise", "multiplier", "batch_norm", "group_norm", "layer_norm", "instance_norm",
    "relu", "prelu", "functional", "half_relu", "add", "subtract_method", "multiply", "concat", "crelu",
    "swap_halves", "split_chain", "shuffle", "squeeze_excite", "spatial_gate", "outer", "pool",
    "pad_channels", "scale", "own_scale", "shared", "twice", "tied", "unknown", "add_unknown", "index",
    "transposed", "read_value", "mean_gate", "repeat", "glu",
)  # fmt: skip


def steps(max_size: int = 8) -> st.SearchStrategy[list[Step]]:
    number = st.integers(0, 7)
    return st.lists(
        st.tuples(st.sampled_from(OPERATIONS), number, number, number), min_size=1, max_size=max_size
    )


class RandomNet(nn.Module):
    """Applies the steps to a growing list of feature maps, all of one spatial size."""

    order: Tensor

    def __init__(self, plan: Sequence[Step], end: str, seed: int = 0) -> None:
        super().__init__()
        self.plan, self.end = list(plan), end
        self.layers = nn.ModuleDict()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))
        self.scales = nn.ParameterDict()
        self.double()
        self.eval()
        with torch.no_grad():  # one run makes the layers that the steps need
            self._building = True
            self(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64))
            self._building = False
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
            for name, buffer in self.named_buffers():
                if buffer.is_floating_point():
                    noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
                    buffer.copy_(noise + 0.5 if name.endswith("var") else noise - 0.5)

    def _layer(self, key: str, layer: type[nn.Module], *args: object, **kwargs: object) -> Any:
        if self._building and key not in self.layers:
            self.layers[key] = layer(*args, **kwargs).double().eval()
        return self.layers[key]

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        channels = [CHANNELS]
        for number, (operation, a, b, c) in enumerate(self.plan):
            first = a % len(values)
            width = channels[first]
            same = [i for i, w in enumerate(channels) if w == width]
            second = same[b % len(same)]
            method = getattr(self, f"_{operation}")
            y, w = method(f"{number}", values[first], values[second], width, c)
            values.append(y)
            channels.append(w)
        last: Tensor = values[-1]
        width = channels[-1]
        if self.end == "flatten":
            last = self._layer("end", nn.Linear, width * SIZE * SIZE, 3)(torch.flatten(last, 1))
        if self.end == "pool":
            last = self._layer("end", nn.Linear, width, 3)(last.mean((2, 3)))
        if self.end == "conv":
            last = self._layer("end", nn.Conv2d, width, 3, 1)(last)
        return last

    def _conv(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        out = (4, CHANNELS, 12)[c % 3]
        return self._layer(key, nn.Conv2d, w, out, 3, padding=1, bias=c % 2 == 0)(x), out

    def _grouped(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return self._layer(key, nn.Conv2d, w, CHANNELS, 3, padding=1, groups=2)(x), CHANNELS

    def _depthwise(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return self._layer(key, nn.Conv2d, w, w, 3, padding=1, groups=w)(x), w

    def _multiplier(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        wide = self._layer(key, nn.Conv2d, w, 2 * w, 3, padding=1, groups=w)(x)
        return (wide, 2 * w) if w <= CHANNELS else (wide[:, :w], w)

    def _batch_norm(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return self._layer(key, nn.BatchNorm2d, w)(x), w

    def _group_norm(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return self._layer(key, nn.GroupNorm, 2, w)(x), w

    def _instance_norm(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return self._layer(key, nn.InstanceNorm2d, w, affine=True)(x), w

    def _layer_norm(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        layer = self._layer(key, nn.LayerNorm, w)
        if c % 2:
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous(), w
        tokens = x.flatten(2).transpose(1, 2)
        return layer(tokens).transpose(1, 2).reshape(-1, w, SIZE, SIZE), w

    def _relu(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return self._layer(key, nn.ReLU)(x), w

    def _prelu(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return self._layer(key, nn.PReLU, w)(x), w

    def _functional(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return (F.silu(x), torch.sigmoid(x), x.clamp(min=0), F.hardtanh(x), x.abs(), -x, x / 2, 1 - x)[c], w

    def _half_relu(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return torch.cat([F.relu(x[:, : w // 2]), x[:, w // 2 :]], 1), w

    def _add(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return x + y, w

    def _subtract_method(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return x.sub(y, alpha=2), w

    def _multiply(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return torch.mul(x, torch.sigmoid(y)), w

    def _concat(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        joined = torch.cat([x, y], dim=1)
        return (joined, 2 * w) if w <= CHANNELS else (joined[:, w // 2 : w // 2 + w], w)

    def _crelu(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        half = x[:, : w // 2]
        return torch.cat([F.relu(half), F.relu(-half)], 1), w

    def _swap_halves(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        left, right = x.chunk(2, 1)
        other = F.relu(y)
        if c % 2:
            return torch.cat([right, left], 1), w
        return torch.cat([left, other[:, w // 2 :]], 1) + torch.cat([other[:, : w // 2], right], 1), w

    def _split_chain(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        left, right = torch.split(x, w // 2, dim=1)
        changed = self._layer(key, nn.Conv2d, w // 2, w // 2, 3, padding=1)(left)
        return torch.cat((changed, changed + right), dim=1), w

    def _shuffle(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        n, _, height, width = x.size()
        groups = 2 if c % 2 else 4
        mixed = x.view(n, groups, w // groups, height, width).transpose(1, 2).contiguous()
        return mixed.view(n, -1, height, width), w

    def _squeeze_excite(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        pooled = F.adaptive_avg_pool2d(x, 1)
        hidden = F.relu(self._layer(key + "a", nn.Conv2d, w, 4, 1)(pooled))
        return x * torch.sigmoid(self._layer(key + "b", nn.Conv2d, 4, w, 1)(hidden)), w

    def _spatial_gate(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return x * torch.sigmoid(self._layer(key, nn.Conv2d, w, 1, 3, padding=1)(y)), w

    def _outer(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        vector = y.mean((2, 3))
        table = vector.unsqueeze(2) * vector.unsqueeze(1)  # (N, w, w)
        return x + table[:, 1].reshape(-1, w, 1, 1) + table[:, :, 0].reshape(-1, w, 1, 1), w

    def _pool(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        if c % 2:
            return F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0), w
        return self._layer(key, nn.AvgPool2d, 3, 1, 1)(F.pad(x, (1, 0, 0, 1)))[:, :, :SIZE, :SIZE], w

    def _pad_channels(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return F.pad(x[:, : w - 2], (0, 0, 0, 0, 1, 1)) + y, w

    def _scale(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        if self._building:
            self.scales[key] = nn.Parameter(torch.ones(w, 1, 1, dtype=torch.float64))
        return x * self.scales[key] + 1, w

    def _own_scale(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        layer = self._layer(key, nn.BatchNorm2d, w)
        return layer(x) * layer.weight.reshape(1, -1, 1, 1), w

    def _shared(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return self._layer(f"shared{w}", nn.Conv2d, w, CHANNELS, 1)(x), CHANNELS

    def _twice(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        layer = self._layer(key, nn.Conv2d, w, w, 1)
        return layer(F.relu(layer(x))), w

    def _tied(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        one, two = (self._layer(key + end, nn.Conv2d, w, w, 1) for end in "ab")
        if self._building:
            two.weight = one.weight
        return torch.tanh(one(x)) + two(y), w

    def _unknown(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return torch.cumsum(x, 1) if c % 2 else torch.sort(x, 1)[0], w

    def _add_unknown(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        fixed = torch.cumsum(y, 1)
        return (x + fixed, x * fixed[:, :1], fixed[:, :, :1, :1] - x)[c % 3], w

    def _index(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return x[:, self.order % w], CHANNELS

    def _transposed(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return self._layer(key, nn.ConvTranspose2d, w, w, 3, padding=1)(x), w

    def _read_value(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return x * y[0, c % w, 0, 0].item(), w

    def _mean_gate(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        return x * y.mean(dim=(2, 3), keepdim=True) + x.mean(1, keepdim=True), w

    def _repeat(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        half = x[:, : w // 2]
        return (
            half.repeat(1, 2, 1, 1),
            half.mean((2, 3), keepdim=True).expand(-1, -1, SIZE, SIZE).repeat(1, 2, 1, 1),
        )[c % 2] + y, w

    def _glu(self, key: str, x: Tensor, y: Tensor, w: int, c: int) -> tuple[Tensor, int]:
        gate, value = x.chunk(2, dim=1)
        return torch.cat([gate.sigmoid() * value, value], 1), w
