"""Why a conv is left alone, and what would change that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from groupify.conversion.replaceable import LeftAlone, why_not_replaceable
from groupify.graph.plain_layers import Conv
from groupify.planning.rules import Rules
from groupify.planning.sites import conv_macs
from groupify.structures import Observed

# A conv that reads fewer channels than this (the image itself, as a rule) has next to nothing to gain.
_MIN_IN_CHANNELS = 8
# A strided 1×1 conv (the projection of a residual block's shortcut) with less than this share of the MACs
# stays dense: it lets the groups of one stage mix on the way to the next. Converting the demo's two, 1% of
# its MACs, costs 1.6 points of accuracy.
_SHORTCUT_SHARE = 0.01
_PATTERNS, _FEW_CHANNELS = "patterns", "few channels"
# Plain groups are not for such convs; factors for each of their groups may be.
GROUPED_ALREADY = "grouped"


def why_left_alone(
    name: str,
    conv: Conv,
    observed: Observed | None,
    is_first: bool,
    shared: Mapping[str, str],
    rules: Rules,
) -> LeftAlone | None:
    """Say why a conv is left alone whatever the number of groups, or return None.

    Args:
        name: its qualified name.
        conv: the conv.
        observed: what a forward pass showed of it; None where it did not run.
        is_first: whether no other runs before it.
        shared: reasons of the convs that share a weight.
        rules: which convs may be converted.
    """
    if not rules.allows(name):
        reason = "excluded" if rules.excludes(name) else "not included"
        return LeftAlone(_PATTERNS, reason, "leave --include and --exclude out, or give other patterns")
    return (
        why_not_replaceable(conv)
        or _why_not_its_use(name, observed, shared)
        or _why_it_does_not_pay(conv, is_first)
    )


def why_shortcut(conv: Conv, observed: Observed | None, total_macs: int, rules: Rules) -> LeftAlone | None:
    """Say why a shortcut that nothing else keeps dense had better stay so."""
    if rules.include or observed is None or max(conv.kernel_size) > 1 or max(conv.stride) == 1:
        return None
    if conv_macs(conv, observed) >= _SHORTCUT_SHARE * total_macs:
        return None
    reason = f"shortcut with under {_SHORTCUT_SHARE:.0%} of the MACs: lets the groups mix; see --include"
    return LeftAlone("shortcut", reason, "--include NAME converts it all the same")


def nothing_fits(reasons: Sequence[LeftAlone]) -> str:
    """Say in one line why no conv of a model is converted, most common causes first, and what to do.

    Args:
        reasons: one for each conv.
    """
    # What the user left out by a pattern explains nothing, unless there is nothing else.
    telling = [left for left in reasons if left.cause != _PATTERNS] or reasons
    counted = Counter(left.cause for left in telling).items()
    causes = sorted(counted, key=lambda item: (-item[1], item[0] == _FEW_CHANNELS))[:3]  # the stem comes last
    examples = [next(left for left in telling if left.cause == cause) for cause, _ in causes]
    shown = [f"{left.reason} ({count}×)" for left, (_, count) in zip(examples, causes, strict=True)]
    advice = next((f"; {left.advice}" for left in examples if left.advice), "")
    return f"no convolution worth grouping among the {len(reasons)} convs: {', '.join(shown)}{advice}"


def _why_not_its_use(name: str, observed: Observed | None, shared: Mapping[str, str]) -> LeftAlone | None:
    if name in shared:
        return LeftAlone("shared", shared[name], "give each layer a weight of its own")
    if observed is not None and observed.hindrance is not None:
        advice = "let the model call the layer itself, and do the rest in a module of its own"
        return LeftAlone("hindered", observed.hindrance, advice)
    if observed is None or observed.calls == 0:
        return LeftAlone("never runs", "never runs in inference", "give the part that runs in inference")
    return None


def _why_it_does_not_pay(conv: Conv, is_first: bool) -> LeftAlone | None:
    if conv.groups > 1 and conv.groups == conv.in_channels:
        return LeftAlone("depthwise", "depthwise already")
    if conv.in_channels < _MIN_IN_CHANNELS:
        first = "first conv: " if is_first else ""
        return LeftAlone(_FEW_CHANNELS, f"{first}too few input channels ({conv.in_channels})")
    if is_first:
        return LeftAlone("first", "first conv: it is always left alone")
    if conv.groups > 1:
        return LeftAlone(GROUPED_ALREADY, f"grouped already ({conv.groups} groups)")
    return None
