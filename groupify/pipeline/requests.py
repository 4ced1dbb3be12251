"""What is asked of a run, as dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupify.devices import find_device
from groupify.errors import SpecError
from groupify.models.preprocessing import PreprocessingOptions
from groupify.models.sources import load_model
from groupify.models.specs import Source
from groupify.planning.budget import Budget
from groupify.planning.group_counts import GroupCounts
from groupify.planning.like_groups import DEFAULT_GROUPS, macs_of
from groupify.planning.rules import Rules
from groupify.planning.search import BOTH, SearchOptions
from groupify.scores import Metric
from groupify.structures import (
    FAMILIES,
    FILE_PRECISIONS,
    FLOAT32,
    GROUPED,
    INT8,
    FilePrecision,
    check_precision,
)
from groupify.training.history import LogSettings
from groupify.training.own_loss import Loss
from groupify.training.settings import FinetuneSettings
from groupify.training.state import Checkpointing

# Steps between two writes of a training's state, where it is to be kept and nothing more is said.
SAVE_EVERY = 200


def families(structure: str | None) -> tuple[str, ...] | None:
    """Return the families that ``--structure`` names; None = nothing is said."""
    if structure is None:
        return None
    return FAMILIES if structure == "auto" else (structure,)


@dataclass(frozen=True)
class ModelRequest:
    """Which dense model, or, where that is allowed, which output folder.

    Attributes:
        name, weights, checkpoint, arguments, input_shape: as for ``load_model``.
        trust: let a folder's recipe import the code that it names.
        preprocessing: what is said about it, in place of what the model or the recipe says.
        device: where it runs, see ``find_device``.
    """

    name: str
    weights: str = "auto"
    checkpoint: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None
    trust: bool = False
    preprocessing: PreprocessingOptions = PreprocessingOptions()
    device: str = "cpu"

    def check_for_folder(self) -> None:
        """Refuse what is said about a dense model where the name is that of an output folder.

        Raises:
            SpecError: names the option.
        """
        said = {
            "--weights": self.weights != "auto",
            "--checkpoint": self.checkpoint is not None,
            "--model-args": bool(self.arguments),
            "--input-size": self.input_shape is not None,
        }
        for option in (option for option, given in said.items() if given):
            raise SpecError(f"{option} is for a dense model: the recipe of {self.name} says it; leave it out")

    def load(self, seed: int) -> Source:
        """Load the dense model, onto its device."""
        device = find_device(self.device)  # before a long download
        source = load_model(
            self.name,
            weights=self.weights,
            checkpoint=self.checkpoint,
            arguments=self.arguments,
            input_shape=self.input_shape,
            seed=seed,
        )
        return source.on(device)


@dataclass(frozen=True)
class PlanRequest:
    """How the convs are to be replaced.

    Attributes:
        groups: number of groups to aim at; where each conv gets a structure of its own, the MACs are those of
            so many plain groups. None = with neither ``file`` nor ``budget``, ``DEFAULT_GROUPS``.
        rules: which convs may be converted, and into what; where ``DEFAULT_GROUPS`` hold, ``structures`` of
            None are all families.
        file: a plan file to take instead.
        budget: a budget to plan for instead of ``groups``.
        search: how to choose each conv's structure.
        latency_table: file of a table measured on the device, for ``search``; None = measure here.
        frontier: what else to find out for the budget: None, ``"predicted"``, or ``"measured"`` to convert
            every point.
        save: file to write the plan to.

    Raises:
        SpecError: both ``groups`` and ``budget``.
    """

    groups: GroupCounts | None = None
    rules: Rules = Rules()
    file: Path | None = None
    budget: Budget | None = None
    search: SearchOptions = SearchOptions()
    latency_table: Path | None = None
    frontier: str | None = None
    save: Path | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and self.budget is not None:
            raise SpecError(BOTH)

    @property
    def is_default(self) -> bool:
        """Whether nothing says how much smaller the model is to be."""
        return self.file is None and self.budget is None and self.groups is None

    @property
    def is_uniform(self) -> bool:
        """Whether the number of groups alone says what becomes of each conv."""
        chosen = self.is_default and self.rules.structures is None
        return self.file is None and self.budget is None and self.rules.is_uniform and not chosen

    @property
    def is_searched(self) -> bool:
        """Whether each conv's structure is chosen within limits: a budget, or the MACs of plain groups."""
        return self.file is None and not self.is_uniform

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen since nothing was asked for."""
        if not self.is_default:
            return ()
        start, families = "no --groups and no --budget", self.rules.families
        if self.is_uniform:
            return (f"{start}: {DEFAULT_GROUPS} groups in each conv",)
        which = "structures" if len(families) > 1 else f"{families[0]} structures"
        return (f"{start}: {which} chosen for each conv at {macs_of(DEFAULT_GROUPS)}",)

    @property
    def label(self) -> str:
        """How the name of the folder ends that a conversion writes: ``"g4"``, ``"auto"``, ``"auto-g8"``."""
        if self.file is not None or self.budget is not None:
            return "planned"
        groups = f"g{(self.groups or DEFAULT_GROUPS).label}"
        families = self.rules.families if self.is_searched else self.rules.structures or (GROUPED,)
        if tuple(families) == (GROUPED,):
            return groups
        family = families[0] if len(families) == 1 else "auto"
        return family if self.is_default else f"{family}-{groups}"


@dataclass(frozen=True)
class ExportOptions:
    """How the ONNX file is made and measured.

    Attributes:
        static_batch: fixed batch size; None = dynamic.
        dynamic_size: leave height and width open too.
        opset: of the ONNX operators; None = 18, or the lowest that has all that the model needs.
        precisions: what files to write; int8 needs data. Empty = in a fine-tune, those that the folder has.
        threads: intra-op threads of the timing.
    """

    static_batch: int | None = None
    dynamic_size: bool = False
    opset: int | None = None
    precisions: Sequence[FilePrecision] = (FLOAT32,)
    threads: int = 1

    @property
    def batch_size(self) -> int:
        """Images per batch of the timing."""
        return self.static_batch or 1

    @property
    def int8(self) -> bool:
        """Whether an int8 file is to be written."""
        return INT8 in self.precisions

    def check(self, data: str | None) -> None:
        """Refuse int8 without data, before any work.

        Raises:
            SpecError: there is nothing to calibrate with.
        """
        for precision in self.precisions:
            check_precision(precision, FILE_PRECISIONS)
        if self.int8 and data is None:
            raise SpecError("--precision int8 needs --data to calibrate with, for example --data demo")


@dataclass(frozen=True)
class OutputRequest:
    """The folder to write.

    Attributes:
        folder: where; it appears whole or not at all.
        export: how its ONNX file is made; the processor is that of the plan.
        force: replace an earlier output folder.
        command: the command line, for the report; None = the API was called.
    """

    folder: Path
    export: ExportOptions = ExportOptions()
    force: bool = False
    command: str | None = None

    @property
    def state_file(self) -> Path:
        """Where the state of a training is kept: beside the folder, which is there only at the end."""
        folder = self.folder.expanduser().absolute()
        return folder.with_name(f"{folder.name}.state")


@dataclass(frozen=True)
class TrainingRequest:
    """How to fine-tune, and what to keep on the way.

    Attributes:
        settings: how to train.
        save_every: steps between two writes of the training's state; None = no state, unless ``resume``.
        resume: go on from the state, if there is one.
        log: where to log; None = nowhere.
        loss: for labels of any form; None = the cross-entropy of class numbers.
    """

    settings: FinetuneSettings
    save_every: int | None = None
    resume: bool = False
    log: LogSettings | None = None
    loss: Loss | None = None

    @property
    def keeps_state(self) -> bool:
        """Whether an interrupted run can be resumed."""
        return self.resume or self.save_every is not None

    def checkpointing(self, output: OutputRequest) -> Checkpointing | None:
        """Return where the state goes.

        Raises:
            SpecError: an interrupted run has left a state, and nothing is said about it.
        """
        file = output.state_file
        if not self.resume and not output.force and file.exists():
            raise SpecError(
                f"{file} is the state of an interrupted run: go on from it with --resume, "
                "or begin anew with --force"
            )
        return Checkpointing(file, self.save_every or SAVE_EVERY, self.resume) if self.keeps_state else None


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
    uniform: Sequence[int] = ()

    def check(self) -> None:
        """Refuse what cannot be done without data, before any work.

        Raises:
            SpecError: says what needs data.
        """
        self.output.export.check(self.data)
        if self.data is None and self.training is not None:
            raise SpecError(
                f"--epochs {self.training.settings.epochs:g} needs --data, for example --data demo"
            )
        if self.data is None and self.reconstruct_steps:
            raise SpecError(f"--reconstruct {self.reconstruct_steps} needs --data, for example --data demo")


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
        preprocessing: what is said about it, in place of what the recipe says.
        device: where it is trained, see ``find_device``.
        seed: seed of everything random.
        task: what the model is taken for; None = as the recipe says.
        metric: a model → how well it does; None = none.
    """

    folder: Path
    output: OutputRequest
    data: str
    training: TrainingRequest
    checkpoint: Path | None = None
    trust: bool = False
    preprocessing: PreprocessingOptions = PreprocessingOptions()
    device: str = "cpu"
    seed: int = 0
    task: str | None = None
    metric: Metric | None = None
