from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from groupify.conversion.surgery import restructure
from groupify.errors import ConversionError, PlanError
from groupify.graph.call import example_input
from groupify.planning.group_counts import GroupCounts
from groupify.planning.observing import observe
from groupify.planning.rules import Rules
from groupify.planning.sites import describe
from groupify.planning.uniform import plan, plan_observed
from groupify.scores import conv_params, measure_cost
from groupify.structures import GROUPED, GROUPED_POINTWISE, Change, Plan, SitePlan, SiteRecipe, Structure


def stem(channels: int) -> nn.Conv2d:
    """A first conv, which every plan leaves alone."""
    return nn.Conv2d(3, channels, 1)


def behind_stem(conv: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(stem(channels), conv)


def planned(model: nn.Module, shape: tuple[int, ...], *, groups: int, **options: Any) -> Plan:
    """What the rules say, of any width unless asked otherwise; without what is added of latencies."""
    rules = Rules(**{"min_group_width": 1, "cpu": "avx512", **options})
    observed = observe(model, example_input(shape, like=model))
    return plan_observed(model, observed, shape, groups=GroupCounts.of(groups), rules=rules)


def only_site(model: nn.Module, groups: int, size: int = 8, **options: Any) -> SitePlan:
    """The plan of the conv behind the stem."""
    return planned(model, (3, size, size), groups=groups, **options).sites[1]


def reason_of(conv: nn.Conv2d, groups: int = 2, **options: Any) -> str | None:
    """Why a conv is not converted as asked; another one keeps the plan from being refused."""
    last = nn.Conv2d(64, 64, 1)
    model = nn.Sequential(stem(conv.in_channels), conv, nn.Conv2d(conv.out_channels, 64, 1), last)
    return only_site(model, groups, **options).reason


def torch_macs(model: nn.Module, example: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(example)
    return int(counter.get_total_flops()) // 2


# ---- counted by hand


def test_hand_counted_conv() -> None:
    """8 → 6 channels, 1×1, 2 groups: 6 × 8/2 = 24 weights and 6 biases; 24 MACs at each position."""
    model = behind_stem(nn.Conv2d(8, 6, 1), 8)
    result = planned(model, (3, 5, 7), groups=2)
    site = result.sites[1]
    assert (site.groups_before, site.groups, site.structure, site.reason) == (1, 2, Structure(groups=2), None)
    assert site.params == Change(48 + 6, 24 + 6)
    assert site.macs == Change(48 * 35, 24 * 35)
    assert site.output_size == (5, 7)
    assert site.group_width == 3
    assert result.params == Change(32 + 54, 32 + 30)
    assert result.macs == Change((24 + 48) * 35, (24 + 24) * 35)
    converted = restructure(model, result.recipes).get_submodule("1")
    assert isinstance(converted, nn.Conv2d)
    assert converted.weight.numel() == 24
    assert converted.bias is not None
    assert converted.bias.numel() == 6
    assert converted(torch.zeros(1, 8, 5, 7)).shape == (1, 6, 5, 7)


def test_stride_dilation_padding() -> None:
    """3×3, stride (2, 1), dilation 2, at 12×12: (12 - 5) // 2 + 1 = 4 rows, 12 - 4 = 8 columns."""
    conv = nn.Conv2d(8, 16, 3, stride=(2, 1), dilation=2, bias=False)
    site = only_site(behind_stem(conv, 8), 4, size=12)
    assert (site.output_size, site.stride, site.kernel_size) == ((4, 8), (2, 1), (3, 3))
    assert site.params == Change(8 * 16 * 9, 2 * 16 * 9)
    assert site.macs == Change(8 * 16 * 9 * 32, 2 * 16 * 9 * 32)
    assert site.params.ratio == 4


def test_grouped_pointwise() -> None:
    """8 groups of a 3×3 conv and a dense 1×1 conv, which has the bias."""
    conv = nn.Conv2d(32, 16, 3, padding=1)
    site = only_site(behind_stem(conv, 32), 8, structures=("grouped-pointwise",))
    assert (site.structure, site.groups, site.reason) == (Structure(None, 8, 16), 8, None)
    assert site.params == Change(32 * 16 * 9 + 16, 32 // 8 * 16 * 9 + 16 * 16 + 16)
    assert site.macs == Change(32 * 16 * 9 * 64, (32 // 8 * 16 * 9 + 16 * 16) * 64)


def test_a_shared_conv_counts_its_weights_once_and_its_work_twice() -> None:
    shared = nn.Conv2d(8, 8, 1, bias=False)
    model = nn.Sequential(stem(8), shared, nn.ReLU(), shared)
    result = planned(model, (3, 4, 4), groups=2)
    assert [site.name for site in result.sites] == ["0", "1"]
    assert result.sites[1].params == Change(64, 32)
    assert result.sites[1].macs == Change(2 * 64 * 16, 2 * 32 * 16)
    converted = restructure(model, result.recipes)
    assert converted.get_submodule("1") is converted.get_submodule("3")
    assert torch_macs(converted, torch.zeros(1, 3, 4, 4)) == result.macs.grouped


def test_cost_of_a_model_by_hand() -> None:
    """Two convs, a batch norm (its counter has 8 bytes) and a linear."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, 5)
    )
    cost = measure_cost(model, torch.zeros(1, 3, 4, 4))
    assert cost.params == 108 + 8 + 10 + 45
    assert cost.macs == 108 * 4 + 8 * 4 + 40
    assert cost.weight_bytes == 4 * (171 + 8) + 8
    # At the first conv: the image (48) and its output (16). No later pair is larger, but the image stays.
    assert cost.activation_bytes == 4 * (48 + 16 + 16)


def test_a_conv_of_nothing_has_no_ratio() -> None:
    assert math.isnan(Change(1, 0).ratio)


# ---- what is left alone, and why


def test_first_conv() -> None:
    result = planned(nn.Sequential(stem(8), nn.Conv2d(8, 8, 1)), (3, 4, 4), groups=2)
    assert result.sites[0].reason == "first conv: too few input channels (3)"
    assert result.sites[0].groups == 1
    assert result.converted == result.sites[1:]
    wide = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1))
    assert planned(wide, (64, 4, 4), groups=2).sites[0].reason == "first conv: it is always left alone"


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "grouped already (2 groups)"),
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise already"),
        (nn.Conv2d(8, 16, 3, groups=8), "depthwise already"),
        (nn.Conv2d(6, 8, 1), "too few input channels (6)"),
        (nn.Conv2d(9, 15, 1), "no number of groups from 2 to 2 divides 9 → 15 channels"),
        (nn.Conv2d(8, 1, 1), "no number of groups from 2 to 2 divides 8 → 1 channels"),
        (parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), "its weight is parametrized"),
        (parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)), "its weight is parametrized"),
    ],
)
def test_left_alone(conv: nn.Conv2d, reason: str) -> None:
    found = reason_of(conv)
    assert found is not None
    assert found.startswith(reason)


def test_old_weight_norm() -> None:
    """The deprecated form sets the weight before each pass, so a new weight would be overwritten."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        conv = nn.utils.weight_norm(nn.Conv2d(8, 8, 1))
    assert (reason_of(conv) or "").startswith("its weight is parametrized")


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        doubled: Tensor = 2 * super().forward(input)
        return doubled


def test_subclass() -> None:
    assert reason_of(Scaled(8, 8, 1)) == "a subclass of Conv2d (Scaled), whose forward may differ"


def test_a_conv_that_never_runs_comes_last() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.training_only = nn.Conv2d(8, 8, 3)
            self.stem = stem(8)
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            branch = self.training_only if self.training else self.conv
            features: Tensor = branch(self.stem(x))
            return features

    model = Net().train()
    result = planned(model, (3, 4, 4), groups=2)
    assert [site.name for site in result.sites] == ["stem", "conv", "training_only"]
    left = result.sites[2]
    assert (left.reason, left.output_size, left.macs) == ("never runs in inference", (), Change(0, 0))
    assert left.params == Change(8 * 8 * 9 + 8, 8 * 8 * 9 + 8)
    assert model.training  # put back


def test_no_skipped_site_is_dropped() -> None:
    model = nn.Sequential(stem(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 9, 1))
    result = planned(model, (3, 8, 8), groups=2)
    assert [site.name for site in result.sites] == ["0", "1", "2", "3"]
    assert all((site.reason is None) == site.converted for site in result.sites)


def test_the_model_is_left_untouched() -> None:
    model = behind_stem(nn.Conv2d(8, 8, 1), 8)
    model.append(nn.BatchNorm2d(8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    plan(model, (3, 4, 4), groups=2, rules=Rules(min_group_width=1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


# ---- patterns


def four_convs() -> nn.Module:
    model = nn.Sequential()
    model.add_module("stem", stem(8))
    for name in ("a1", "a2", "b"):
        model.add_module(name, nn.Conv2d(8, 8, 1))
    return model


@pytest.mark.parametrize(
    ("include", "exclude", "converted"),
    [
        ((), (), ["a1", "a2", "b"]),
        (("a*",), (), ["a1", "a2"]),
        (("a1", "b"), (), ["a1", "b"]),
        ((), ("a?",), ["b"]),
        (("a*",), ("*2",), ["a1"]),
    ],
)
def test_patterns(include: tuple[str, ...], exclude: tuple[str, ...], converted: list[str]) -> None:
    result = planned(four_convs(), (3, 4, 4), groups=2, include=include, exclude=exclude)
    assert [site.name for site in result.converted] == converted
    reasons = {site.reason for site in result.sites if not site.converted and site.name != "stem"}
    assert reasons <= {"not included", "excluded"}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(option: str) -> None:
    with pytest.raises(PlanError, match=r"pattern 'a3' matches no conv .*; did you mean 'a2' or 'a1'\?"):
        planned(four_convs(), (3, 4, 4), groups=2, **{option: ("b", "a3")})
    with pytest.raises(PlanError, match=r"pattern 'zzz' matches no conv .*; for example 'stem'"):
        planned(four_convs(), (3, 4, 4), groups=2, **{option: ("zzz",)})


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups is 0; expected at least 2"),
        ({"groups": -1}, "groups is -1; expected at least 2"),
        ({"groups": 1}, "groups is 1, which leaves the model dense"),
        ({"groups": 2, "structures": ["group"]}, "unknown structure 'group'.*did you mean 'grouped'"),
        ({"groups": 2, "structures": []}, "structures is empty"),
        (
            {"groups": 2, "structures": (GROUPED, GROUPED_POINTWISE)},
            "structures are grouped, grouped-pointwise: .* takes grouped or grouped-pointwise; give one",
        ),
        ({"groups": 2, "shuffle": "some"}, "unknown shuffle 'some'"),
        ({"groups": 2, "shuffle": "all", "structures": "grouped-pointwise"}, "mixes the groups already"),
        ({"groups": 2, "min_group_width": 0}, "min_group_width is 0"),
        (
            {"groups": 2, "min_group_width": "wide"},
            "min_group_width is 'wide', expected 'auto' or",
        ),
        (
            {"groups": 2, "min_group_width": 5},
            r"among the 4 convs: groups narrower than 5 channels .* \(3×\).*; --min-group-width 4 or less",
        ),
        # What a pattern leaves out is no explanation.
        (
            {"groups": 2, "include": ("stem",)},
            r"among the 4 convs: first conv: too few input channels \(3\) \(1×\)$",
        ),
        ({"groups": 2, "exclude": ("*",)}, r"excluded \(4×\); leave --include and --exclude out"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(four_convs(), (3, 4, 4), **options)


def test_no_convs() -> None:
    with pytest.raises(PlanError, match="the model has no conv layer"):
        planned(nn.Flatten(), (3, 4, 4), groups=2)


def test_wrong_input_shape() -> None:
    with pytest.raises(ConversionError, match=r"does not run on an input of shape \(1, 4, 8, 8\)"):
        planned(four_convs(), (4, 8, 8), groups=2)


# ---- the number of groups

FAST: dict[str, Any] = {"min_group_width": "auto"}
NARROWER = "clamped: groups narrower than 16 channels are slower"
BETWEEN = "clamped: only widths that are multiples of 16 run in the fast kernel"
SLOWER = "slower kernel: no width is a multiple of 16"


@pytest.mark.parametrize(
    ("sizes", "groups", "options", "chosen", "reason"),
    [
        ((64, 64), 4, {}, 4, None),
        ((36, 24), 8, {}, 6, "clamped: 8 groups do not divide 36 → 24 channels"),
        ((64, 64), 10**12, {}, 64, "clamped: 1000000000000 groups do not divide 64 → 64 channels"),
        ((64, 64), 8, {"min_group_width": 16}, 4, NARROWER),
        ((64, 128), 8, {"min_group_width": 16}, 4, NARROWER),
        ((128, 256), 8, FAST, 8, None),
        ((128, 256), 16, FAST, 8, NARROWER),
        # 96/4 = 24 is no multiple of 16, 96/3 = 32 is one; the same for the outputs alone.
        ((96, 96), 4, FAST, 3, BETWEEN),
        ((96, 192), 4, FAST, 3, BETWEEN),
        ((192, 96), 4, FAST, 3, BETWEEN),
        # No width is a multiple: as many groups as their width allows, and the kernel is named.
        ((72, 72), 4, FAST, 4, SLOWER),
        ((72, 72), 8, FAST, 4, f"{NARROWER}; {SLOWER}"),
        ((72, 72), 8, {**FAST, "cpu": "avx2"}, 3, "clamped: only widths that are multiples of 8 run in the "
                                                  "fast kernel"),
        ((36, 36), 8, {**FAST, "cpu": "avx2"}, 4, "clamped: groups narrower than 8 channels are slower; "
                                                  "slower kernel: no width is a multiple of 8"),
    ],
)  # fmt: skip
def test_number_of_groups(
    sizes: tuple[int, int], groups: int, options: dict[str, Any], chosen: int, reason: str | None
) -> None:
    model = behind_stem(nn.Conv2d(*sizes, 1), sizes[0])
    site = only_site(model, groups, size=32, **options)
    assert (site.groups, site.reason) == (chosen, reason)


def test_too_few_channels_for_the_width() -> None:
    reason = reason_of(nn.Conv2d(24, 64, 1), **FAST)
    assert reason == "groups narrower than 16 channels are slower; 24 → 64 channels are too few"


def test_grouped_pointwise_is_left_out_where_it_does_not_pay() -> None:
    model = nn.Sequential(stem(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 64, 3))
    sites = planned(model, (3, 8, 8), groups=2, structures=("grouped-pointwise",)).sites
    assert sites[1].reason == "a 1×1 conv costs less than a grouped conv and a pointwise conv"
    assert sites[2].reason == "2 groups and a pointwise conv would cost more than this conv"
    assert sites[3].structure == Structure(None, 2, 64)


@given(
    in_channels=st.integers(8, 96),
    out_channels=st.integers(1, 96),
    groups=st.integers(2, 200),
    width=st.sampled_from(["auto", *range(1, 21)]),
    cpu=st.sampled_from(["avx2", "avx512"]),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    structure=st.sampled_from([GROUPED, GROUPED_POINTWISE]),
)
@settings(max_examples=60, deadline=None)
def test_every_plan_keeps_its_rules_and_its_counts_are_torch_s(
    in_channels: int,
    out_channels: int,
    groups: int,
    width: int | str,
    cpu: str,
    kernel: int,
    stride: int,
    bias: bool,
    structure: str,
) -> None:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, bias=bias)
    model = behind_stem(conv, in_channels)
    rules = Rules(min_group_width=width, cpu=cpu, structures=structure)
    width = rules.narrowest
    try:
        result = plan(model, (3, 5, 5), groups=groups, rules=rules)
    except PlanError as error:
        if "would be slower" in str(error):
            assert rules.block > 1
            return
        common = math.gcd(in_channels, out_channels)
        narrow = min(in_channels, out_channels)
        fitting = [d for d in range(2, groups + 1) if common % d == 0 and narrow >= width * d]
        assert structure == "grouped-pointwise" or not fitting
        return
    site = result.sites[1]
    assert 2 <= site.groups <= groups
    assert in_channels % site.groups == 0
    assert out_channels % site.groups == 0
    assert site.group_width >= width
    assert (site.groups == groups) or site.reason is not None
    converted = restructure(model, result.recipes)
    example = torch.zeros(1, 3, 5, 5)
    assert sum(parameter.numel() for parameter in converted.parameters()) == result.params.grouped
    assert sum(parameter.numel() for parameter in model.parameters()) == result.params.dense
    assert torch_macs(converted, example) == result.macs.grouped
    assert torch_macs(model, example) == result.macs.dense
    assert result.params.grouped < result.params.dense
    assert measure_cost(converted, example).macs == result.macs.grouped


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_conv_params_are_torch_s(a: int, b: int, groups: int, kernel: int, bias: bool) -> None:
    sizes = (a * groups, b * groups, (kernel, 2))
    conv = nn.Conv2d(*sizes, groups=groups, bias=bias, device="meta")
    assert conv_params(*sizes, groups, bias) == sum(parameter.numel() for parameter in conv.parameters())


# ---- a plan from a recipe


def test_describe_is_the_plan_again() -> None:
    model = four_convs()
    made = planned(model, (3, 4, 4), groups=4, shuffle="all", exclude=("b",))
    told = describe(model, made.recipes, (3, 4, 4), "any")
    assert (
        told.recipes
        == made.recipes
        == (
            SiteRecipe("a1", Structure(groups=4), shuffle=True),
            SiteRecipe("a2", Structure(groups=4), shuffle=True),
        )
    )
    assert isinstance(told, Plan)
    assert (told.params, told.macs, told.groups) == (made.params, made.macs, 4)
    assert told.cpu == "any"
    assert told.sites[3].reason == "left alone by the recipe"


def test_a_cheap_projection_shortcut_stays_dense_unless_included() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 1, stride=2)
    )
    # 64·64·14² of about 32·64·9·28² MACs: 5%.
    costly = planned(net, (3, 28, 28), groups=4)
    assert costly.sites[2].groups == 4
    net[2] = nn.Conv2d(64, 8, 1, stride=2)  # 0.6%
    cheap = planned(net, (3, 28, 28), groups=4)
    assert (cheap.sites[2].structure, cheap.sites[2].converted) == (Structure(), False)
    assert "lets the groups mix" in (cheap.sites[2].reason or "")
    assert planned(net, (3, 28, 28), groups=4, include=["*"]).sites[2].groups == 4
    net[2] = nn.Conv2d(64, 8, 1)  # not strided: no shortcut
    assert planned(net, (3, 28, 28), groups=4).sites[2].groups == 4
