"""Forward functions that look at what they are given: shapes, types, values, modes, what is missing."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupify.errors import GroupifyError
from tests.cases.nets import assert_exact, grouped_already, noise, planned
from tests.cases.small import (
    CHANNELS,
    PAIRS,
    TINY,
    Between,
    assert_converts,
    convert_from_weights,
    convert_small,
    follows,
    hidden,
    right_from_weights,
    situations,
    together,
)

Check = Callable[[nn.Module, Tensor], Any]


class Checked(Between):
    """Looks at its images first, and goes on with what the check returns, if anything."""

    def __init__(self, check: Check) -> None:
        super().__init__(lambda x: x * 2)
        self.check = check

    def forward(self, x: Tensor) -> Tensor:
        found = self.check(self, x)
        return super().forward(x if found is None else found)


def asserted(net: nn.Module, x: Tensor) -> None:
    assert x.shape[1] == 3, "three channels"


def asserted_of_many(net: nn.Module, x: Tensor) -> None:
    assert isinstance(x, Tensor)
    assert x.ndim == 4 and x.size(-1) % 4 == 0, x.shape  # noqa: PT018
    assert x.dtype == torch.float32


def raised(net: nn.Module, x: Tensor) -> None:
    if x.shape[1] != 3:
        raise ValueError(f"three channels, not {x.shape[1]}")


def is_instance(net: nn.Module, x: Any) -> Any:
    return x if isinstance(x, Tensor) else torch.stack(x)


def is_tensor(net: nn.Module, x: Any) -> Any:
    return x if torch.is_tensor(x) else torch.stack(x)


def type_is(net: nn.Module, x: Any) -> Any:
    return x if type(x) is Tensor or isinstance(x, Tensor) else x[0]


def one_image(net: nn.Module, x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 3 else x


def padded_to_even(net: nn.Module, x: Tensor) -> Tensor:
    return F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)) if x.shape[-1] % 2 else x


def scaled_by_size(net: nn.Module, x: Tensor) -> Tensor:
    return x / math.sqrt(x.shape[-1]) * (int(x.shape[2]) // 4)


def tried(net: nn.Module, x: Tensor) -> Tensor:
    try:
        return x.reshape(len(x), 5, -1)
    except (RuntimeError, ValueError):
        return x


def checked_by_torch(net: nn.Module, x: Tensor) -> None:
    torch._check(x.shape[1] == 3)
    torch._assert(x.shape[1] == 3, "three channels")


def depends_on_mode(net: nn.Module, x: Tensor) -> Tensor:
    if net.training or (torch.is_grad_enabled() and x.requires_grad):
        return x + torch.randn_like(x)
    return x if not torch.onnx.is_in_onnx_export() else x * 0


def logged(net: nn.Module, x: Tensor) -> None:
    logging.getLogger(__name__).debug("images of shape %s on %s: %r", x.shape, x.device, x.dtype)


def warned(net: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn(f"{tuple(x.shape)}", stacklevel=2)


def laid_out(net: nn.Module, x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def moved(net: nn.Module, x: Tensor) -> Tensor:
    weight = next(net.parameters())
    return x.to(weight.device, weight.dtype, non_blocking=True).type_as(weight)


def listed(net: nn.Module, x: Tensor) -> Tensor:
    (n, c, h, w), size = x.shape, list(x.shape[-2:])
    return x.reshape([n, c, *size]) if (h, w) == tuple(size) and torch.Size(size) == x.shape[2:] else x * 0


# What the trace of a program sees through.
SHAPES: dict[str, Check] = {
    "nothing": lambda net, x: None,
    "assert": asserted,
    "assert of many things": asserted_of_many,
    "raise": raised,
    "torch's own": checked_by_torch,
    "isinstance": is_instance,
    "is_tensor": is_tensor,
    "type": type_is,
    "one image": one_image,
    "padding": padded_to_even,
    "size": scaled_by_size,
    "try": tried,
    "mode": depends_on_mode,
    "logging": logged,
    "warning": warned,
    "layout": laid_out,
    "device and type": moved,
    "lists of sizes": listed,
    "is_floating_point": lambda net, x: (
        x if x.is_floating_point() and not x.is_complex() else x.float() / 255
    ),
}


def test_checks_of_shapes_and_types_cost_nothing() -> None:
    together({name: hidden(Checked(check)) for name, check in SHAPES.items()}, follows)


def test_a_check_of_the_number_of_images_costs_little() -> None:
    """Torch may export one number of images only."""
    assert_converts(
        grouped_already(Checked(lambda net, x: x if len(x) >= 1 and x.nelement() else x * 0), PAIRS)
    )


def finite(net: nn.Module, x: Tensor) -> None:
    assert not torch.isnan(x).any(), "NaN"


def from_bytes(net: nn.Module, x: Tensor) -> Tensor:
    return x / 255 if x.max() > 200 else x


def branched(net: nn.Module, x: Tensor) -> Tensor:
    return x.flip(-1) if x.mean() > 0 else x


def image_by_image(net: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([image - image.mean() for image in x])


def looped(net: nn.Module, x: Tensor) -> Tensor:
    while float(x.abs().max()) > 4:
        x = x / 2
    return x


def through_numpy(net: nn.Module, x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().cpu().numpy() * 2)


def through_a_list(net: nn.Module, x: Tensor) -> Tensor:
    return x * len(x.mean((2, 3)).tolist()[0]) / 3


def another_way_when_exported(net: nn.Module, x: Tensor) -> Tensor:
    return x * 2 if torch.compiler.is_compiling() else x


def as_many_as_images(net: nn.Module, x: Tensor) -> Tensor:
    return x * (1 if len(x) > 100 else 0.5)


VALUES: dict[str, Check] = {
    "assert that nothing is NaN": finite,
    "largest value": from_bytes,
    "branch": branched,
    "image by image": image_by_image,
    "loop": looped,
    "array": through_numpy,
    "list": through_a_list,
    "another way when exported": another_way_when_exported,
    "number of images": as_many_as_images,
}


@pytest.mark.parametrize("check", situations(VALUES))
def test_what_a_trace_cannot_know_is_right(check: Check) -> None:
    assert_converts(grouped_already(Checked(check), PAIRS))


@pytest.mark.parametrize("name", ["assert that nothing is NaN", "image by image"])
def test_what_depends_on_values_is_right_without_images(name: str) -> None:
    net = grouped_already(Checked(VALUES[name]), PAIRS)
    assert_exact(convert_from_weights(net).model, net, noise(8, TINY, 9))


def test_a_model_with_its_own_checks_inside_is_converted_in_order_within() -> None:
    class Wrapped(nn.Module):
        """The path of the images depends on their values; the backbone's does not."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = Between(torch.relu)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.backbone(x if x.mean() > 1 else x * 0.5)
            return result

    net = Wrapped()
    hidden(net.backbone)
    assert_converts(net)


def test_a_model_that_refuses_its_images_is_not_blamed_on_groupify() -> None:
    def refuse(net: nn.Module, x: Tensor) -> None:
        raise ValueError("never in my life")

    with pytest.raises(GroupifyError, match="never in my life") as refused:
        planned(Checked(refuse), TINY, PAIRS)
    assert isinstance(refused.value.__cause__, ValueError)


class Up(nn.Module):
    """Joins a skip connection, if there is one."""

    def __init__(self, there: Callable[[Any], bool]) -> None:
        super().__init__()
        self.conv, self.there = nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding=1), there

    def forward(self, x: Tensor, skip: Any = None) -> Tensor:
        if self.there(skip):
            x = torch.cat([x, *skip] if isinstance(skip, list | tuple) else [x, skip], 1)
        return torch.relu(self.conv(x))


class Decoder(nn.Module):
    """An encoder and a decoder with a skip connection."""

    def __init__(self, there: Callable[[Any], bool], skip: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.c1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.up, self.skip = Up(there), skip
        self.end = nn.Conv2d(CHANNELS, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.stem(x))
        result: Tensor = self.end(self.up(torch.relu(self.c1(skip)), self.skip(skip))).mean((2, 3))
        return result


THERE: dict[str, tuple[Callable[[Any], bool], Callable[[Tensor], Any]]] = {
    "is not None": (lambda skip: skip is not None, lambda x: x),
    "isinstance": (lambda skip: isinstance(skip, Tensor), lambda x: x),
    "is_tensor": (torch.is_tensor, lambda x: x),
    "type": (lambda skip: type(skip) is not type(None), lambda x: x),
    "list": (lambda skip: isinstance(skip, list) and len(skip) == 1, lambda x: [x]),
    "tuple": (lambda skip: isinstance(skip, tuple), lambda x: (x,)),
    "attribute": (lambda skip: hasattr(skip, "shape"), lambda x: x),
    "number of elements": (lambda skip: skip is not None and skip.numel() > 0, lambda x: x),
}


def test_a_skip_connection_is_joined_where_it_is_there() -> None:
    def check(net: nn.Module) -> None:
        assert_converts(net)
        right_from_weights(net)

    together({name: grouped_already(Decoder(*kind), PAIRS) for name, kind in THERE.items()}, check)


def test_a_trace_that_fails_does_not_fill_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    """torch prints the whole graph when a value decides about the path."""
    net = grouped_already(Checked(branched), PAIRS)
    convert_small(net)
    written = capfd.readouterr()
    assert written.out == ""
    assert len(written.err.splitlines()) <= 2
