"""What a conversion run found out; ``Report`` is the document of ``report.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict

from groupify.conversion.pictures import BlockPicture
from groupify.conversion.site_fit import SiteFit
from groupify.documents import CONFIG, Amount, Count, Count1, Document, Fraction, Positive
from groupify.machine import Machine
from groupify.models.preprocessing import Preprocessing
from groupify.models.specs import WeightsOrigin
from groupify.onnx.comparison import Agreement
from groupify.onnx.exporting import ExportedModel
from groupify.onnx.int8.quantisation import FloatNode
from groupify.onnx.parity import Parity
from groupify.paired import Paired
from groupify.structures import FLOAT32, Change, Precision, SitePlan
from groupify.training.history import FinetuneRow


def _check_picture(picture: BlockPicture) -> BlockPicture:
    for pixels in (picture.before, picture.after):
        if len(pixels) != picture.rows * picture.columns:
            raise ValueError(f"{picture.rows} by {picture.columns} pixels in base64")
    return picture


# The least and the most.
Range = tuple[Positive, Positive]


@dataclass(frozen=True)
class AccuracyChange:
    """Top-1 accuracy on the test part, as fractions; None where it was not measured.

    Attributes:
        dense, converted, recovered: of the dense model, after the conversion and after a training.
        images: test images.
        changed: what the last model that was measured has right and wrong otherwise than the dense one.
    """

    dense: Fraction | None = None
    converted: Fraction | None = None
    recovered: Fraction | None = None
    images: Count | None = None
    changed: Paired | None = None


@dataclass(frozen=True)
class MetricChange:
    """What the user's metric says of each model; higher is better.

    Attributes:
        name: of the function.
        dense, converted, recovered: of the dense model, after the conversion and after a training.
    """

    name: str
    dense: float
    converted: float
    recovered: float | None = None

    @property
    def drop(self) -> float:
        """How much the last model loses."""
        return self.dense - (self.converted if self.recovered is None else self.recovered)


@dataclass(frozen=True)
class ChosenStep:
    """Which weights of a fine-tune were chosen, by the loss on held-out images.

    Attributes:
        step: steps behind which they were validated; 0 = the weights before the training.
        images: held-out images.
    """

    step: Count
    images: Count


@dataclass(frozen=True)
class LatencyChange:
    """Median latency in ONNX Runtime.

    Attributes:
        dense, grouped: milliseconds per batch.
        speed_up: median over rounds in which both ran side by side.
        speed_up_range: between what it lies with 95%, for more such rounds; None where that is not known.
        threads: intra-op threads.
        batch_size: images per batch.
        steady: False where the times varied so much within the run that they say little.
    """

    dense: Positive
    grouped: Positive
    speed_up: Positive
    threads: Count1
    batch_size: Count1
    steady: bool = True
    speed_up_range: Range | None = None


@dataclass(frozen=True)
class Int8File:
    """The statically quantised variant of a float ONNX file.

    Attributes:
        file_bytes: its size.
        calibration_images: how many set its activation ranges.
        reduced_range: whether the weights have 7 bits, since the CPU's 8-bit products could overflow.
        agreement: its outputs against those of the float file, on test images where there are such.
        top1: accuracy on the test part, a fraction; None where it was not measured.
        milliseconds: median per batch, timed in one run with the float files; None where not timed.
        speed_up: dense float ÷ int8.
        speed_up_over_float: float file of the same model ÷ int8.
        speed_up_over_dense_int8: dense int8 ÷ int8.
        left_in_float: nodes that it computes in float32, since the quantiser cannot take them.
        speed_up_range, speed_up_over_dense_int8_range: between what two of the above lie with 95%.
        changed: what it has right and wrong otherwise than the dense float32 model, on the test part.
    """

    file_bytes: Count1
    calibration_images: Count1
    reduced_range: bool
    agreement: Agreement
    top1: Fraction | None = None
    milliseconds: Amount | None = None
    speed_up: Amount | None = None
    speed_up_over_float: Amount | None = None
    speed_up_over_dense_int8: Amount | None = None
    left_in_float: tuple[FloatNode, ...] = ()
    speed_up_range: Range | None = None
    speed_up_over_dense_int8_range: Range | None = None
    changed: Paired | None = None


@dataclass(frozen=True)
class UniformRun:
    """The same number of groups everywhere, converted as the run itself but not trained, for comparison.

    Attributes:
        groups: that were aimed at; the rules may give a conv fewer.
        params, macs: of the whole model.
        top1: accuracy on the test part, a fraction.
        milliseconds: median per batch, timed in one run with the others; None before that.
    """

    groups: Count1
    params: Count
    macs: Count
    top1: Fraction
    milliseconds: Positive | None = None


@dataclass(frozen=True)
class ExportResult:
    """A checked ONNX file.

    Attributes:
        exported: the file; of several, the float one.
        parity: ONNX Runtime against PyTorch.
        files: what was written, by role.
        int8: the quantised variant, timed against the float file; None where none was asked for.
        float16: the outputs of the float16 variant against those of the float file; None where none was asked
            for.
        notes: what the reader should know before using it.
    """

    exported: ExportedModel
    parity: Parity
    files: Mapping[str, str]
    int8: Int8File | None = None
    float16: Agreement | None = None
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file; of several, the float one."""
        return Path(next(iter(self.files.values())))


@dataclass(frozen=True)
class Report(Document):
    """Everything that one conversion run measured.

    Attributes:
        model: spec of the dense model.
        weights: where its weights came from.
        input_shape: (C, H, W).
        sites: every conv and what happened to it.
        params, macs, weight_bytes, activation_bytes: cost of one image; see ``ModelCost``.
        calibration: one line on how the grouped weights were found.
        fits: how well each site was fitted.
        accuracy: top-1 on the test part.
        metric: the user's own measure; None = none.
        history: validation history of the fine-tune.
        chosen: which weights of it the model has; None without training.
        onnx_bytes: size of the ONNX files; None where there are none.
        parity: ONNX Runtime against PyTorch.
        latency_ms: dense against grouped; None where not timed.
        int8: the quantised variant of the ONNX file; None where none was asked for.
        dense_int8: the same of the dense model.
        uniform: other numbers of groups, measured for comparison.
        machine: where it ran.
        seed: seed of everything random.
        files: what was written, by role.
        pictures: the convs that gained most from the clustering.
        site_milliseconds: time of each conv in the profiled ONNX files, dense and grouped, by site.
        command: the command line; None where the API was called.
        cpu: the processor that the plan is for, also where ``auto`` found it; see ``Rules``.
        precision: what the plan is for.
        budget: what was asked for, as ``Budget.parse`` takes it; None where nothing was.
        preprocessing: how images become inputs; None where nothing says it.
        groupify: its version.
        notes: what the reader should know before trusting the numbers.
    """

    what: ClassVar[str] = "report"
    remedy: ClassVar[str] = "convert the model again"
    plain_texts: ClassVar[bool] = False
    # A later version may add fields.
    __pydantic_config__: ClassVar[ConfigDict] = {**CONFIG, "extra": "ignore"}

    format: Literal["groupify-report"] = field(default="groupify-report", kw_only=True)
    schema_version: Literal[5] = field(default=5, kw_only=True)
    groupify: str | None = field(default=None, kw_only=True)
    command: str | None = field(default=None, kw_only=True)
    cpu: str | None = field(default=None, kw_only=True)
    precision: Precision = field(default=FLOAT32, kw_only=True)
    budget: str | None = field(default=None, kw_only=True)
    preprocessing: Preprocessing | None = field(default=None, kw_only=True)
    model: str
    weights: WeightsOrigin
    input_shape: tuple[Count1, ...]
    sites: tuple[SitePlan, ...]
    params: Change[Count]
    macs: Change[Count]
    weight_bytes: Change[Count]
    activation_bytes: Change[Count]
    calibration: str
    fits: tuple[SiteFit, ...] = ()
    accuracy: AccuracyChange = field(default_factory=AccuracyChange)
    metric: MetricChange | None = None
    history: tuple[FinetuneRow, ...] = ()
    chosen: ChosenStep | None = None
    onnx_bytes: Change[Count] | None = None
    parity: Parity | None = None
    latency_ms: LatencyChange | None = None
    int8: Int8File | None = None
    dense_int8: Int8File | None = None
    uniform: tuple[UniformRun, ...] = ()
    machine: Machine | None = None
    seed: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    site_milliseconds: Mapping[str, Change[Amount]] = field(default_factory=dict)
    pictures: tuple[Annotated[BlockPicture, AfterValidator(_check_picture)], ...] = ()
