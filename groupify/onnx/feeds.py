"""Random inputs for any ONNX file, as its own graph describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from groupify.errors import GroupifyError

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def random_feed(
    session: Any, name: str, batch_size: int, input_shape: tuple[int, ...] | None, *, seed: int
) -> Mapping[str, npt.NDArray[Any]]:
    """Return random inputs of a session: standard normal numbers, pixels for bytes, zeros for other integers.

    Args:
        session: an ONNX Runtime session.
        name: what an error calls its file.
        batch_size: of every input whose first dimension is open.
        input_shape: of one image, for dimensions that the file leaves open; None where it leaves none.
        seed: of the numbers.

    Raises:
        GroupifyError: the file takes another batch size or shape, leaves a size open that nothing says, or
            takes inputs of a type that cannot be made up.
    """
    generator = np.random.default_rng(seed)
    feed = {}
    for source in session.get_inputs():
        kind = _TYPES.get(source.type)
        if kind is None:
            raise GroupifyError(
                f"{name!r} takes {source.type} as {source.name!r}: such inputs cannot be made up"
            )
        shape = _shape(source, name, batch_size, input_shape)
        feed[source.name] = _values(generator, shape, np.dtype(kind))
    return feed


def _shape(source: Any, name: str, batch_size: int, input_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    wanted = (batch_size, *(input_shape or source.shape[1:]))
    if not source.shape:
        return ()
    if isinstance(source.shape[0], int) and source.shape[0] != batch_size:
        raise GroupifyError(
            f"{name!r} takes batches of {source.shape[0]}, not {batch_size}: ask for that batch size, "
            "or export with a dynamic batch"
        )
    fits = len(wanted) == len(source.shape) and all(
        not isinstance(own, int) or own == size
        for own, size in zip(source.shape[1:], wanted[1:], strict=True)
    )
    if not fits:
        raise GroupifyError(f"{name!r} takes {source.name!r} of shape {source.shape}, not {list(wanted)}")
    if not all(isinstance(size, int) for size in wanted):
        raise GroupifyError(
            f"{name!r} takes {source.name!r} of shape {source.shape}, which leaves sizes open: give "
            "--input-size"
        )
    return wanted


def _values(generator: np.random.Generator, shape: tuple[int, ...], kind: np.dtype[Any]) -> npt.NDArray[Any]:
    if kind.kind == "f":
        return generator.standard_normal(shape, dtype=np.float32).astype(kind)
    if kind == np.uint8:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    return np.zeros(shape, kind)
