"""Data sets from a spec, and the batches that are read from them."""

from groupify.data.batches import (
    UNLABELLED,
    Data,
    calibration_images,
    check_labels,
    is_map_style,
    iterate_batches,
    split_validation,
)
from groupify.data.images import CropAndFlip, FlipAndShift, ImageArrays
from groupify.data.splits import Augment, DataSplits, SyntheticImages, load_data

__all__ = [
    "UNLABELLED",
    "Augment",
    "CropAndFlip",
    "Data",
    "DataSplits",
    "FlipAndShift",
    "ImageArrays",
    "SyntheticImages",
    "calibration_images",
    "check_labels",
    "is_map_style",
    "iterate_batches",
    "load_data",
    "split_validation",
]
