"""ONNX Runtime's own quantiser, run on one file, and what it fails on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime import quantization

from groupify.onnx.int8.ranges import Feed, Range


@dataclass(frozen=True)
class FloatNode:
    """A node that an int8 file computes in float32, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Quantiser:
    """Runs of ONNX Runtime's quantiser on one file.

    Attributes:
        path: the float file.
        graph: its graph.
        draft: the int8 file, overwritten by each run.
        reduced: whether weights get 7 bits.
        feed: a batch, for values of which no range is given.
        ranges: of the activations.
    """

    path: Path
    graph: onnx.GraphProto
    draft: Path
    reduced: bool
    feed: Feed
    ranges: Mapping[str, Range]

    def problem(self, *, without: Sequence[FloatNode], only: Sequence[str] | None = None) -> str | None:
        """Quantise all nodes but some, or only some; return what goes wrong, None if nothing does."""
        overrides = {
            name: [{"rmin": np.float32(low), "rmax": np.float32(high)}]
            for name, (low, high) in self.ranges.items()
        }
        try:
            with _quiet():
                quantization.quantize_static(
                    str(self.path),
                    str(self.draft),
                    _reader(self.feed),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    reduce_range=self.reduced,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    nodes_to_quantize=list(only or ()),
                    nodes_to_exclude=[node.name for node in without],
                    extra_options={"TensorQuantOverrides": overrides},
                )
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever numpy raises inside
            return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
        return None

    def culprits(self, *, without: Sequence[FloatNode]) -> tuple[FloatNode, ...]:
        """Return the nodes that the quantiser fails on, found by trying kinds of operators, then nodes."""
        left = {node.name for node in without}
        kinds: dict[str, list[str]] = {}
        for node in self.graph.node:
            if node.name not in left:
                kinds.setdefault(node.op_type, []).append(node.name)
        found: list[FloatNode] = []
        for names in kinds.values():
            problem = self.problem(without=without, only=names)
            if problem is not None:
                alone = {name: self.problem(without=without, only=[name]) for name in names}
                reasons = {name: reason for name, reason in alone.items() if reason is not None}
                found += [FloatNode(*pair) for pair in (reasons or dict.fromkeys(names, problem)).items()]
        return tuple(found)


def grouped_transposed(graph: onnx.GraphProto) -> tuple[FloatNode, ...]:
    """Return the transposed convs in groups, which the quantiser would quantise wrongly or fail on."""
    # Its weight has the outputs of one group along the dimension of the scales, its bias those of all.
    reason = "ONNX Runtime's quantiser takes no transposed conv in groups"
    groups = {
        node.name: attribute.i
        for node in graph.node
        if node.op_type == "ConvTranspose"
        for attribute in node.attribute
        if attribute.name == "group"
    }
    return tuple(FloatNode(name, reason) for name, count in groups.items() if count > 1)


def _reader(feed: Feed) -> Any:
    feeds = iter([dict(feed)])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(feeds, None)

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice, logged by the root logger, from the user."""
    root = logging.getLogger()
    refuse = _Refuse()
    root.addFilter(refuse)
    try:
        yield
    finally:
        root.removeFilter(refuse)


class _Refuse(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR
