"""Convs that become several: every structure, and every conv that may become one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from groupify.conversion.factor_fit import write_factors
from groupify.conversion.surgery import ShuffledConv2d, conv_shape, restructure
from groupify.errors import ConversionError, PlanError
from groupify.graph.plain_layers import Conv
from groupify.structures import SiteRecipe, Structure
from tests.conversion.nets import images, randomise
from tests.decomposition.problems import random_factors

DIMS: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@torch.no_grad()
def computing(conv: Conv, structure: Structure) -> tuple[nn.Sequential, nn.Module]:
    """A net of one conv that the structure can compute, and the same net with the structure."""
    conv = randomise(conv).double()
    factors = random_factors(conv_shape(conv), structure)
    conv.weight.copy_(factors.weight())
    net = nn.Sequential(conv)
    again = restructure(net, [SiteRecipe("0", structure)])
    if not structure.is_one_conv:
        write_factors(again.get_submodule("0"), factors)
    return net, again


def pictures(conv: Conv, size: int = 9) -> Tensor:
    return images(2, (conv.in_channels, *[size] * len(conv.kernel_size))).double()


# Conv and structure: 2-d unless it says otherwise.
CASES: dict[str, tuple[Conv, Structure]] = {
    "reduce alone": (nn.Conv2d(12, 16, 3), Structure(6)),
    "reduce and groups": (nn.Conv2d(12, 16, 3), Structure(8, 4)),
    "expand alone": (nn.Conv2d(12, 16, 3), Structure(None, 1, 5)),
    "grouped-pointwise": (nn.Conv2d(12, 16, 3), Structure(None, 4, 16)),
    "outputs that the groups do not divide": (nn.Conv2d(12, 10, 3), Structure(None, 4, 8)),
    "inputs that the groups do not divide": (nn.Conv2d(10, 12, 3), Structure(8, 4)),
    "neither divided": (nn.Conv2d(7, 11, 3), Structure(4, 4, 8)),
    "Tucker-2": (nn.Conv2d(12, 16, 3), Structure(6, 1, 8)),
    "block-term": (nn.Conv2d(12, 16, 3), Structure(8, 4, 12)),
    "depthwise core": (nn.Conv2d(12, 16, 3), Structure(10, 10, 10)),
    "depthwise core of a multiplier": (nn.Conv2d(12, 16, 3), Structure(5, 5, 10)),
    "more latents than channels": (nn.Conv2d(6, 8, 3), Structure(16, 8, 24)),
    "low rank 1×1": (nn.Conv2d(12, 16, 1), Structure(5)),
    "low rank 1×1, strided and padded": (nn.Conv2d(12, 16, 1, stride=(2, 3), padding=1), Structure(5)),
    "low rank 1×1, padded with itself": (
        nn.Conv2d(12, 16, 1, padding=(2, 1), padding_mode="circular"), Structure(5),
    ),
    "1×1 to grouped 1×1, strided": (nn.Conv2d(12, 16, 1, stride=2), Structure(8, 4)),
    "grouped 1×1 to 1×1, strided": (nn.Conv2d(12, 16, 1, stride=2, padding=1), Structure(None, 4, 8)),
    "strided": (nn.Conv2d(12, 16, 3, stride=2, padding=1), Structure(8, 4, 12)),
    "dilated": (nn.Conv2d(12, 16, 3, dilation=(2, 1), padding=2), Structure(8, 4, 12)),
    "padded as is": (nn.Conv2d(12, 16, (5, 3), padding="same"), Structure(8, 4, 12)),
    "reflected": (nn.Conv2d(12, 16, 3, padding=(2, 1), padding_mode="reflect"), Structure(8, 4, 12)),
    "replicated": (nn.Conv2d(12, 16, 5, padding=2, padding_mode="replicate"), Structure(8, 4, 12)),
    "circular": (nn.Conv2d(12, 16, 3, padding=1, padding_mode="circular"), Structure(None, 4, 12)),
    "even kernel": (nn.Conv2d(12, 16, (2, 4), padding=1), Structure(8, 4, 12)),
    "kernel of one row": (nn.Conv2d(12, 16, (1, 5)), Structure(8, 4, 12)),
    "without bias": (nn.Conv2d(12, 16, 3, bias=False), Structure(8, 4, 12)),
    "without bias, reduce alone": (nn.Conv2d(12, 16, 3, bias=False), Structure(6)),
    "1-d": (nn.Conv1d(12, 16, 4, stride=2, padding=1), Structure(8, 4, 12)),
    "1-d low rank": (nn.Conv1d(12, 16, 1, stride=2), Structure(5)),
    "3-d": (nn.Conv3d(12, 16, (1, 3, 2), padding=(0, 1, 1)), Structure(8, 4, 12)),
    "3-d low rank": (nn.Conv3d(12, 16, 1, stride=(1, 2, 2)), Structure(5)),
    "groups of its own, fewer channels": (nn.Conv2d(12, 16, 3, groups=2), Structure(6, 2, 8)),
    "groups of its own, reduce alone": (nn.Conv2d(12, 16, 3, groups=2), Structure(8, 4)),
    "groups of its own, expand alone": (nn.Conv2d(12, 16, 3, groups=2), Structure(None, 2, 6)),
    "groups of its own, more groups": (nn.Conv2d(12, 16, 3, groups=2), Structure(8, 4, 12)),
    "groups of its own, depthwise core": (nn.Conv2d(12, 16, 3, groups=2), Structure(8, 8, 8)),
    "groups of its own, low rank 1×1": (nn.Conv2d(12, 16, 1, groups=2, stride=2), Structure(4, 2)),
    "groups of its own, plain groups": (nn.Conv2d(12, 16, 3, groups=2), Structure(groups=4)),
    "groups of its own, depthwise": (nn.Conv1d(12, 24, 3, groups=2), Structure(groups=12)),
    "groups of three channels": (nn.Conv2d(12, 12, 3, groups=4, padding=1), Structure(8, 4, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_a_conv_of_that_structure_computes(name: str) -> None:
    conv, structure = CASES[name]
    net, again = computing(conv, structure)
    x = pictures(conv)
    torch.testing.assert_close(again(x), net(x))
    assert type(net[0]) is type(conv)


@pytest.mark.parametrize("name", CASES)
def test_weights_and_work_are_what_a_plan_says(name: str) -> None:
    conv, structure = CASES[name]
    net, again = computing(conv, structure)
    shape, biased = conv_shape(conv), conv.bias is not None
    assert sum(part.numel() for part in again.parameters()) == structure.parameters(shape, bias=biased)
    x = pictures(conv)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs = again(x[:1])
    pixels = x[0, 0].numel(), outputs[0, 0].numel()
    assert counter.get_total_flops() // 2 == structure.macs(shape, *pixels)
    assert outputs.shape == net(x[:1]).shape


CONVS_BY_CHANCE = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 4), "stride": st.integers(1, 3), "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2), "bias": st.booleans(),
        "padding_mode": st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
    }
)  # fmt: skip


@given(
    dims=st.sampled_from([1, 2, 2, 3]),
    options=CONVS_BY_CHANCE,
    own=st.integers(1, 3),
    more=st.integers(1, 3),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    reduce=st.none() | st.integers(1, 3),
    expand=st.none() | st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_conv_and_any_structure_that_suits_it(
    dims: int, options: dict[str, Any], own: int, more: int, inputs: int, outputs: int, reduce: int | None,
    expand: int | None,
) -> None:  # fmt: skip
    assume(dims < 3 or options["padding_mode"] != "reflect")
    groups = own * more
    conv = DIMS[dims](inputs * groups, outputs * groups, groups=own, **options)
    structure = Structure(reduce and reduce * groups, groups, expand and expand * groups)
    structure = structure.canonical(conv_shape(conv))
    assume(structure != Structure(groups=own))
    structure.check(conv_shape(conv))
    net, again = computing(conv, structure)
    x = pictures(conv, 8)
    torch.testing.assert_close(again(x), net(x))


def test_the_convs_are_named_by_what_they_do() -> None:
    conv = nn.Conv2d(12, 16, 3)
    for structure, expected in (
        (Structure(8, 4, 12), ["reduce.weight", "core.weight", "expand.weight", "expand.bias"]),
        (Structure(8, 4), ["reduce.weight", "core.weight", "core.bias"]),
        (Structure(None, 4, 12), ["core.weight", "expand.weight", "expand.bias"]),
    ):
        again = restructure(conv, [SiteRecipe("", structure)])
        assert type(again) is nn.Sequential
        assert list(again.state_dict()) == expected
        assert {type(layer) for layer in again} == {nn.Conv2d}


def test_a_conv_that_gets_more_groups_keeps_its_diagonal_blocks() -> None:
    conv = nn.Conv2d(8, 8, 1, groups=2, bias=False)
    again = restructure(conv, [SiteRecipe("", Structure(groups=4))])
    assert isinstance(again, nn.Conv2d)
    assert again.groups == 4
    own = conv.weight.detach().reshape(
        2, 2, 2, 2, 2
    )  # group, block of outputs, output, block of inputs, input
    expected = torch.stack([own[:, block, :, block] for block in range(2)], 1).reshape(8, 2, 1, 1)
    assert torch.equal(again.weight, expected)


def test_before_a_fit_the_first_latents_are_passed_on() -> None:
    """With as many latents as channels these are the diagonal blocks, as of a grouped conv."""
    conv = nn.Conv2d(8, 8, 3)
    grouped = restructure(nn.Sequential(conv), [SiteRecipe("0", Structure(groups=2))])
    x = images(2, (8, 6, 6))
    several = restructure(nn.Sequential(conv), [SiteRecipe("0", Structure(8, 2, 8))])
    torch.testing.assert_close(several(x), grouped(x))
    conv.weight.data[:, 6:] = 0
    conv.weight.data[5:] = 0
    few = restructure(nn.Sequential(conv), [SiteRecipe("0", Structure(6, 1, 5))])
    torch.testing.assert_close(few(x), conv(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("structure", [Structure(8, 4, 12), Structure(5), Structure(None, 4, 8)], ids=str)
def test_type_mode_layout_and_what_is_trained_are_kept(structure: Structure, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(12, 16, 3), nn.Conv2d(16, 16, 3)).to(dtype)
    net = net.to(memory_format=torch.channels_last)
    net[0].eval()
    net[0].weight.requires_grad_(False)
    again = restructure(net, [SiteRecipe("0", structure)])
    parts = list(again.get_submodule("0").children())
    assert {part.dtype for part in again.parameters()} == {dtype}
    assert not any(layer.training for layer in parts)
    assert again.get_submodule("1").training
    assert not any(layer.get_parameter("weight").requires_grad for layer in parts)
    assert again.get_parameter("1.weight").requires_grad
    bias = parts[-1].get_parameter("bias")
    assert bias.requires_grad
    assert torch.equal(bias, net[0].get_parameter("bias"))
    assert all(layer.bias is None for layer in parts[:-1])
    core = again.get_parameter("0.core.weight")
    assert core.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_drawn_from_the_global_generator() -> None:
    net = nn.Sequential(nn.Conv2d(12, 16, 3))
    before = torch.get_rng_state()
    restructure(net, [SiteRecipe("0", Structure(8, 4, 12))])
    assert torch.equal(before, torch.get_rng_state())


def test_whatever_else_lies_on_a_conv_stays() -> None:
    net: Any = nn.Sequential(nn.Conv2d(12, 16, 3, stride=2), nn.ReLU())
    seen: list[torch.Size] = []
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    net[0].note = "kept"
    net[0].register_buffer("table", torch.ones(3))
    again: Any = restructure(net, [SiteRecipe("0", Structure(8, 4, 12))])
    again(torch.zeros(2, 12, 7, 7))
    assert seen == [(2, 16, 3, 3)]
    assert again[0].note == "kept"
    assert "0.table" in again.state_dict()
    assert (again[0].in_channels, again[0].out_channels, again[0].stride) == (12, 16, (2, 2))


def test_a_shared_conv_becomes_several_under_each_of_its_names() -> None:
    conv = nn.Conv2d(8, 8, 1)
    net = nn.Sequential(conv, nn.ReLU(), nn.Sequential(conv))
    again = restructure(net, [SiteRecipe("0", Structure(3))])
    assert again.get_submodule("0") is again.get_submodule("2.0")
    assert list(conv.children()) == []


def test_a_converted_model_is_not_converted_again_by_chance() -> None:
    """The convs of a sequence are convs like others, named by where they are."""
    net = restructure(nn.Sequential(nn.Conv2d(12, 16, 3)), [SiteRecipe("0", Structure(8, 1, 12))])
    with pytest.raises(ConversionError, match="layer '0' is a Sequential"):
        restructure(net, [SiteRecipe("0", Structure(groups=2))])
    again = restructure(net, [SiteRecipe("0.core", Structure(groups=4))])
    assert again.get_parameter("0.core.weight").shape == (12, 2, 3, 3)


SQUARE, DEPTHWISE = nn.Conv2d(12, 16, 3), nn.Conv2d(12, 12, 3, groups=12)
UNSUITABLE: dict[str, tuple[Conv, Structure, bool, str]] = {
    "inputs": (SQUARE, Structure(None, 8, 16), False, "8 groups do not divide 12 and 16 channels"),
    "outputs": (SQUARE, Structure(12, 3), False, "3 groups do not divide 12 and 16 channels"),
    "fewer groups": (nn.Conv2d(12, 16, 3, groups=4), Structure(6, 2, 8), False, "take a multiple of 4"),
    "no groups": (nn.Conv2d(12, 16, 3, groups=4), Structure(), False, "take a multiple of 4"),
    "groups that are no multiple": (
        nn.Conv2d(12, 24, 3, groups=4), Structure(groups=6), False, "take a multiple of 4",
    ),
    "depthwise already": (DEPTHWISE, Structure(12, 12, 12), False, "with needless convs; write it so"),
    "as it is": (SQUARE, Structure(), False, "is the conv as it is; leave it out"),
    "as it is, in groups": (
        nn.Conv2d(12, 16, 3, groups=4), Structure(groups=4), False, "is the conv as it is; leave it out",
    ),
    "as many latents as inputs": (SQUARE, Structure(12, 1, 8), False, r"is \(–, 1, 8\) with needless convs"),
    "more latents than outputs": (SQUARE, Structure(6, 1, 20), False, r"is \(6, 1, –\) with needless convs"),
    "low rank that is none": (
        nn.Conv2d(12, 16, 1), Structure(12), False, r"is \(–, 1, –\) with needless convs",
    ),
    "1×1 between 1×1": (nn.Conv2d(12, 16, 1), Structure(8, 4, 8), False, r"is \(8, 1, –\) with needless"),
    "1×1 written as expand": (nn.Conv2d(12, 16, 1), Structure(None, 1, 5), False, r"is \(5, 1, –\) with"),
    "shuffle behind several": (SQUARE, Structure(None, 4, 16), True, "a shuffle is for a dense conv that"),
    "shuffle behind groups of groups": (
        nn.Conv2d(12, 16, 3, groups=2), Structure(groups=4), True, "a shuffle is for a dense conv that",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUITABLE)
def test_a_structure_that_does_not_suit_is_refused_with_what_would(name: str) -> None:
    conv, structure, shuffle, message = UNSUITABLE[name]
    net = nn.Sequential(conv)
    before = dict(vars(conv))
    with pytest.raises(ConversionError, match=message) as raised:
        restructure(net, [SiteRecipe("0", structure, shuffle)])
    assert str(raised.value).startswith("layer '0'")
    assert vars(conv) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 1, None), "reduce is 0; expected 1 or more, or None"),
        ((None, 0, None), "groups is 0; expected 1 or more"),
        ((None, 1, -3), "expand is -3; expected 1 or more, or None"),
        ((6, 4, None), "reduce is 6, which 4 groups do not divide; take a multiple of 4"),
        ((None, 4, 9), "expand is 9, which 4 groups do not divide; take a multiple of 4"),
    ],
)
def test_three_numbers_that_are_no_structure_are_refused(
    given: tuple[int | None, int, int | None], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        Structure(*given)


class Own(nn.Conv2d):
    """Computes something else than a conv."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return torch.relu(super().forward(input))


@pytest.mark.parametrize("structure", [Structure(8, 4, 12), Structure(5), Structure(None, 4, 8)], ids=str)
def test_what_is_no_plain_conv_does_not_become_several(structure: Structure) -> None:
    tied = nn.Sequential(nn.Conv2d(12, 16, 3), nn.Conv2d(12, 16, 3))
    tied[1].weight = tied[0].weight
    with_layer = nn.Sequential(nn.Conv2d(12, 16, 3))
    with_layer[0].norm = nn.BatchNorm2d(16)
    shuffled = restructure(nn.Sequential(nn.Conv2d(12, 16, 3)), [SiteRecipe("0", Structure(groups=2), True)])
    assert type(shuffled.get_submodule("0")) is ShuffledConv2d
    for net, message in (
        (nn.Sequential(Own(12, 16, 3)), "layer '0' cannot be replaced"),
        (tied, "it shares its weight"),
        (with_layer, r"has layers of its own \(norm\), which a sequence of convs would run; expected a"),
        (shuffled, "layer '0' cannot be replaced"),
    ):
        with pytest.raises(ConversionError, match=message):
            restructure(net, [SiteRecipe("0", structure)])
