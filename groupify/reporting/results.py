"""What a conversion run found out, as plain dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from groupify.conversion.pictures import BlockPicture
from groupify.conversion.site_fit import SiteFit
from groupify.machine import Machine
from groupify.models.specs import WeightsOrigin
from groupify.onnx.agreement import Agreement
from groupify.onnx.exporting import ExportedModel
from groupify.onnx.parity import Parity
from groupify.scores import ModelCost
from groupify.structures import Change, SitePlan
from groupify.training.history import FinetuneRow


@dataclass(frozen=True)
class AccuracyChange:
    """Top-1 accuracy on the test part, as fractions; None where it was not measured."""

    dense: float | None = None
    converted: float | None = None
    recovered: float | None = None
    images: int | None = None


@dataclass(frozen=True)
class CostChange:
    """Cost of one image, dense and grouped."""

    dense: ModelCost
    grouped: ModelCost


@dataclass(frozen=True)
class LatencyChange:
    """Median latency in ONNX Runtime.

    Attributes:
        milliseconds: per batch, dense and grouped.
        speed_up: median over rounds in which both ran side by side.
        threads: intra-op threads.
        batch_size: images per batch.
        steady: False where the times varied so much within the run that they say little.
    """

    milliseconds: Change[float]
    speed_up: float
    threads: int
    batch_size: int
    steady: bool = True


@dataclass(frozen=True)
class Int8File:
    """The statically quantised variant beside the float ONNX file.

    Attributes:
        file_bytes: its size.
        calibration_images: how many set its activation ranges.
        reduced_range: whether the weights have 7 bits, since the CPU's 8-bit products could overflow.
        agreement: its outputs against those of the float file, on test images where there are such.
        top1: accuracy on the test part, a fraction; None where it was not measured.
        milliseconds: median per batch, timed in one run with the float files; None where not timed.
        speed_up: dense float ÷ int8.
        speed_up_over_float: grouped float ÷ int8.
    """

    file_bytes: int
    calibration_images: int
    reduced_range: bool
    agreement: Agreement
    top1: float | None = None
    milliseconds: float | None = None
    speed_up: float | None = None
    speed_up_over_float: float | None = None


@dataclass(frozen=True)
class UniformRun:
    """The same number of groups everywhere, converted as the run itself but not trained, for comparison.

    Attributes:
        groups: that were aimed at; the rules may give a conv fewer.
        params, macs: of the whole model.
        top1: accuracy on the test part, a fraction.
        milliseconds: median per batch, timed in one run with the others; None before that.
    """

    groups: int
    params: int
    macs: int
    top1: float
    milliseconds: float | None = None


@dataclass(frozen=True)
class ExportResult:
    """A checked ONNX file.

    Attributes:
        exported: the file.
        parity: ONNX Runtime against PyTorch.
        files: what was written, by role.
        int8: the quantised variant, timed against the float file; None where none was asked for.
        notes: what the reader should know before using it.
    """

    exported: ExportedModel
    parity: Parity
    files: Mapping[str, str]
    int8: Int8File | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that one conversion run measured.

    Attributes:
        model: spec of the dense model.
        weights: where its weights came from.
        input_shape: (C, H, W).
        sites: every conv and what happened to it.
        cost: cost of one image, dense and grouped.
        calibration: one line on how the grouped weights were found.
        fits: how well each site was fitted.
        accuracy: top-1 on the test part.
        history: validation history of the fine-tune.
        onnx_bytes: size of the ONNX files.
        parity: ONNX Runtime against PyTorch.
        latency: dense against grouped; None where not timed.
        int8: the quantised variant of the ONNX file; None where none was asked for.
        uniform: other numbers of groups, measured for comparison.
        machine: where it ran.
        seed: seed of everything random.
        files: what was written, by role.
        pictures: the convs that gained most from the clustering.
        site_milliseconds: time of each conv in the profiled ONNX files, dense and grouped, by site.
        command: the command line; None where the API was called.
        version: groupify's.
        notes: what the reader should know before trusting the numbers.
    """

    model: str
    weights: WeightsOrigin
    input_shape: tuple[int, ...]
    sites: tuple[SitePlan, ...]
    cost: CostChange
    calibration: str
    fits: tuple[SiteFit, ...] = ()
    accuracy: AccuracyChange = field(default_factory=AccuracyChange)
    history: tuple[FinetuneRow, ...] = ()
    onnx_bytes: Change[int] | None = None
    parity: Parity | None = None
    latency: LatencyChange | None = None
    int8: Int8File | None = None
    uniform: tuple[UniformRun, ...] = ()
    machine: Machine | None = None
    seed: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pictures: tuple[BlockPicture, ...] = ()
    site_milliseconds: Mapping[str, Change[float]] = field(default_factory=dict)
    command: str | None = None
    version: str | None = None
