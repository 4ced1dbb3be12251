"""What the command line asks for, as dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupify.errors import SpecError
from groupify.models import Source, load_model
from groupify.planning.budget import Budget
from groupify.planning.plan_file import PlanFile
from groupify.planning.rules import Rules
from groupify.planning.uniform import plan
from groupify.structures import Plan
from groupify.training.logs import LogSettings
from groupify.training.settings import FinetuneSettings
from groupify.training.state import Checkpointing

# Steps between two writes of a training's state, where it is to be kept and nothing more is said.
SAVE_EVERY = 200


@dataclass(frozen=True)
class ModelRequest:
    """Which dense model; see ``load_model`` for the fields."""

    name: str
    weights: str = "auto"
    checkpoint: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None

    def load(self, seed: int) -> Source:
        """Load it."""
        return load_model(
            self.name,
            weights=self.weights,
            checkpoint=self.checkpoint,
            arguments=self.arguments,
            input_shape=self.input_shape,
            seed=seed,
        )


@dataclass(frozen=True)
class SearchRequest:
    """A budget to plan for; see ``SearchOptions`` for the fields not said here.

    Attributes:
        budget: what the model may cost and lose.
        latency_table: file of a table measured on the device; None = measure here.
    """

    budget: Budget
    sensitivity: str = "fisher"
    verify: bool = True
    latency_table: Path | None = None


@dataclass(frozen=True)
class PlanRequest:
    """How the convs are to be replaced.

    Attributes:
        groups: number of groups to aim at.
        rules: which convs may be converted and into what.
        file: a plan file to take instead.
        search: a budget to plan for instead of ``groups``; see ``pipeline.budget``.
    """

    groups: int
    rules: Rules = Rules()
    file: Path | None = None
    search: SearchRequest | None = None

    def make(self, source: Source) -> Plan:
        """Make the plan for a model, or read it."""
        if self.file is not None:
            return PlanFile.read(self.file).apply(source.model, source.spec.input_shape)
        return plan(source.model, source.spec.input_shape, groups=self.groups, rules=self.rules)


@dataclass(frozen=True)
class OutputRequest:
    """The folder to write and what is measured on the way.

    Attributes:
        folder: where; it appears whole or not at all.
        force: replace an earlier output folder.
        static_batch: fixed batch size of the ONNX file; None = dynamic.
        threads: intra-op threads of the timing.
        command: the command line, for the report; None = the API was called.
        quantize: write an int8 variant of the ONNX file beside it; needs data.
    """

    folder: Path
    force: bool = False
    static_batch: int | None = None
    threads: int = 1
    command: str | None = None
    quantize: bool = False


@dataclass(frozen=True)
class TrainingRequest:
    """How to fine-tune, and what to keep on the way.

    Attributes:
        settings: how to train.
        save_every: steps between two writes of the training's state; None = no state, unless ``resume``.
        resume: go on from the state, if there is one.
        log: where to log; None = nowhere.
        device: "cpu", "cuda", or "auto": a GPU if there is one.
    """

    settings: FinetuneSettings
    save_every: int | None = None
    resume: bool = False
    log: LogSettings | None = None
    device: str = "auto"

    def checkpointing(self, output: OutputRequest) -> Checkpointing | None:
        """Return where the state goes: beside the output folder, which is there only at the end.

        Raises:
            SpecError: an interrupted run has left a state, and nothing is said about it.
        """
        file = self.state_file(output)
        if not self.resume and not output.force and file.exists():
            raise SpecError(
                f"{file} is the state of an interrupted run: go on from it with --resume, "
                "or begin anew with --force"
            )
        if self.save_every is None and not self.resume:
            return None
        return Checkpointing(file, self.save_every or SAVE_EVERY, self.resume)

    @staticmethod
    def state_file(output: OutputRequest) -> Path:
        """Return the name of the state, that of the output folder with ``.state`` behind it."""
        folder = output.folder.expanduser().absolute()
        return folder.with_name(f"{folder.name}.state")


@dataclass(frozen=True)
class ConversionRequest:
    """Everything that ``run_conversion`` does.

    Attributes:
        model, plan: the dense model and how its convs are to be replaced.
        output: what to write and to measure.
        data: data spec; None = no data.
        calibration_images: unlabelled training images for the fit; 0 = from the weights alone.
        reconstruct_steps: steps of block reconstruction after the fit; 0 = none.
        training: the fine-tune; None = none.
        seed: seed of everything random.
        save_plan: file to write the plan to.
        uniform: numbers of groups to convert with as well, untrained, for comparison; needs labelled data.
    """

    model: ModelRequest
    plan: PlanRequest
    output: OutputRequest
    data: str | None = None
    calibration_images: int = 1000
    reconstruct_steps: int = 0
    training: TrainingRequest | None = None
    seed: int = 0
    save_plan: Path | None = None
    uniform: Sequence[int] = ()


@dataclass(frozen=True)
class FinetuneRequest:
    """Everything that ``run_finetune`` does.

    Attributes:
        folder: the output folder of a conversion.
        output: what to write and to measure.
        data: data spec with a training part.
        training: how to train.
        checkpoint: the dense weights, where the recipe names a file.
        trust: let the recipe import the code that it names.
        seed: seed of everything random.
    """

    folder: Path
    output: OutputRequest
    data: str
    training: TrainingRequest
    checkpoint: Path | None = None
    trust: bool = False
    seed: int = 0
