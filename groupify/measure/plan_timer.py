"""The latency of whole converted models, measured beside the dense one.

A latency table adds up single convs, which is right within a tenth or two: a limit is held by the whole plan.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from groupify.files import NumberCache, cache_folder, fingerprint
from groupify.measure.benchmarks import SESSIONS, speed_ups
from groupify.measure.latency_table import machine_fingerprint, network_fingerprint
from groupify.measure.timed_files import DenseFiles, TimeFiles, share_of_dense
from groupify.structures import Choices, Plan


class PlanTimer:
    """Times plans in ONNX Runtime on this machine; it keeps the times in the cache folder.

    Plans and the dense model run in the precision that the plans are for.

    The models have truncated weights: latency does not depend on them.

    Args:
        model: the dense model; left untouched.
        choices: its convs, its input shape and the precision.
        dense_ms: latency of the dense model, which the times are relative to.
        threads: intra-op threads.
        cache: folder; None = the user's.
        progress: show a bar on stderr.
        time_files: returns by how much files are faster than one of them.
    """

    def __init__(
        self,
        model: nn.Module,
        choices: Choices,
        dense_ms: float,
        *,
        threads: int = 1,
        cache: Path | None = None,
        progress: bool = False,
        time_files: TimeFiles = speed_ups,
    ) -> None:
        self._time_files = time_files
        self._model, self._precision = model, choices.precision
        self._dense = DenseFiles(model, choices.input_shape)
        self._dense_ms = dense_ms
        self._threads = threads
        self._progress = progress
        network = network_fingerprint(model, choices, choices.precision)
        name = fingerprint((machine_fingerprint(threads), network, f"{SESSIONS} sessions"))
        self._shares = NumberCache((cache or cache_folder()) / f"plans-{name}.json")

    def __call__(self, plan: Plan) -> float:
        """Return the latency of a plan, milliseconds for one image.

        Raises:
            GroupifyError: the model cannot be exported, or ONNX Runtime refuses it.
        """
        return self._kept(plan, "")

    def again(self, plan: Plan) -> float:
        """Return the latency of a plan from a measurement of its own.

        Raises:
            GroupifyError: as above.
        """
        return self._kept(plan, ", again")

    def _kept(self, plan: Plan, which: str) -> float:
        key = fingerprint(map(repr, plan.recipes)) + which
        if key not in self._shares.numbers:
            self._shares.add({key: self._measure(plan)})
        return self._shares.numbers[key] * self._dense_ms

    def _measure(self, plan: Plan) -> float:
        return share_of_dense(
            self._model, self._dense[self._precision], plan, threads=self._threads, progress=self._progress,
            time_files=self._time_files,
        )  # fmt: skip
