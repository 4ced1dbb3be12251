"""What the cases share: seeded images, nets whose conversion must be exact, and how far outputs are apart.

In most cases the net is grouped already: each conv's weight is block diagonal, with the channels in between
reordered so that it does not show. A faithful conversion finds the blocks again and computes the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import groupify
from groupify.conversion.conversion import Conversion
from groupify.conversion.site_fit import FitOptions
from groupify.errors import GroupifyError, GroupifyWarning
from groupify.graph.plain_layers import CONVS, Conv
from groupify.structures import Plan
from tests.conversion.nets import make_block_diagonal

SHAPE = (3, 16, 16)
GROUPS = 4
# No shrinkage: what is grouped already must come back.
EXACT = FitOptions(ridge=1e-9, refit_ridge=1e-9)
# Relative error of outputs up to which a conversion counts as exact; activations wait in half precision.
TORCH_2_9 = TorchVersion(torch.__version__) < "2.10"  # the oldest that is allowed, which exports less
TOLERANCE = 1e-3

Model = TypeVar("Model", bound=nn.Module)


def noise(count: int = 64, shape: Sequence[int] = SHAPE, seed: int = 0) -> Tensor:
    """Standard normal images, shape (count, *shape)."""
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def lively(net: Model, seed: int = 0) -> Model:
    """Give every layer weights that matter (He's) and small biases; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            own = dict(module.named_parameters(recurse=False))
            if "weight" not in own or own["weight"].dim() < 2:
                continue
            for name in ("weight", "bias") if own.get("bias") is not None else ("weight",):
                parameter = own[name]
                spread = 0.1 if name == "bias" else (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def grouped_already(net: Model, groups: int = GROUPS, seed: int = 0) -> Model:
    """Make a net lively, and all its convs but those that read the image block diagonal."""
    lively(net, seed)
    for module in net.modules():
        if isinstance(module, CONVS) and module.in_channels % groups == 0 and module.groups == 1:
            make_block_diagonal(module, groups)
    return net


def reorder_between(first: Conv, second: Conv, vectors: Iterable[Tensor] = (), seed: int = 3) -> None:
    """Hide the blocks: reorder the channels between two convs, and vectors in between, consistently."""
    order = torch.randperm(first.out_channels, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        first.weight.copy_(first.weight[order])
        if first.bias is not None:
            first.bias.copy_(first.bias[order])
        second.weight.copy_(second.weight[:, order])
        for vector in vectors:
            flat = vector.reshape(-1)
            flat.copy_(flat[order].clone())


def with_statistics(net: Model, shape: Sequence[int] = SHAPE, seed: int = 0) -> Model:
    """Give batch norms the statistics of their inputs, as after training, and weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(norm.bias, 0, 0.2, generator=generator)
    with torch.no_grad():
        net.train()(noise(64, shape))
    return net.eval()


def planned(net: nn.Module, shape: tuple[int, ...] = SHAPE, groups: int = GROUPS, **rules: Any) -> Plan:
    """The plan of a small net, whatever the processor: groups of any width, and no word about speed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GroupifyWarning)
        return groupify.plan(
            net, shape, groups=groups, rules=groupify.Rules(**({"min_group_width": 1} | rules))
        )


def converted(
    net: nn.Module,
    images: Tensor | None = None,
    *,
    plan: Plan | None = None,
    fit: FitOptions = EXACT,
) -> Conversion:
    """Convert a small net, by a plan of its own unless one is given."""
    images = noise() if images is None else images
    plan = plan or planned(net, tuple(images.shape[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GroupifyWarning)  # of how few images there are
        return groupify.convert(net, plan, groupify.Calibration(images, fit=fit, restarts=6))


def relative_error(model: nn.Module, reference: nn.Module, images: Tensor | None = None) -> float:
    """Norm of the difference of two models' outputs on fresh images ÷ norm of the reference's."""
    images = noise(16, seed=9) if images is None else images
    with torch.no_grad():
        ours, wanted = model.eval()(images.clone()), reference.eval()(images.clone())
    return float((ours - wanted).norm() / wanted.norm())


def assert_exact(model: nn.Module, reference: nn.Module, images: Tensor | None = None) -> None:
    """Fail unless two models compute the same on fresh images, up to ``TOLERANCE``."""
    error = relative_error(model, reference, images)
    assert error < TOLERANCE, f"relative error {error:.3g}"


def refusal(what: Callable[[], object]) -> str:
    """The one line with which groupify refuses; anything else that is raised, or no refusal, fails."""
    with pytest.raises(GroupifyError) as refused:
        what()
    text = str(refused.value)
    assert "\n" not in text
    return text


def reason_of(plan: Plan, name: str) -> str | None:
    """Why a plan does with a conv what it does; None where it is converted as asked."""
    return next(site.reason for site in plan.sites if site.name == name)


def converted_names(plan: Plan) -> list[str]:
    """The convs that a plan converts."""
    return [site.name for site in plan.converted]


class Straight(nn.Module):
    """A stem, two convs of which the second sits in a list, and a classifier; ReLUs between."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.c1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.rest = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1)])
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c1(torch.relu(self.stem(x))))
        x = torch.relu(self.rest[0](x))
        result: Tensor = self.head(x.mean((2, 3)))
        return result
