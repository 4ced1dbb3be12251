"""The MACs that plain groups would leave: what other structures are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from groupify.errors import PlanError
from groupify.graph.call import as_call, one_example
from groupify.models.wrappers import unwrapped
from groupify.planning.budget import MACS, Budget, Limit
from groupify.planning.group_counts import GroupCounts
from groupify.planning.observing import observe
from groupify.planning.rules import Rules
from groupify.planning.sites import conv_macs, find_convs
from groupify.planning.uniform import reasons_to_leave
from groupify.scores import measure_cost


def budget_like_groups(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    *,
    groups: int | Mapping[str, int] | GroupCounts,
    rules: Rules = Rules(),
    example_inputs: Any = None,
) -> Budget:
    """Return a limit on the MACs: those of plain groups in every conv whose channels they divide.

    Whether such groups are fast, or wide enough for a kernel, is not asked.

    Args:
        model: a dense model; left untouched.
        input_shape: (C, H, W) of one image, for a model of one input.
        groups: their number, or numbers by name as for ``plan``.
        rules: which convs may be converted; the others count as they are.
        example_inputs: in the place of ``input_shape``, what the model is called with; see ``plan``.

    Raises:
        PlanError: ``groups`` is below 2, or divides no conv; or a pattern matches none.
    """
    counts = GroupCounts.of(groups)
    model = unwrapped(model)
    call = as_call(one_example(input_shape, example_inputs), model, batch=1)
    observed, convs = observe(model, call), find_convs(model)
    rules.check_patterns(convs)
    counts.check_patterns(convs)
    saved = 0
    for name, why in reasons_to_leave(model, observed, rules).items():
        conv, count = convs[name], counts.of_conv(name)
        if why is None and conv.in_channels % count == conv.out_channels % count == 0:
            macs = conv_macs(conv, observed[name])
            saved += macs - macs // count
    if saved == 0:
        raise PlanError(f"{counts} groups divide the channels of no conv that may be converted; try 2")
    dense = measure_cost(model, call).macs
    return Budget((Limit(MACS, float(dense - saved), relative=False),))
