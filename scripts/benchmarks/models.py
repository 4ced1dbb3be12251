"""What becomes of other people's models: all of torchvision's, and those of other libraries in ``zoo``.

    python -m scripts.benchmarks.models timm                  # all that benchmarks/models_timm.json lacks
    python -m scripts.benchmarks.models timm --only 'res*' --again
    python -m scripts.benchmarks.models timm --until convert --folder elsewhere

Each model goes through the whole way (``whole_way``) in a process of its own, with limits on its time and
memory, so that none can stop the others. A result file is written after each model, and an interrupted run
goes on where it stopped. The result "failed" is a fault of ours; the others are answers.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from scripts.benchmarks.harness import Results, matches
from scripts.benchmarks.tables import BENCHMARKS
from scripts.benchmarks.whole_way import GROUPS, IMAGES, MIN_GROUP_WIDTH, STAGES, Row, take
from scripts.benchmarks.zoo import LIBRARIES, Entry, entries

SETTING = {"groups": GROUPS, "min_group_width": MIN_GROUP_WIDTH, "calibration_images": IMAGES}
_GOODBYE = 10  # seconds for a process to end by itself
_IMPORTED = (
    "scripts.benchmarks.whole_way", "onnxscript", "torch.export", "torch._dynamo",
    "torch._decomp.decompositions", "torch.onnx._internal.exporter", "timm", "transformers",
    "segmentation_models_pytorch", "monai.networks.nets", "efficientnet_pytorch",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one model may take: CPU seconds, of the clock five times as many, and GiB."""

    seconds: int
    memory: float

    def set(self) -> None:
        """Apply them to this process."""
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_CPU, (self.seconds, self.seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (int(self.memory * 2**30),) * 2)


def main() -> None:
    """Parse, then run what is missing."""
    arguments = _parser().parse_args()
    apart = Apart(Limits(arguments.limit, arguments.memory), arguments.until)
    start = time.monotonic()
    for library in arguments.libraries or LIBRARIES:
        path = arguments.folder / f"models_{library}.json"
        results = Results(Row, ("name",), path, SETTING, order=lambda row: row.name, again=arguments.again)
        for name, entry in entries(library).items():
            late = arguments.stop_after is not None and time.monotonic() - start > arguments.stop_after
            if late or not matches(name, arguments.only) or results.known(name) is not None:
                continue
            row = apart(entry)
            results.put(row)
            print(
                f"{name}: {row.result}, {row.seconds:.0f} s {row.reason or ''}", file=sys.stderr, flush=True
            )
        print(library, dict(Counter(row.result for row in results.rows.values())))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"of {', '.join(LIBRARIES)}")
    parser.add_argument("--only", metavar="GLOB|GLOB…", default="*", help="models by name")
    parser.add_argument("--again", action="store_true", help="run models anew that the file holds")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="stop behind this stage")
    parser.add_argument("--folder", type=Path, default=BENCHMARKS, help="of the result files")
    parser.add_argument("--limit", type=int, default=600, help="CPU seconds for a model (%(default)s)")
    parser.add_argument("--memory", type=float, default=16, help="GiB for a model (%(default)s)")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="start no model later")
    return parser


class Apart:
    """Runs models each in a process of its own, forked from one that has the libraries imported.

    Args:
        limits: of each process.
        until: the stage to stop behind.
    """

    def __init__(self, limits: Limits, until: str = STAGES[-1]) -> None:
        self.limits, self.until = limits, until
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([name for name in _IMPORTED if find_spec(name.split(".")[0])])

    def __call__(self, entry: Entry) -> Row:
        """Take one model through its way."""
        ours, its = self._context.Pipe()
        process = self._context.Process(target=_child, args=(its, entry, self.until, self.limits))
        process.start()
        its.close()
        try:
            if ours.poll(5 * self.limits.seconds):
                row: Row = ours.recv()
                process.join(_GOODBYE)
                return row
            reason = f"hung: more than {5 * self.limits.seconds} seconds"
        except EOFError:
            process.join()
            reason = self._death(process.exitcode)
        finally:
            process.kill()
            process.join()
        return Row(entry.name, entry.kind, reason=reason)

    def _death(self, exit_code: int | None) -> str:
        if exit_code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"more than {self.limits.seconds} CPU seconds, or killed"
        return f"died with exit code {exit_code}, perhaps of more than {self.limits.memory:g} GiB"


def _child(its: Connection, entry: Entry, until: str, limits: Limits) -> None:
    limits.set()
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        its.send(take(entry, until))


if __name__ == "__main__":
    main()
