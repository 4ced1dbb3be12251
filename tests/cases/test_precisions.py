"""Models of other precisions, and such as change precision or leave the real numbers on the way."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.nets import grouped_already, noise, relative_error
from tests.cases.small import (
    PAIRS,
    TINY,
    Between,
    Function,
    assert_converts,
    convert_from_weights,
    convert_small,
    hidden,
    right_or_refused,
    situations,
    stays,
    together,
)

DTYPES = {"double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", situations(DTYPES))
def test_a_model_of_another_precision_comes_back_in_it(dtype: torch.dtype) -> None:
    single = hidden(Between(torch.tanh))
    net = copy.deepcopy(single).to(dtype)
    model = convert_small(net, noise(32, TINY)).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    error = relative_error(model.float(), single, noise(8, TINY, 9))
    assert error < (1e-3 if dtype == torch.float64 else 5e-2)


class Mixed(nn.Module):
    """Its second conv is in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Between(lambda x: x)
        self.net.c2.double()
        self.net.head.double()
        self.net.between = lambda x: x.double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x).float()
        return result


def test_a_model_of_two_precisions_keeps_both() -> None:
    net = Mixed()
    hidden(net.net)
    before = [parameter.dtype for parameter in net.parameters()]

    def convert() -> None:
        model = assert_converts(net).model
        assert [parameter.dtype for parameter in model.parameters()] == before

    right_or_refused(convert, "float32")
    assert [parameter.dtype for parameter in net.parameters()] == before


def in_half(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        return x.half().float()


def spectrum(x: Tensor) -> Tensor:
    result: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=(8, 8))
    return result


def filtered(x: Tensor) -> Tensor:
    waves = torch.view_as_real(torch.fft.rfft2(x))
    keep = torch.linspace(1, 0, waves.shape[-2]).reshape(1, 1, 1, -1, 1)
    result: Tensor = torch.fft.irfft2(torch.view_as_complex((waves * keep).contiguous()), s=(8, 8))
    return result


BETWEEN: dict[str, Function] = {
    "half and back": in_half,
    "without gradients": torch.no_grad()(lambda x: x * 2),
    "in inference mode": torch.inference_mode()(lambda x: x * 2),
    "spectrum": spectrum,
    "filtered": filtered,
    "integers": lambda x: (x * 100).round().int().float() / 100,
    "truth": lambda x: x * (x > 0),
}


def test_a_change_of_numbers_on_the_way_does_not_disturb() -> None:
    together({name: hidden(Between(between), second=False) for name, between in BETWEEN.items()}, stays)


class Autocast(nn.Module):
    """Its convs run in bfloat16, whatever the caller does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Between(torch.relu)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.net(x)
        return F.softmax(y.float(), 1)


def test_a_model_that_casts_by_itself_stays_near() -> None:
    net = Autocast()
    hidden(net.net)
    assert relative_error(convert_small(net).model, net, noise(8, TINY, 9)) < 2e-2
    plain = Autocast()
    plain.load_state_dict(grouped_already(Autocast(), PAIRS).state_dict())
    assert relative_error(convert_from_weights(plain).model, plain.eval(), noise(8, TINY, 9)) < 2e-2
