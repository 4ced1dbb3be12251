from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from groupify.machine import chunks


@given(sizes=st.lists(st.integers(0, 20)), limit=st.integers(1, 30))
def test_parts_keep_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    parts = list(chunks(sizes, float, limit))
    assert [size for part in parts for size in part] == sizes
    assert all(len(part) == 1 or 0 < sum(part) <= limit or not any(part) for part in parts)
    # No part could have taken the first item of the next one.
    assert all(sum(part) + following[0] > limit for part, following in pairwise(parts))
