"""One model through the whole way: torch.export, plan, convert, save, load, forward, ONNX, ONNX Runtime.

Random weights, a handful of noise images for the fit, batch 1 and the smallest input that works: this checks
that the way is passable, not that accuracy survives.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import groupify
from groupify.conversion.by_part import refresh_batch_norms
from groupify.conversion.conversion import Calibration, Conversion, convert
from groupify.errors import ConversionError, GroupifyError, PlanError
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.models.specs import Source
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from groupify.stats.samples import SampleBudget
from groupify.structures import Plan
from scripts.benchmarks.zoo import Entry

GROUPS = 4
MIN_GROUP_WIDTH = 8
IMAGES = 4
EXPORT = "torch.export"
STAGES = (EXPORT, "plan", "convert", "save", "load", "forward", "ONNX", "ONNX Runtime")
OK, NOTHING, NOT_SUPPORTED, FAILED = "ok", "nothing to convert", "not supported", "failed"
SEED = 0
ONE_LINE = 300


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Attributes:
        name: of the model.
        kind: what its library files it under.
        result: one of the four above; the last is a fault of ours.
        reason: why not ok.
        input: shape of one input.
        batch: whether ``torch.export`` took the model with a dynamic batch, with a fixed one, or not at all
            (then why not).
        converted: convs that got groups.
        convs: convs of the model.
        stages: CPU seconds of each stage.
        notes: of the conversion.
        exported: what went to ONNX.
        parity: largest difference of ONNX Runtime from PyTorch, of the largest output.
        seconds: CPU seconds, the imports included.
    """

    name: str
    kind: str = ""
    result: str = FAILED
    reason: str | None = None
    input: list[int] | None = None
    batch: str | None = None
    converted: int = 0
    convs: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    exported: str | None = None
    parity: float | None = None
    seconds: float = 0.0


_TELLING = 10  # how many times more than the exporter another image must change
_SPREAD = 0.02  # of weights in place of zeros


class _NotSupportedError(Exception):
    """The model is of a kind that groupify does not take."""


def take(entry: Entry, until: str = STAGES[-1]) -> Row:
    """Take one model as far as a stage, and say how far it came."""
    warnings.simplefilter("ignore")
    way = _Way(entry, until)
    result, reason = OK, None
    try:
        way.go()
    except PlanError as error:
        result, reason = NOTHING, str(error)
    except _NotSupportedError as error:
        result, reason = NOT_SUPPORTED, str(error)
    except ConversionError as error:
        result, reason = NOT_SUPPORTED, f"{way.stage}: {error}"
    except GroupifyError as error:
        result, reason = FAILED, f"{way.stage}: {error}"
    except Exception as error:
        result, reason = FAILED, f"{way.stage}: {type(error).__name__}: {error}"
    reason = None if reason is None else one_line(reason)
    return Row(
        entry.name, entry.kind, result, reason, stages=way.seconds, seconds=_used(), **way.facts
    )  # fmt: skip


def one_line(text: str) -> str:
    """Return the beginning of a text, on one line."""
    return " ".join(text.split())[:ONE_LINE]


def leaves(value: Any) -> list[Tensor]:
    """All tensors of a model's output."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def change(one: list[Tensor], other: list[Tensor]) -> float:
    """Return how much outputs for one image differ from those for another, ÷ the largest output."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a.shape == b.shape]
    changes = [
        float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30)
        for a, b in pairs
        if a.is_floating_point() and a.numel()
    ]
    return max(changes, default=0.0)


def check_telling(parity: float, changed: float) -> None:
    """Refuse a comparison of outputs that depend so little on the input that it proves nothing."""
    if parity > changed / _TELLING:
        raise GroupifyError(
            f"another image changes the outputs by {changed:.1g} and the exporter by {parity:.1g}: comparing "
            "them proves nothing"
        )


def export(model: nn.Module, shape: tuple[int, ...]) -> str:
    """Capture the graph and return with what batch that went: dynamic, fixed, or why it did not go."""
    captured = capture(model, Call((torch.randn(2, *shape),)))
    if captured.graph is None:
        return one_line(str(captured.problem))
    return "dynamic" if captured.graph.batch is None else "fixed"


class _Way:
    """The way of one model.

    Attributes:
        facts: what the row tells of it.
        seconds: CPU seconds of each stage.
        stage: the one that is on.
    """

    def __init__(self, entry: Entry, until: str) -> None:
        self.entry, self.until = entry, until
        self.facts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.stage = "load_model"

    def go(self) -> None:
        """Walk."""
        if self.entry.refusal is not None:
            raise _NotSupportedError(self.entry.refusal)
        source, shape = smallest(self.entry)
        self.facts["input"] = list(shape)
        for stage in self._stages(source, shape):
            if stage == self.until:
                return

    def _stages(self, source: Source, shape: tuple[int, ...]) -> Iterator[str]:
        """Yield the name of each stage behind it."""
        with self._on(EXPORT):
            self.facts["batch"] = export(source.model, shape)
        yield EXPORT
        with self._on("plan"):
            rules = groupify.Rules(min_group_width=MIN_GROUP_WIDTH)
            plan = groupify.plan(source.model, shape, groups=GROUPS, rules=rules)
        self.facts.update(converted=len(plan.converted), convs=len(plan.sites))
        yield "plan"
        images = torch.randn((IMAGES, *shape), generator=torch.Generator().manual_seed(SEED))
        result = self._convert(source.model, plan, images)
        yield "convert"
        with tempfile.TemporaryDirectory() as folder:
            loaded = self._through_disk(Path(folder) / "model", source, plan, result.model, images[:1])
            yield "forward"
            self._to_onnx(Path(folder) / "model.onnx", loaded, images)
            yield "ONNX Runtime"

    def _convert(self, model: nn.Module, plan: Plan, images: Tensor) -> Conversion:
        # With the statistics of a fresh batch norm, activations fade until the output is the last bias, and a
        # comparison of outputs proves nothing.
        refresh_batch_norms(model, [images])
        budget = SampleBudget(per_input=1, minimum=256, patches_per_input=1, patches_minimum=128)
        with self._on("convert"):
            result = convert(
                model, plan, Calibration(images, batch_size=2, restarts=0, budget=budget), seed=SEED
            )
        self.facts["notes"] = list(result.notes)
        return result

    def _through_disk(
        self, folder: Path, source: Source, plan: Plan, model: nn.Module, image: Tensor
    ) -> nn.Module:
        """Return the model as it comes back from a folder; it must compute the same."""
        with self._on("save"):
            groupify.save(folder, model, groupify.Recipe(source.spec, source.weights, plan.recipes))
        with self._on("load"):
            loaded = groupify.load(folder, trust=True)
        with self._on("forward"), torch.no_grad():
            expected, found = leaves(model.eval()(image)), leaves(loaded(image))
            if not all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
                       for a, b in zip(expected, found, strict=True)):  # fmt: skip
                raise GroupifyError("the loaded model computes something else than the saved one")
        return loaded

    def _to_onnx(self, path: Path, model: nn.Module, images: Tensor) -> None:
        shape = tuple(images.shape[1:])
        part = (model.get_submodule("backbone") if self.entry.backbone else model).eval()
        self.facts["exported"] = "backbone" if self.entry.backbone else "whole model"
        with torch.no_grad():
            changed = change(leaves(part(images[:1])), leaves(part(images[1:2])))
        with self._on("ONNX"):
            file = export_onnx(part, path, input_shape=shape, static_batch=1)
        with self._on("ONNX Runtime"):
            parity = check_parity(part, file.path, input_shape=shape).max_rel_diff
            check_telling(parity, changed)
        self.facts["parity"] = parity

    @contextlib.contextmanager
    def _on(self, stage: str) -> Iterator[None]:
        self.stage, start = stage, time.process_time()
        yield
        self.seconds[stage] = round(time.process_time() - start, 2)


def smallest(entry: Entry) -> tuple[Source, tuple[int, ...]]:
    """Build the model and find the first input that it, and a backbone to be exported alone, takes.

    Some detectors rescale their input to a size of their own, which the backbone alone does not.
    """
    source = groupify.load_model(entry.factory, weights="none", arguments=entry.arguments, seed=SEED)
    wake(source.model)
    problem = ""
    for shape in entry.shapes:
        try:
            with torch.no_grad():
                outputs = leaves(source.model(torch.zeros(1, *shape)))
                if entry.backbone:
                    source.model.get_submodule("backbone")(torch.zeros(1, *shape))
        except Exception as error:  # a model can raise anything
            problem = str(error)
            continue
        if outputs:
            return source, shape
    raise GroupifyError(f"no input of {entry.shapes[0]} to {entry.shapes[-1]} works: {problem}")


def wake(model: nn.Module) -> None:
    """Give weights that a fresh model holds at zero (of heads, as a rule) random values, in place.

    Behind them all outputs are zero, and a comparison would prove nothing.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not bool(parameter.any()):
                parameter.copy_(_SPREAD * torch.randn(parameter.shape, generator=generator))


def _used() -> float:
    return round(time.process_time(), 1)
