"""Whatever awkward pieces a net is made of, it converts to what its plain twin does, or is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from groupify.errors import GroupifyError
from tests.cases.awkward_nets import PIECES, Awkward, Plain, twins
from tests.cases.nets import EXACT, TOLERANCE, converted, noise, planned, relative_error
from tests.cases.small import PAIRS, TINY, Several

FIT = replace(EXACT, refresh_batch_norm=False)  # the statistics are not those of the images


def convert(net: nn.Module) -> nn.Module:
    images = noise(128, TINY)
    model = converted(net, images, plan=planned(net, TINY, PAIRS), fit=FIT).model
    assert torch.equal(images, noise(128, TINY)), "the images have changed"
    return model


def drawn(count: int, seed: int = 0) -> list[tuple[Awkward, Plain]]:
    """Random nets of one or two pieces, each with its twin; among them each piece at least once."""
    chance = random.Random(seed)
    first = [*PIECES, *chance.choices(list(PIECES), k=max(0, count - len(PIECES)))]
    names = [[name, *chance.choices(list(PIECES), k=chance.randrange(2))] for name in first[:count]]
    return [twins([(name, chance.randrange(42)) for name in some], chance.randrange(100)) for some in names]


def convert_side_by_side(nets: list[Plain]) -> list[nn.Module]:
    """Convert nets as one, since each conversion takes its time."""
    model = convert(Several({str(number): net for number, net in enumerate(nets)}).eval())
    assert isinstance(model, Several)
    return list(model.nets)


def is_converted(awkward: Awkward, plain: Plain, twin: nn.Module) -> bool:
    """Whether a net was converted, not refused; fails where it is not what the twin is, or the reason untrue.

    Args:
        awkward, plain: the net in both spellings.
        twin: the plain one, converted.
    """
    fresh = noise(8, TINY, 9)
    assert relative_error(awkward, plain, fresh) < 1e-5
    assert relative_error(twin, plain, fresh) < TOLERANCE
    try:
        ours = convert(awkward)
    except GroupifyError as refused:
        assert_true_reason(str(refused), awkward)
        return False
    assert relative_error(awkward, plain, fresh) < 1e-5, "the caller's model has changed"
    assert relative_error(ours, twin, fresh) < TOLERANCE
    return True


def assert_true_reason(text: str, net: Awkward) -> None:
    """Fail unless a refusal is one line with the words of a piece that may be refused."""
    assert "\n" not in text
    reasons = [piece.refusal() for _, piece, _ in net.pairs() if piece.refusal()]
    assert any(all(word in text for word in words) for words in reasons), text


def test_awkward_nets_convert_as_their_plain_twins_do() -> None:
    outcomes = []
    for start in range(0, len(pairs := drawn(20)), 6):
        some = pairs[start : start + 6]
        converted_twins = convert_side_by_side([plain for _, plain in some])
        for (awkward, plain), twin in zip(some, converted_twins, strict=True):
            outcomes.append(is_converted(awkward, plain, twin))
    assert sum(outcomes) >= 0.8 * len(outcomes)


@pytest.mark.parametrize("number", range(3))
def test_a_net_that_cannot_be_converted_is_refused_with_the_true_reason(number: int) -> None:
    awkward, plain = twins([("Unfit", number)], seed=0)
    assert not is_converted(awkward, plain, plain)
