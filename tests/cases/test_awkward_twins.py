"""Whatever awkward pieces a net is made of, it converts to what its plain twin does, or is refused."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from groupify.errors import GroupifyError
from tests.cases.awkward_nets import PIECES, Chain, Step, twins
from tests.cases.nets import EXACT, TOLERANCE, converted, noise, planned, relative_error
from tests.cases.small import PAIRS, TINY

FIT = replace(EXACT, refresh_batch_norm=False)  # the statistics are not those of the images
steps = st.lists(st.tuples(st.sampled_from(sorted(PIECES)), st.integers(0, 41)), min_size=1, max_size=3)


def convert(net: Chain) -> torch.nn.Module:
    images = noise(32, TINY)
    model = converted(net, images, plan=planned(net, TINY, PAIRS), fit=FIT).model
    assert torch.equal(images, noise(32, TINY)), "the images have changed"
    return model


def check(plan: list[Step], seed: int) -> bool:
    """Whether the awkward net was converted, not refused; fails where its conversion is not the twin's."""
    awkward, plain = twins(plan, seed)
    fresh = noise(8, TINY, 9)
    assert relative_error(awkward, plain, fresh) < 1e-5
    model = convert(plain)
    assert relative_error(model, plain, fresh) < TOLERANCE
    try:
        ours = convert(awkward)
    except GroupifyError as refused:
        text = str(refused)
        assert text
        assert "\n" not in text
        return False
    assert relative_error(awkward, plain, fresh) < 1e-5, "the caller's model has changed"
    assert relative_error(ours, model, fresh) < TOLERANCE
    return True


def share_converted(examples: int) -> float:
    outcomes: list[bool] = []

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),  # shrinking takes minutes
    )  # fmt: skip
    @given(plan=steps, seed=st.integers(0, 99))
    def each(plan: list[Step], seed: int) -> None:
        outcomes.append(check(plan, seed))

    each()
    return sum(outcomes) / len(outcomes)


def test_awkward_nets_convert_as_their_plain_twins_do() -> None:
    assert share_converted(8) >= 0.8
