"""Weights that are computed, shared, or of another kind: the conv stays, and the plan says why."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

from groupify.conversion.surgery import restructure
from groupify.models.wrappers import unseen_layers
from groupify.structures import SiteRecipe, Structure
from tests.cases.nets import (
    Straight,
    assert_exact,
    converted,
    converted_names,
    grouped_already,
    noise,
    planned,
    reason_of,
    refusal,
)

Change = Callable[[Straight], object]


class Doubled(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return 2 * values


def parametrized_bias(net: Straight) -> None:
    parametrize.register_parametrization(net.c1, "bias", Doubled())


def old_spectral_norm(net: Straight) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.spectral_norm(net.c1).eval()


def own_computation(net: Straight) -> None:
    """A weight that is computed before each call, by hand."""
    c1: Any = net.c1
    c1.plain = nn.Parameter(c1.weight.detach().clone())
    del c1._parameters["weight"]
    c1.weight = c1.plain * 2

    def compute(module: Any, inputs: Any) -> None:
        module.weight = module.plain * 2

    c1.register_forward_pre_hook(compute)


COMPUTED: dict[str, tuple[Change, str]] = {
    "weight norm": (lambda net: parametrizations.weight_norm(net.c1), "parametrizations(conv, 'weight')"),
    "orthogonal": (lambda net: parametrizations.orthogonal(net.c1), "parametrizations(conv, 'weight')"),
    "bias": (parametrized_bias, "its bias is parametrized; first call torch.nn.utils.parametrize"),
    "spectral norm by a hook": (old_spectral_norm, "remove_spectral_norm(conv)"),
    "pruned": (lambda net: prune.l1_unstructured(net.c1, "weight", 0.1), "prune.remove(conv, 'weight')"),
    "pruned bias": (lambda net: prune.l1_unstructured(net.c1, "bias", 0.1), "prune.remove(conv, 'bias')"),
    "by hand": (own_computation, "make its weight a plain parameter"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_a_conv_whose_weight_is_computed_stays(name: str) -> None:
    change, remedy = COMPUTED[name]
    net = grouped_already(Straight())
    change(net)
    net.eval()
    plan = planned(net)
    assert remedy in (reason_of(plan, "c1") or "")
    assert converted_names(plan) == ["rest.0"]
    assert remedy in refusal(lambda: restructure(net, [SiteRecipe("c1", Structure(groups=4))]))


@pytest.mark.parametrize("name", ["weight norm", "bias", "pruned"])
def test_the_net_around_it_converts(name: str) -> None:
    net = grouped_already(Straight())
    COMPUTED[name][0](net)
    assert_exact(converted(net).model, net)


def test_the_remedy_works() -> None:
    net = grouped_already(Straight())
    parametrizations.weight_norm(net.c1)
    parametrize.remove_parametrizations(net.c1, "weight")
    prune.l1_unstructured(net.rest[0], "weight", 0.1)
    prune.remove(net.rest[0], "weight")
    assert converted_names(planned(net)) == ["c1", "rest.0"]
    assert_exact(converted(net).model, net)


def test_a_conv_fused_with_its_norm_is_a_conv() -> None:
    net = grouped_already(Straight())
    norm = nn.BatchNorm2d(16).eval()
    assert norm.running_mean is not None
    norm.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    net.c1 = fusion.fuse_conv_bn_eval(net.c1, norm)
    assert_exact(converted(net).model, net)


# shared ----------------------------------------------------------------------------------------


def one_buffer(net: Straight) -> None:
    """All weights are views of one flat tensor, as some training programs have it."""
    parameters = list(net.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()


def test_weights_side_by_side_in_one_buffer_are_not_shared() -> None:
    net = grouped_already(Straight())
    before = copy.deepcopy(net)
    one_buffer(net)
    assert converted_names(planned(net)) == ["c1", "rest.0"]
    assert_exact(converted(net).model, before)


def test_a_shared_weight_is_named_with_its_other_owner() -> None:
    net = grouped_already(Straight())
    net.c1.weight = net.rest[0].weight  # type: ignore[assignment]
    said = refusal(lambda: planned(net))
    assert "it shares its weight with 'rest.0.weight' (2×)" in said
    assert said.endswith("give each layer a weight of its own")
    assert "shares its weight" in refusal(lambda: restructure(net, [SiteRecipe("c1", Structure(groups=4))]))


def test_a_weight_whose_memory_is_shared_counts() -> None:
    net = grouped_already(Straight())
    net.c1.bias = nn.Parameter(net.head.weight.data[0])
    assert reason_of(planned(net), "c1") == "it shares its bias with 'head.weight'"
    assert_exact(converted(net).model, net)


class Twice(Straight):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for _ in range(2):
            x = torch.relu(self.c1(x))
        result: Tensor = self.head(torch.relu(self.rest[0](x)).mean((2, 3)))
        return result


def test_a_conv_called_twice_is_one_layer() -> None:
    net = grouped_already(Twice())
    conversion = converted(net)
    assert [site.name for site in conversion.sites] == ["c1", "rest.0"]
    assert_exact(conversion.model, net)


class SumOfCalls(Straight):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.c1(x) + self.c1(2 * x))
        result: Tensor = self.head(torch.relu(self.rest[0](x)).mean((2, 3)))
        return result


def test_a_sum_of_two_calls_of_one_conv() -> None:
    net = grouped_already(SumOfCalls())
    assert_exact(converted(net).model, net)


# of another kind -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_convs_are_named() -> None:
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if not engines:
        pytest.skip("this build of PyTorch has no engine for quantised models")
    quantised = torch.ao.nn.quantized.Conv2d(16, 16, 1)
    net = nn.Sequential(quantised, nn.Flatten())
    (note,) = unseen_layers(net)
    assert note == (
        "1 convs are quantised already (0) and left alone: convert the float model, then quantise"
    )


def test_double_precision_and_a_mixture_keep_their_types() -> None:
    net: Any = grouped_already(Straight())
    net.c1.to(torch.bfloat16)
    again: Any = restructure(
        net, [SiteRecipe("c1", Structure(groups=4)), SiteRecipe("rest.0", Structure(groups=4))]
    )
    assert (again.c1.weight.dtype, again.c1.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert again.rest[0].weight.dtype == torch.float32
    net = grouped_already(Straight()).double()
    model = converted(net, plan=planned(net)).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert_exact(model, net, noise(4).double())
