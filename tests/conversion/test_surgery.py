from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupify.conversion.surgery import ShuffledConv2d, block_diagonal, channel_shuffle, restructure
from groupify.errors import ConversionError
from groupify.graph.permute import row_channels, shuffle_order
from groupify.structures import SiteRecipe, Structure
from tests.conversion.nets import CalledTwice, images, make_block_diagonal, randomise


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": 1, "bias": False},
        {"stride": 2, "dilation": 2, "padding": 2},
        {"padding": "same", "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular"},
        {"kernel_size": (1, 5), "padding": (0, 2)},
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_block_diagonal_conv_computes_the_same(options: dict[str, Any], shuffle: bool) -> None:
    dense = nn.Conv2d(8, 16, **{"kernel_size": 3, **options})
    randomise(dense)
    make_block_diagonal(dense, 4)
    if shuffle:
        # What the shuffled conv gives out at place j·4 + g is row g·4 + j of its weight.
        order = shuffle_order(16, 4)
        dense.weight.data = dense.weight.data[order]
        if dense.bias is not None:
            dense.bias.data = dense.bias.data[order]
    net = nn.Sequential(dense)
    grouped = restructure(net, [SiteRecipe("0", Structure(groups=4), shuffle)])
    conv = grouped.get_submodule("0")
    assert type(conv) is (ShuffledConv2d if shuffle else nn.Conv2d)
    assert conv.weight.shape == (16, 2, *dense.kernel_size)
    x = images(2, (8, 7, 9))
    torch.testing.assert_close(grouped(x), net(x))


def test_shuffle_interleaves_the_groups() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert channel_shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(channel_shuffle(x, 2), x[:, shuffle_order(6, 2)])


def test_row_channels_of_a_shuffle() -> None:
    # Groups {0, 2, 4} and {1, 3, 5} of the shuffled output.
    assert row_channels(6, 2, True).tolist() == [0, 2, 4, 1, 3, 5]
    assert row_channels(6, 2, False).tolist() == list(range(6))


def test_truncation_keeps_the_diagonal_blocks() -> None:
    weight = torch.arange(16.0).reshape(4, 4, 1, 1)
    assert block_diagonal(weight, 2).flatten().tolist() == [0, 1, 4, 5, 10, 11, 14, 15]


def test_a_bare_conv_is_replaced_itself() -> None:
    dense = nn.Conv2d(4, 4, 3)
    converted = restructure(dense, [SiteRecipe("", Structure(groups=2))])
    assert isinstance(converted, nn.Conv2d)
    assert converted.groups == 2
    assert dense.groups == 1


def test_grouped_pointwise() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    make_block_diagonal(conv, 2)
    dense = nn.Sequential(conv)
    converted = restructure(dense, [SiteRecipe("0", Structure(None, 2, 8))])
    x = images(2, (8, 6, 6))
    torch.testing.assert_close(converted(x), dense(x))
    assert set(converted.state_dict()) == {"0.core.weight", "0.expand.weight", "0.expand.bias"}


def test_a_shared_conv_is_replaced_under_each_of_its_names() -> None:
    conv = nn.Conv2d(8, 8, 1)
    net = nn.Sequential(conv, nn.ReLU(), nn.Sequential(conv))
    converted = restructure(net, [SiteRecipe("0", Structure(groups=2))])
    assert converted.get_submodule("0") is converted.get_submodule("2.0")
    assert conv.groups == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_mode_and_requires_grad_are_kept(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)).to(dtype)
    net[0].eval()
    net[0].weight.requires_grad_(False)
    converted = restructure(net, [SiteRecipe("0", Structure(groups=2)), SiteRecipe("1", Structure(groups=2))])
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert [m.training for m in converted.children()] == [False, True]
    assert not converted.get_parameter("0.weight").requires_grad
    assert converted.get_parameter("1.weight").requires_grad


def test_the_given_model_and_its_hooks_are_kept() -> None:
    net = CalledTwice()
    calls: list[str] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append("hook")

    net.fc.register_forward_hook(hook)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    converted = restructure(net, [SiteRecipe("conv", Structure(groups=2))])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    converted(images(1))
    assert calls == ["hook"]


def test_nothing_is_drawn_from_the_global_generator() -> None:
    net = CalledTwice()
    before = torch.get_rng_state()
    restructure(net, [SiteRecipe("conv", Structure(groups=2))])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (SiteRecipe("convv", Structure(groups=2)), "did you mean 'conv'"),
        (SiteRecipe("fc", Structure(groups=2)), "is a Linear"),
        (SiteRecipe("conv", Structure(groups=3)), "3 groups do not divide"),
        (SiteRecipe("conv", Structure()), "is the conv as it is; leave it out"),
        (SiteRecipe("conv", Structure(None, 2, 8), True), "a shuffle is for a dense conv that becomes one"),
    ],
)
def test_wrong_sites_are_refused(site: SiteRecipe, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        restructure(CalledTwice(), [site])


def test_groups_that_a_conv_has_already_and_subclasses_are_refused() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), Own(8, 8, 1))
    with pytest.raises(ConversionError, match="is the conv as it is; leave it out"):
        restructure(net, [SiteRecipe("0", Structure(groups=2))])
    with pytest.raises(ConversionError, match=r"layer '1' cannot be replaced: a subclass of Conv2d \(Own\)"):
        restructure(net, [SiteRecipe("1", Structure(groups=2))])
