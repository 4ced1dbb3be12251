from __future__ import annotations

from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groupify.stats.positions import compact, input_patches, pick, sample_positions
from tests.conversion.nets import images, randomise

kernels = st.tuples(st.integers(1, 4), st.integers(1, 4))
pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))
Mode = Literal["zeros", "reflect", "circular", "replicate"]
modes: st.SearchStrategy[Mode] = st.sampled_from(get_args(Mode))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=80, deadline=None)
@given(
    kernel=kernels,
    stride=pairs,
    dilation=pairs,
    padding=st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])),
    mode=modes,
    count=st.integers(1, 200),
)
def test_patches_times_weight_is_the_output(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int] | str,
    mode: Mode,
    count: int,
) -> None:
    if padding == "same":
        stride = (1, 1)
    conv = nn.Conv2d(
        2, 3, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode, bias=False
    )
    randomise(conv)
    x = images(3, (2, 9, 8))
    with torch.no_grad():
        outputs = conv(x)
        positions = sample_positions(outputs.shape, count, torch.Generator().manual_seed(0))
        patches = input_patches(x, conv, positions)
        expected = pick(outputs, positions)
        actual = patches.flatten(1) @ conv.weight.flatten(1).T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_patches_of_a_linear_layer_are_its_inputs() -> None:
    linear = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    positions = sample_positions(torch.Size((5, 3)), 5, torch.Generator(), channels_last=True)
    assert torch.equal(input_patches(x, linear, positions), x.unsqueeze(-1))


def test_a_linear_layer_over_places() -> None:
    linear = randomise(nn.Linear(4, 3, bias=False))
    x = images(2, (5, 6, 4))
    with torch.no_grad():
        outputs = linear(x)
        positions = sample_positions(outputs.shape, 20, torch.Generator().manual_seed(0), channels_last=True)
        assert len(positions) == 20
        torch.testing.assert_close(
            input_patches(x, linear, positions).flatten(1) @ linear.weight.T, pick(outputs, positions)
        )


@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from([1, 3]),
    kernel=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    stride=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    dilation=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    padding=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    same=st.booleans(),
    mode=st.sampled_from(["zeros", "circular", "replicate"]),
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_patches_in_one_and_three_dimensions(
    dims: int,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    padding: list[int],
    same: bool,
    mode: Mode,
) -> None:
    kind: Any = nn.Conv1d if dims == 1 else nn.Conv3d
    options: dict[str, Any] = {"padding": "same"} if same else {
        "padding": tuple(padding[:dims]), "stride": tuple(stride[:dims])
    }  # fmt: skip
    conv = kind(
        2, 3, tuple(kernel[:dims]), dilation=tuple(dilation[:dims]), padding_mode=mode, bias=False, **options
    )
    randomise(conv)
    x = images(3, (2, 7, 6, 5)[: dims + 1])
    with torch.no_grad():
        outputs = conv(x)
        positions = sample_positions(outputs.shape, 60, torch.Generator().manual_seed(0))
        actual = input_patches(x, conv, positions).flatten(1) @ conv.weight.flatten(1).T
        torch.testing.assert_close(actual, pick(outputs, positions), rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(
    n=st.integers(1, 5), height=st.integers(1, 7), width=st.integers(1, 7), count=st.integers(1, 300),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_positions_are_distinct_and_spread_over_the_images(
    n: int, height: int, width: int, count: int, seed: int
) -> None:
    shape = torch.Size((n, 2, height, width))
    positions = sample_positions(shape, count, torch.Generator().manual_seed(seed))
    rows, columns = positions.place
    places = set(zip(positions.image.tolist(), rows.tolist(), columns.tolist(), strict=True))
    assert len(places) == len(positions) == min(count, n * height * width)
    assert all(0 <= i < n and 0 <= r < height and 0 <= c < width for i, r, c in places)
    if count >= 2 * n:  # ranges as short as half an image: none can be passed over
        assert {i for i, _, _ in places} == set(range(n))


def test_compact_keeps_what_half_precision_cannot_hold() -> None:
    assert compact(torch.ones(3)).dtype == torch.float16
    assert compact(torch.tensor([1e5])).dtype == torch.float32
    assert compact(torch.ones(3, dtype=torch.float64)).dtype == torch.float64
    assert compact(torch.zeros(0)).numel() == 0
