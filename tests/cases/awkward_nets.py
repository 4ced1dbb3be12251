"""Nets put together from awkward pieces, each beside a plainly spelled twin that computes the same.

A piece stands between two convs. In its awkward spelling it is what symbolic tracing, a copy of the model or
a change of its memory format gets wrong; in its plain one it is made of ordinary modules and functions.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.cases.nets import grouped_already
from tests.cases.small import CHANNELS, PAIRS

# More at once are not taken by a piece that minds how many there are.
MOST_IMAGES = 16
# Name of a piece, and a number that chooses its variant.
Step = tuple[str, int]


class Piece(nn.Module):
    """Something between two convs, in one of two spellings.

    Attributes:
        keeps_order: channels in front of and behind it cannot change places.
        depends_on_values: the model cannot be exported as a whole, so nothing in it may be hidden.
    """

    keeps_order = False
    depends_on_values = False

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__()
        self.awkward, self.number = awkward, number

    def refusal(self) -> tuple[str, ...]:
        """Words in the reason for which it may be refused; none where it may not be."""
        return ()

    def vectors(self) -> list[Tensor]:
        """What it keeps for each channel, in an order that both spellings share."""
        return []

    def convs(self) -> list[nn.Conv2d]:
        """Its convs from channels to channels."""
        return []

    def settle(self) -> None:
        """Make equal what must be equal for both spellings to compute the same."""

    def tensors(self) -> list[Tensor]:
        """All that one spelling takes over from the other."""
        convs = [tensor for conv in self.convs() for tensor in conv.parameters()]
        return [*self.vectors(), *convs]

    def reorder(self, order: Tensor) -> None:
        """Put the channels in front of it and behind it into another order."""
        for vector in self.vectors():
            flat = vector.reshape(-1)
            flat.copy_(flat[order].clone())


def pointwise() -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 1)


def reorder_inputs(conv: nn.Conv2d, order: Tensor) -> None:
    conv.weight.copy_(conv.weight[:, order].clone())


def reorder_outputs(conv: nn.Conv2d, order: Tensor) -> None:
    conv.weight.copy_(conv.weight[order].clone())
    if conv.bias is not None:
        conv.bias.copy_(conv.bias[order].clone())


def assign_border(x: Tensor) -> Tensor:
    x[..., 0] = 0.5
    return x


def border_assigned(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x[..., :1], 0.5), x[..., 1:]], -1)


def scale_view(x: Tensor) -> Tensor:
    x.view(x.shape[0], -1).mul_(0.5)
    return x


CHAIN: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
    (lambda x: x.add_(0.3), lambda x: x + 0.3),
    (lambda x: x.mul_(1.5), lambda x: x * 1.5),
    (lambda x: x.clamp_(max=2), lambda x: x.clamp(max=2)),
    (lambda x: x.sub_(0.5).relu_(), lambda x: torch.relu(x - 0.5)),
    (lambda x: x.masked_fill_(x > 1, 1.0), lambda x: torch.where(x > 1, 1.0, x)),
    (assign_border, border_assigned),
    (scale_view, lambda x: x * 0.5),
    (lambda x: F.leaky_relu(x.sub_(1), 0.2, inplace=True), lambda x: F.leaky_relu(x - 1, 0.2)),
)


class InPlace(Piece):
    """Three operations one behind the other, beside what they were given."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for shift in range(3):
            awkward, plain = CHAIN[(self.number + 3 * shift) % len(CHAIN)]
            y = awkward(y) if self.awkward else plain(y)
        return y + 0.5 * (x if self.awkward else y)


class Branch(Piece):
    """A residual branch that begins in place."""

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__(awkward, number)
        self.a, self.b = pointwise(), pointwise()
        self.head = (nn.ReLU, nn.Hardtanh, nn.SiLU, nn.ELU)[number % 4](inplace=awkward)

    def convs(self) -> list[nn.Conv2d]:
        return [self.a, self.b]

    def reorder(self, order: Tensor) -> None:
        reorder_inputs(self.a, order)
        reorder_outputs(self.b, order)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        result: Tensor = self.b(torch.relu(self.a(y))) + (x if self.awkward else y)
        return result


@dataclass
class Holder:
    scale: Tensor


class Scale(Piece):
    """A factor for each channel, kept somewhere; plainly a parameter."""

    kept: Any

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__(awkward, number)
        values = torch.linspace(0.3, 2, CHANNELS)
        kind = number % 7 if awkward else -1
        self.keeps_order = number % 7 > 2  # only a tensor of the module's own has to follow
        if kind in (0, 1):
            self.register_buffer("kept", values, persistent=kind == 1)
        else:
            kinds: tuple[Any, ...] = (
                values, [values], {"scale": values}, Holder(values), types.SimpleNamespace(scale=values),
            )  # fmt: skip
            self.kept = kinds[kind - 2] if awkward else nn.Parameter(values)

    def scale(self) -> Tensor:
        if not self.awkward:
            parameter: Tensor = self.kept
            return parameter
        kept = self.kept
        if isinstance(kept, Tensor):
            return kept
        if isinstance(kept, list):
            kept = {"scale": kept[0]}
        tensor: Tensor = kept["scale"] if isinstance(kept, dict) else kept.scale
        return tensor

    def vectors(self) -> list[Tensor]:
        return [self.scale()]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale().reshape(1, -1, 1, 1)


class Constant(Piece):
    """Factors that are numbers, made into a tensor with every call."""

    keeps_order = True

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__(awkward, number)
        self.numbers = [0.5 + 0.2 * index for index in range(CHANNELS)]
        self.array = torch.tensor(self.numbers).numpy()
        if not awkward:
            self.scale = nn.Parameter(torch.tensor(self.numbers))

    def forward(self, x: Tensor) -> Tensor:
        if not self.awkward:
            return x * self.scale.reshape(-1, 1, 1)
        made = torch.tensor(self.numbers) if self.number % 2 else torch.from_numpy(self.array)
        return made.reshape(-1, 1, 1) * x


class GuardedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError("maps, please")
        return super().forward(x)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return (x - self.running_mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


class DefaultsNorm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.01)


class Norm(Piece):
    """A batch norm of the user's own class."""

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__(awkward, number)
        make: type[nn.BatchNorm2d] = (DefaultsNorm, GuardedNorm, OwnNorm)[number % 3]
        self.norm = make(CHANNELS) if awkward else nn.BatchNorm2d(CHANNELS)
        generator = torch.Generator().manual_seed(number)
        for vector in self.vectors():
            nn.init.uniform_(vector.data, 0.5, 1.5, generator=generator)

    def vectors(self) -> list[Tensor]:
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert var is not None
        return [self.norm.weight, self.norm.bias, mean, var]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x)
        return result


class Hooked(Piece):
    """A hook changes what a conv is given or gives, or only watches."""

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__(awkward, number)
        self.conv, self.seen = pointwise(), 0
        if awkward:
            kind = number % 3
            if kind == 0:
                self.conv.register_forward_hook(lambda module, inputs, output: output * 1.5)
            elif kind == 1:
                self.conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
            else:
                self.conv.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.seen += 1

    def convs(self) -> list[nn.Conv2d]:
        return [self.conv]

    def reorder(self, order: Tensor) -> None:
        reorder_inputs(self.conv, order)
        reorder_outputs(self.conv, order)

    def forward(self, x: Tensor) -> Tensor:
        kind = -1 if self.awkward else self.number % 3
        y: Tensor = self.conv(x * 1.5 if kind == 1 else x)
        return y * 1.5 if kind == 0 else y


class LoudConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


def loudly(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias) * 1.5


class NamedConv(nn.Conv2d):
    """Adds nothing but a name."""


class Subclassed(Piece):
    """A conv of the user's own class, or with a ``forward`` of its own."""

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__(awkward, number)
        kind = number % 3
        make = (LoudConv, NamedConv, nn.Conv2d)[kind] if awkward else nn.Conv2d
        self.conv = make(CHANNELS, CHANNELS, 1)
        if awkward and kind == 2:
            self.conv.forward = types.MethodType(loudly, self.conv)  # type: ignore[method-assign]

    def convs(self) -> list[nn.Conv2d]:
        return [self.conv]

    def reorder(self, order: Tensor) -> None:
        reorder_inputs(self.conv, order)
        reorder_outputs(self.conv, order)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if self.awkward or self.number % 3 == 1 else y * 1.5


class Shared(Piece):
    """A conv that is called twice, or a norm behind two convs."""

    keeps_order = True

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__(awkward, number)
        self.a, self.norm = pointwise(), nn.BatchNorm2d(CHANNELS)
        self.b = self.a if awkward and number % 2 else pointwise()
        self.other_norm = self.norm if awkward else nn.BatchNorm2d(CHANNELS)

    def convs(self) -> list[nn.Conv2d]:
        return [self.a] if self.number % 2 else [self.a, self.b]

    def settle(self) -> None:
        if self.number % 2 and not self.awkward:
            self.b.load_state_dict(self.a.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        if self.number % 2:
            result: Tensor = self.b(torch.relu(self.a(x)))
        else:
            result = self.norm(self.a(x)) + torch.relu(self.other_norm(self.b(x)))
        return result


class Optional(Piece):
    """Arguments that are left out."""

    def extra(
        self, x: Tensor, scale: float = 1.5, mask: Tensor | None = None, *others: Tensor, **more: Any
    ) -> Tensor:
        x = x * scale * more.get("factor", 1.0)
        return sum(others, x if mask is None else x * mask)

    def forward(self, x: Tensor) -> Tensor:
        if not self.awkward:
            return x * 1.5
        variants: tuple[dict[str, Any], ...] = ({}, {"mask": None}, {"factor": 1.0}, {"scale": 1.5})
        return self.extra(x, **variants[self.number % 4])


class Keeping(Piece):
    """Keeps what it is given."""

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__(awkward, number)
        self.feature: Any = None
        self.log: list[Any] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.awkward:
            if self.number % 3 == 0:
                self.feature = x
            elif self.number % 3 == 1:
                self.log.append(x.detach().mean())
            else:
                self.calls += 1
        return x * 0.7


class Checked(Piece):
    """Looks at what it is given."""

    def forward(self, x: Any) -> Tensor:
        if self.awkward:
            assert x.shape[1] == CHANNELS, "channels"
            if not isinstance(x, Tensor) or x.dim() != 4:
                raise TypeError("maps, please")
            if x.shape[-1] % 2:
                x = F.pad(x, (0, 1))
            x = x * (8 / int(x.shape[-1]))
        result: Tensor = x * 1.2
        return result


class Viewed(Piece):
    """Views of maps, in the format that its author saw."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.awkward:
            return torch.relu(x - x.mean((2, 3), keepdim=True))
        kind = self.number % 3
        if kind == 0:
            rows = x.view(x.size(0), x.size(1), -1)
        elif kind == 1:
            rows = x.view(-1, CHANNELS, x.size(2) * x.size(3))
        else:
            rows = x.view(x.size(0), -1).view(x.size(0), CHANNELS, -1)
        return torch.relu(rows - rows.mean(2, keepdim=True)).view_as(x)


class ByFunction(Piece):
    """A conv that is called as a function."""

    keeps_order = True

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__(awkward, number)
        self.conv = pointwise()

    def convs(self) -> list[nn.Conv2d]:
        return [self.conv]

    def forward(self, x: Tensor) -> Tensor:
        if not self.awkward:
            result: Tensor = self.conv(x)
            return result
        if self.number % 2:
            return F.conv2d(x, self.conv.weight, self.conv.bias)
        tokens = x.flatten(2).transpose(1, 2)
        mixed = tokens @ self.conv.weight[:, :, 0, 0].t() + cast(Tensor, self.conv.bias)
        return mixed.transpose(1, 2).reshape(x.shape)


class Context(Piece):
    """Runs its part in a context, or by way of another function."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.awkward:
            return torch.relu(x * 2 - 0.5)
        kind = self.number % 3
        if kind == 0:
            with torch.no_grad():
                return torch.relu(x * 2 - 0.5)
        if kind == 1:
            with torch.autocast("cpu", enabled=False):
                return torch.relu(x.float() * 2 - 0.5)
        result: Tensor = torch.utils.checkpoint.checkpoint(
            lambda y: torch.relu(y * 2 - 0.5), x, use_reentrant=False
        )
        return result


class ByValue(Piece):
    """Asks for values."""

    depends_on_values = True

    def forward(self, x: Tensor) -> Tensor:
        if self.awkward:
            if self.number % 2:
                assert not torch.isnan(x).any(), "NaN"
            elif float(x.detach().abs().max()) > 1e6:
                return x * 0
        return x * 1.2


class Unfit(Piece):
    """Cannot be copied, minds the sizes of a conv, or does not take many images."""

    def __init__(self, awkward: bool, number: int) -> None:
        super().__init__(awkward, number)
        self.conv = pointwise()
        if awkward and number % 3 == 0:
            self.lock = threading.Lock()

    def refusal(self) -> tuple[str, ...]:
        reasons = (
            ("cannot be copied", "lock"),
            ("asks a replaced conv for its class, sizes or weight",),
            (f"at most {MOST_IMAGES} images",),
        )
        return reasons[self.number % 3]

    def convs(self) -> list[nn.Conv2d]:
        return [self.conv]

    def reorder(self, order: Tensor) -> None:
        reorder_inputs(self.conv, order)
        reorder_outputs(self.conv, order)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        if self.awkward and self.number % 3 == 1:
            result = result / self.conv.groups
        if self.awkward and self.number % 3 == 2 and len(x) > MOST_IMAGES:
            raise ValueError(f"at most {MOST_IMAGES} images")
        return result


PIECES: dict[str, type[Piece]] = {
    piece.__name__: piece
    for piece in (
        InPlace, Branch, Scale, Constant, Norm, Hooked, Subclassed, Shared, Optional, Keeping, Checked,
        Viewed, ByFunction, Context, ByValue, Unfit,
    )
}  # fmt: skip


class Chain(nn.Module):
    """A stem, convs with a piece between each two, and a classifier."""

    def __init__(self, plan: Sequence[Step], awkward: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(len(plan) + 1))
        self.pieces = nn.ModuleList(PIECES[name](awkward, number) for name, number in plan)
        self.head = nn.Linear(CHANNELS, 5)

    def pairs(self) -> list[tuple[nn.Conv2d, Piece, nn.Conv2d]]:
        """Each piece between its convs."""
        triples = zip(self.convs, self.pieces, list(self.convs)[1:], strict=False)
        return [(a, p, b) for a, p, b in triples if isinstance(p, Piece)]  # type: ignore[misc]

    def tensors(self) -> list[Tensor]:
        """All that one spelling takes over from the other."""
        rest = (*self.stem.parameters(), *self.convs.parameters(), *self.head.parameters())
        return [*rest, *(tensor for _, piece, _ in self.pairs() for tensor in piece.tensors())]

    def run(self, x: Tensor) -> Tensor:
        """The classes of images."""
        x = torch.relu(self.stem(x))
        for index, piece in enumerate(self.pieces):
            x = piece(torch.relu(self.convs[index](x)))
        x = torch.relu(self.convs[len(self.pieces)](x))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class Plain(Chain):
    """Spelled plainly."""

    def __init__(self, plan: Sequence[Step]) -> None:
        super().__init__(plan, awkward=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Awkward(Chain):
    """Spelled awkwardly, down to its own arguments."""

    def __init__(self, plan: Sequence[Step]) -> None:
        super().__init__(plan, awkward=True)

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None, **unused: Any) -> Tensor:
        return self.run(x if mask is None else x * mask) * scale


@torch.no_grad()
def twins(plan: Sequence[Step], seed: int) -> tuple[Awkward, Plain]:
    """The awkward net and its plain twin, both grouped already behind channels in a hidden order."""
    plain = grouped_already(Plain(plan), PAIRS, seed)
    for _, piece, _ in plain.pairs():
        piece.settle()
    if not any(piece.depends_on_values for _, piece, _ in plain.pairs()):
        _hide(plain, seed)
    awkward = Awkward(plan).eval()
    for mine, theirs in zip(awkward.tensors(), plain.tensors(), strict=True):
        mine.copy_(theirs)
    return awkward, plain


def _hide(net: Chain, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = net.convs[0]
    assert isinstance(first, nn.Conv2d)
    order = torch.randperm(CHANNELS, generator=generator)
    reorder_outputs(net.stem, order)
    reorder_inputs(first, order)
    for before, piece, behind in net.pairs():
        if not piece.keeps_order:
            order = torch.randperm(CHANNELS, generator=generator)
            reorder_outputs(before, order)
            piece.reorder(order)
            reorder_inputs(behind, order)
