"""The whole way of a conversion: load, plan, convert, recover, measure, write."""

from groupify.pipeline.requests import (
    ConversionRequest,
    FinetuneRequest,
    ModelRequest,
    OutputRequest,
    PlanRequest,
    SearchRequest,
    TrainingRequest,
)
from groupify.pipeline.run import run_conversion, run_finetune

__all__ = [
    "ConversionRequest",
    "FinetuneRequest",
    "ModelRequest",
    "OutputRequest",
    "PlanRequest",
    "SearchRequest",
    "TrainingRequest",
    "run_conversion",
    "run_finetune",
]
