from __future__ import annotations

from typing import Any

import pytest
import torch

from groupify.decomposition.eigen import eigh


@pytest.mark.parametrize("shape", [(6, 6), (3, 6, 6)])
def test_what_divide_and_conquer_fails_on_is_solved_all_the_same(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = torch.randn(*shape[:-1], 2, generator=torch.Generator().manual_seed(0))
    matrices = factors @ factors.transpose(-1, -2)  # four eigenvalues are 0
    expected, _ = eigh(matrices)

    def fail(_: Any) -> Any:
        raise torch.linalg.LinAlgError("no convergence")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors = eigh(matrices)
    assert values.shape == shape[:-1]
    assert values.dtype == matrices.dtype
    assert torch.allclose(values, expected, atol=1e-5)
    assert torch.allclose(vectors * values.unsqueeze(-2) @ vectors.transpose(-1, -2), matrices, atol=1e-5)
