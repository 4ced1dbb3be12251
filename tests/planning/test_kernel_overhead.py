from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupify.measure.kernel_overhead import Alone, Replaced, find_overhead

MILLISECONDS = st.floats(0.01, 1.0)  # of a kernel of the dense network
THIN = st.floats(0.2, 0.9)  # a kernel of what replaces it, as a share of that
CONVS = st.lists(st.tuples(MILLISECONDS, THIN, st.integers(1, 4), st.floats(0.5, 2.0)), min_size=1)


@given(st.floats(0.0, 0.005), CONVS)
def test_the_overhead_of_times_that_have_one_is_found(
    overhead: float, convs: list[tuple[float, float, int, float]]
) -> None:
    def alone(milliseconds: float, kernels: int) -> Alone:
        return Alone(kernels * (milliseconds + overhead), kernels)

    replaced = [
        Replaced(speed * dense, alone(dense, 1), alone(thin * dense, kernels))
        for dense, thin, kernels, speed in convs
    ]
    total = sum(speed * kernels * thin * dense for dense, thin, kernels, speed in convs)
    found = find_overhead(replaced, total)
    assert sum(conv.predicted_ms(found) for conv in replaced) == pytest.approx(total, rel=1e-6)


def test_a_replacement_takes_the_share_of_its_conv() -> None:
    conv = Replaced(6.0, Alone(4.0, 1), Alone(2.5, 3))
    assert conv.predicted_ms(0.0) == pytest.approx(6 * 2.5 / 4)
    assert conv.predicted_ms(0.5) == pytest.approx(6 * 1.0 / 3.5)
    # However large an overhead is said to be, a conv takes time.
    assert conv.predicted_ms(3.0) > 0
    assert Replaced(6.0, Alone(0.0, 1), Alone(0.0, 1)).predicted_ms(0.5) == 6


def test_without_replacements_there_is_nothing_to_tell_an_overhead_by() -> None:
    assert find_overhead([], 1.0) == 0


def test_an_overhead_stays_below_the_shortest_kernel() -> None:
    convs = [Replaced(4.0, Alone(4.0, 1), Alone(3.0, 3))]
    assert 0.9 < find_overhead(convs, 0.0) < 1.0
