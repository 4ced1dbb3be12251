"""What came out of a conversion: the model, its plan, how it came about, and what can be done with it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from groupify.artefact import save
from groupify.conversion.conversion import Conversion
from groupify.data.batches import Data
from groupify.data.calls import Inputs
from groupify.data.ranks import ALONE, Ranks, current_ranks
from groupify.data.splits import DataSplits, as_splits
from groupify.errors import SpecError, expect_type
from groupify.graph.call import Call, Example, as_call
from groupify.models.specs import Source
from groupify.paired import Answers
from groupify.pipeline.exporting import export_and_check, export_result, paths_of
from groupify.pipeline.requests import ExportOptions
from groupify.recipe import Recipe
from groupify.reporting.outcome import Outcome, outcome_text
from groupify.reporting.results import AccuracyChange, ExportResult, MetricChange
from groupify.scores import Metric, ModelCost, evaluate, measure_cost, measure_metric
from groupify.structures import FLOAT32, FilePrecision, Plan
from groupify.tasks import AUTO
from groupify.training.finetuning import FinetuneResult, finetune
from groupify.training.history import LogSettings
from groupify.training.own_loss import Loss
from groupify.training.settings import FinetuneSettings
from groupify.training.state import Checkpointing

# What a recipe keeps of the accuracy.
_METRICS = ("dense", "converted", "recovered", "images")


@dataclass(frozen=True)
class Costs:
    """What one image costs in the dense and in the compressed model."""

    dense: ModelCost
    compressed: ModelCost


@dataclass(frozen=True, kw_only=True, repr=False)
class Compressed(Conversion):
    """A compressed model, the plan that it follows and how it came about; printed, it shows all of that.

    Attributes:
        model: the compressed model, an ordinary ``nn.Module``.
        plan: what happened to each conv.
        source: the dense model, how to build it again, and where its weights come from.
        example: how the model is called: the shape of one image, or a ``Call``.
        data: what it was fitted and measured on; int8 files are calibrated on it. None = nothing.
        inputs: a batch → what the model is called with; None = its images.
        found_by: how the weights were found, as a recipe keeps it.
        accuracy: top-1 on the test part, as far as there is one.
        answers: which test images the dense model has right; None = not measured.
        task: what the model was taken for, see ``groupify.tasks``.
        metric: a model → how well it does; None = none.
        measured_by_metric: what that says of the models; None = none was given.
        budget: what was asked for, as ``Budget.parse`` takes it; None = nothing.
        tuned: the last fine-tune; None = none.
        seed: of everything random.
    """

    plan: Plan
    source: Source
    example: Example
    data: DataSplits | None = None
    inputs: Inputs | None = None
    found_by: Mapping[str, Any] | None = None
    accuracy: AccuracyChange = field(default_factory=AccuracyChange)
    answers: Answers | None = None
    task: str = AUTO
    metric: Metric | None = None
    measured_by_metric: MetricChange | None = None
    budget: str | None = None
    tuned: FinetuneResult | None = None
    seed: int = 0

    def __repr__(self) -> str:
        return outcome_text(
            Outcome(
                title=f"{type(self.model).__name__}, compressed",
                plan=self.plan,
                dense=self.costs.dense,
                compressed=self.costs.compressed,
                fits=self.fits,
                method=self.method,
                accuracy=self.accuracy,
                metric=self.measured_by_metric,
                weights=self.source.weights,
                notes=self.notes,
                preprocessing=self.source.spec.preprocessing,
            )
        )

    @cached_property
    def costs(self) -> Costs:
        """What one image costs in the dense and in the compressed model."""
        call = as_call(self.example, self.source.model, batch=1)
        return Costs(measure_cost(self.source.model, call), measure_cost(self.model, call.on(self.model)))

    @property
    def recipe(self) -> Recipe:
        """What tells how to rebuild the architecture, see ``groupify.apply``."""
        accuracy = {name: getattr(self.accuracy, name) for name in _METRICS}
        return Recipe(
            model=self.source.spec,
            weights=self.source.weights,
            sites=self.sites,
            cpu=self.plan.cpu,
            precision=self.plan.precision,
            task=self.task,
            budget=self.budget,
            calibration=self.found_by,
            recovery=None if self.tuned is None else self.tuned.recovery,
            metrics={key: value for key, value in accuracy.items() if value is not None},
        )

    def save(self, folder: str | Path, *, force: bool = False) -> Recipe:
        """Write a folder with ``recipe.json`` and ``model.safetensors``, whole or not at all.

        Args:
            folder: the folder to write.
            force: replace an earlier one.

        Returns:
            The recipe as written.

        Raises:
            ArtefactError: the folder exists or cannot be written.
        """
        return save(folder, self.model, self.recipe, force=force)

    def export(
        self,
        path: str | Path,
        *,
        precision: FilePrecision | None = None,
        static_batch: int | None = None,
        dynamic_size: bool = False,
        opset: int | None = None,
        progress: bool = False,
    ) -> ExportResult:
        """Write an ONNX file and check it against PyTorch.

        Args:
            path: the file to write; an existing one is replaced.
            precision: ``"float32"``, ``"int8"`` or ``"float16"``; None = what the model was planned for. int8
                is calibrated on the images that the model was fitted on.
            static_batch: a fixed batch size; None leaves it dynamic.
            dynamic_size: leave height and width open as well; the file is checked at a second size.
            opset: of the ONNX operators; None = 18, or the lowest that has all that the model needs.
            progress: show bars on stderr.

        Raises:
            SpecError: an unknown precision, or int8 without images.
            ConversionError: the model cannot be exported.
            ParityError: the file computes something else than the model.
            ArtefactError: the file cannot be written.
        """
        expect_type(path, (str, Path), "path", "the name of a file")
        file = Path(path)
        options = ExportOptions(static_batch, dynamic_size, opset, (precision or self.plan.precision,))
        if options.int8 and self.data is None and not isinstance(self.example, Call):
            raise SpecError("int8 needs images to calibrate on: give compress or convert some")
        options.check("the given images")
        wanted = paths_of(file, options)
        with tempfile.TemporaryDirectory(prefix="groupify-") as aside:
            exported = export_and_check(
                self.model, self.source.spec, {FLOAT32: Path(aside, file.name), **wanted}, options, self.data,
                example=self.example, task=self.task, seed=self.seed, progress=progress,
            )  # fmt: skip
        return export_result(exported, wanted)

    def finetune(
        self,
        data: DataSplits | Data | Tensor,
        *,
        teacher: nn.Module | None = None,
        settings: FinetuneSettings | None = None,
        loss: Loss | None = None,
        validation: Data | None = None,
        inputs: Inputs | None = None,
        checkpointing: Checkpointing | None = None,
        log: LogSettings | None = None,
        distributed: bool = False,
        progress: bool = False,
    ) -> Compressed:
        """Train further, with the dense model as the teacher; return a new result.

        It is planned for the same precision. The accuracy on a test part is measured again, and the metric.

        Args:
            data: what ``load_data`` returns, or training data: a data set, a loader, or another iterable of
                batches. Without class numbers for class scores, or labels and a loss for them, the model
                learns from the dense one alone: its class probabilities, or all of its outputs.
            teacher: the dense model; None = the one that this was made from.
            settings: how to train; None = the defaults.
            loss: (outputs, labels) → a number, or one for each image, shape (n,), lower is better; as for
                ``groupify.finetune``.
            inputs: a batch → what the model is called with; None = as for the fit.
            validation, checkpointing, log, distributed, progress: as for ``groupify.finetune``.

        Raises:
            WrongTypeError: ``data`` is nothing of the kind.
            GroupifyError: as ``groupify.finetune``.
        """
        inputs = self.inputs if inputs is None else inputs
        splits = as_splits(data, inputs, labelled=True if loss is None else "any")
        if settings is None:
            settings = FinetuneSettings(seed=self.seed)
        tuned = finetune(
            self.model, splits, teacher=self.source.model if teacher is None else teacher, settings=settings,
            loss=loss, task=self.task, validation=validation, inputs=inputs, checkpointing=checkpointing,
            log=log, distributed=distributed, progress=progress,
        )  # fmt: skip
        ranks = current_ranks() if distributed else ALONE
        accuracy = self._accuracy(tuned, splits, ranks, progress)
        return dataclasses.replace(
            self, model=tuned.model, tuned=tuned, accuracy=accuracy, measured_by_metric=self._by_metric(tuned)
        )

    def _by_metric(self, tuned: FinetuneResult) -> MetricChange | None:
        """What the metric says after a training; unknown where a folder knows its name alone."""
        known = self.measured_by_metric
        if known is None:
            return None
        if self.metric is not None:
            return dataclasses.replace(known, recovered=measure_metric(self.metric, tuned.model))
        return dataclasses.replace(known, recovered=known.converted if tuned.best_step == 0 else None)

    def _accuracy(
        self, tuned: FinetuneResult, splits: DataSplits, ranks: Ranks, progress: bool
    ) -> AccuracyChange:
        """The accuracy after a training, beside those before it if they are of the same images."""
        has_classes = tuned.initial_validation_top1 is not None
        if not splits.labelled or splits.test is None or not has_classes:
            return AccuracyChange()
        found = evaluate(tuned.model, splits.test, inputs=self.inputs, progress=progress, ranks=ranks)
        same = self.data is not None and self.data.test is splits.test
        if not same:
            return AccuracyChange(recovered=found.top1, images=found.images)
        dense, changed = self.answers, None
        if dense is not None and found.answers is not None:
            changed = dense.against(found.answers, ranks)
        return dataclasses.replace(self.accuracy, recovered=found.top1, images=found.images, changed=changed)
