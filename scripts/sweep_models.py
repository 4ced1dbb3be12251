"""Every model of torchvision through the whole way: plan, convert, save, load, forward, ONNX, ONNX Runtime.

Each model runs in a process of its own, with random weights, a handful of noise images for the fit, batch 1
and the smallest input that works: this checks that the way is passable, not that accuracy survives. What is
done is kept in the JSON file after each model, so that an interrupted sweep goes on where it stopped.

    python -m scripts.sweep_models                     # all that is not in docs/models.json yet
    python -m scripts.sweep_models --again 'resnet*'   # these anew
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models import get_model_builder, get_model_weights, list_models

import groupify
from groupify.conversion.by_part import refresh_batch_norms
from groupify.conversion.conversion import Calibration, convert
from groupify.errors import GroupifyError, PlanError
from groupify.files import write_aside
from groupify.models.specs import Source
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from groupify.stats.samples import SampleBudget

GROUPS = 4
MIN_GROUP_WIDTH = 8
IMAGES = 4
STAGES = ("plan", "convert", "save", "load", "forward", "ONNX", "ONNX Runtime")
SIZES = (32, 64, 96, 128, 160, 224, 256, 384)
OK, NOTHING, NOT_SUPPORTED = "ok", "nothing to convert", "not supported"
_FAILED = "failed"
_RESCALING = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos")
_DETECTOR_SIZE = 96
_ONE_LINE = 200


def main() -> None:
    """Run the models that are missing, smallest first, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="*", help="glob of names (default: all)")
    parser.add_argument("--again", metavar="GLOB", help="run these again, whatever the JSON file says")
    parser.add_argument(
        "--limit", type=int, default=600, help="CPU seconds for a model (default: %(default)s)"
    )
    parser.add_argument("--memory", type=float, default=16, help="GiB for a model (default: %(default)s)")
    parser.add_argument("--stop-after", type=float, help="start no model after so many seconds")
    parser.add_argument("--json", type=Path, default=Path("docs/models.json"), help="default: %(default)s")
    parser.add_argument("--table", type=Path, default=Path("docs/models.md"), help="default: %(default)s")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one)))
        return
    done: dict[str, Any] = {}
    if options.json.exists():
        done = json.loads(options.json.read_text(encoding="utf-8"))["models"]
    if options.again:
        done = {name: row for name, row in done.items() if not fnmatch.fnmatchcase(name, options.again)}
    start = time.monotonic()
    for name in sorted(fnmatch.filter(list_models(), options.again or options.models), key=parameters):
        if name in done:
            continue
        if options.stop_after is not None and time.monotonic() - start > options.stop_after:
            break
        done[name] = run_apart(name, options.limit, options.memory)
        row = done[name]
        print(f"{name}: {row['result']}, {row['seconds']:.0f} s {row['reason'] or ''}", file=sys.stderr)
        write_aside(options.json, json.dumps(document(done), indent=1, ensure_ascii=False) + "\n")
        write_aside(options.table, table(document(done)))
    print(dict(Counter(row["result"] for row in done.values())))


def parameters(name: str) -> int:
    """Number of parameters, as torchvision tells it: small models first."""
    return int(get_model_weights(name).DEFAULT.meta["num_params"])


def document(rows: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "groups": GROUPS,
        "min_group_width": MIN_GROUP_WIDTH,
        "calibration_images": IMAGES,
        "models": {name: rows[name] for name in sorted(rows)},
    }


# one model, in a process of its own ------------------------------------------------------------


def run_apart(name: str, limit: int, memory: float) -> dict[str, Any]:
    """Run one model in a fresh process that may take so many CPU seconds and GiB."""
    import resource  # not on Windows

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        [sys.executable, "-m", "scripts.sweep_models", "--one", name],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=bound,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    with contextlib.suppress(ValueError, IndexError):
        row: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        return row
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = finished.stderr.strip().splitlines()
    reason = f"more than {limit} CPU seconds" if seconds >= limit else (lines or ["died silently"])[-1]
    return _row(_FAILED, reason[:_ONE_LINE], seconds=seconds)


def _row(result: str, reason: str | None, **more: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "kind": "", "input": None, "converted": 0, "convs": 0, "stages": {}, "parity": None, "notes": [],
        "exported": None, "seconds": 0.0,
    }  # fmt: skip
    return {"result": result, "reason": reason, **empty, **more}


class _Stages:
    """CPU seconds of each stage, and the one that is on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current = "load_model"

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        self.current, start = name, time.process_time()
        yield
        self.seconds[name] = round(time.process_time() - start, 2)


def run_one(name: str) -> dict[str, Any]:
    """Take one model the whole way and say how far it came."""
    warnings.simplefilter("ignore")
    stages = _Stages()
    facts: dict[str, Any] = {"kind": kind_of(name)}
    try:
        _run(name, stages, facts)
        result, reason = OK, None
    except PlanError as error:
        result, reason = NOTHING, str(error)
    except _NotSupportedError as error:
        result, reason = NOT_SUPPORTED, str(error)
    except GroupifyError as error:
        result, reason = _FAILED, f"{stages.current}: {error}"
    except Exception as error:
        result, reason = _FAILED, f"{stages.current}: {type(error).__name__}: {error}"
    if reason is not None:
        reason = " ".join(reason.split())[:_ONE_LINE]
    seconds = round(time.process_time(), 1)
    return _row(result, reason, stages=stages.seconds, seconds=seconds, **facts)


class _NotSupportedError(Exception):
    """The model is of a kind that groupify does not take."""


def kind_of(name: str) -> str:
    """What torchvision files the model under."""
    module = get_model_builder(name).__module__.removeprefix("torchvision.models.").split(".")
    return module[0] if len(module) > 1 else "classification"


def _run(name: str, stages: _Stages, facts: dict[str, Any]) -> None:
    if facts["kind"] == "optical_flow":
        raise _NotSupportedError("takes two images; groupify converts models of one input")
    family = get_model_builder(name).__module__.rpartition(".")[2]
    arguments = {"min_size": _DETECTOR_SIZE, "max_size": _DETECTOR_SIZE} if family in _RESCALING else {}
    source, shape = smallest(name, arguments)
    facts["input"] = list(shape)
    model = source.model
    with stages.on("plan"):
        rules = groupify.Rules(min_group_width=MIN_GROUP_WIDTH)
        plan = groupify.plan(model, shape, groups=GROUPS, rules=rules)
    facts.update(converted=len(plan.converted), convs=len(plan.sites))
    images = torch.randn((IMAGES, *shape), generator=torch.Generator().manual_seed(0))
    # With the statistics of a fresh batch norm, activations fade until the output is the last bias, and a
    # comparison of outputs proves nothing.
    refresh_batch_norms(model, [images])
    budget = SampleBudget(per_input=1, minimum=256, patches_per_input=1, patches_minimum=128)
    with stages.on("convert"):
        result = convert(model, plan, Calibration(images, batch_size=2, restarts=0, budget=budget))
    facts["notes"] = list(result.notes)
    with tempfile.TemporaryDirectory() as folder:
        with stages.on("save"):
            recipe = groupify.Recipe(source.spec, source.weights, plan.recipes)
            groupify.save(Path(folder) / "model", result.model, recipe)
        with stages.on("load"):
            loaded = groupify.load(Path(folder) / "model")
        with stages.on("forward"), torch.no_grad():
            expected, found = leaves(result.model.eval()(images[:1])), leaves(loaded(images[:1]))
            if not all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
                       for a, b in zip(expected, found, strict=True)):  # fmt: skip
                raise GroupifyError("the loaded model computes something else than the saved one")
        part: nn.Module = loaded
        facts["exported"] = "whole model"
        if facts["kind"] == "detection":
            # The heads pick boxes by their scores, which no ONNX graph of fixed structure does.
            part, facts["exported"] = loaded.get_submodule("backbone"), "backbone"
        with torch.no_grad():
            check_alive(leaves(part.eval()(images[:1])), leaves(part(images[1:2])))
        with stages.on("ONNX"):
            file = export_onnx(part, Path(folder) / "model.onnx", input_shape=shape, static_batch=1)
        with stages.on("ONNX Runtime"):
            facts["parity"] = check_parity(part, file.path, input_shape=shape).max_rel_diff


def leaves(value: Any) -> list[Tensor]:
    """All tensors of a model's output."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def check_alive(one: list[Tensor], other: list[Tensor]) -> None:
    """Refuse outputs that do not depend on the input: equal ones would prove nothing."""
    for a, b in zip(one, other, strict=True):
        if a.shape == b.shape and float((a - b).abs().max()) > 1e-3 * float(a.abs().max()) > 0:
            return
    raise GroupifyError("the outputs hardly depend on the input, so that comparing them proves nothing")


def smallest(name: str, arguments: dict[str, Any]) -> tuple[Source, tuple[int, ...]]:
    """Build the model and find the smallest square input that it, and the backbone of a detector, takes.

    Some detectors rescale their input to a size of their own, which the backbone alone does not.
    """
    source = groupify.load_model(name, weights="none", arguments=arguments)
    video = source.spec.input_shape[1:-2]
    problem = ""
    for size in SIZES:
        shape = (3, *video, size, size)
        try:
            with torch.no_grad():
                outputs = leaves(source.model(torch.zeros(1, *shape)))
                if kind_of(name) == "detection":
                    source.model.get_submodule("backbone")(torch.zeros(1, *shape))
        except Exception as error:
            problem = str(error)
            continue
        if outputs:
            return source, shape
    raise GroupifyError(f"no input of {SIZES[0]} to {SIZES[-1]} pixels works: {problem}")


# the table -------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows = results["models"]
    counts = Counter(row["result"] for row in rows.values())
    lines = [
        "# Models",
        "",
        f"What `python -m scripts.sweep_models` found for {len(rows)} of the {len(list_models())} models "
        f"of torchvision {results['torchvision']} (torch {results['torch']}): "
        + ", ".join(f"{count} {result}" for result, count in counts.most_common())
        + ".",
        "",
        f"Random weights, {results['groups']} groups of at least {results['min_group_width']} channels, "
        f"{results['calibration_images']} noise images for the fit, batch 1 and the smallest input that "
        "works: this checks that the way is passable, not that accuracy survives. *convs*: converted of all. "
        "*loaded*: the saved model, loaded again, gives bit-equal outputs. *ONNX Runtime*: largest "
        "difference from PyTorch, of the largest output. *seconds*: CPU time, of all stages and the imports; "
        f"{sum(row['seconds'] for row in rows.values()) / 60:.0f} minutes for all models.",
        "",
        "| model | kind | input | convs | result | loaded | exported | ONNX Runtime | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        size = "×".join(map(str, row["input"])) if row["input"] else ""
        convs = f"{row['converted']} / {row['convs']}" if row["convs"] else ""
        parity = "" if row["parity"] is None else f"{row['parity']:.1e}"
        result = row["result"] + (f": {row['reason']}" if row["reason"] else "")
        if any("cannot be traced" in note for note in row["notes"]):
            result += ", by parts"
        loaded = "equal" if "forward" in row["stages"] else ""
        exported = row["exported"] if "ONNX" in row["stages"] else ""
        cells = (name, row["kind"], size, convs, result.replace("|", "\\|"), loaded, exported, parity)
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
