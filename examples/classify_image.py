"""Classify images with an exported file: onnxruntime, numpy and Pillow are all that it needs.

    python examples/classify_image.py demo-g4/model.onnx IMAGE... [--labels FILE]

No groupify and no PyTorch: how pixels become the input is written in the ONNX file itself. Copy this
file into your own program. Labels are a text file with one class name a line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class Classifier:
    """An ONNX file with the preprocessing that its metadata asks for."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "preprocessing" not in metadata:
            raise SystemExit(f"{path} does not say how to preprocess images; see its recipe.json")
        self.preprocessing = json.loads(metadata["preprocessing"])

    def prepare(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """Return the model's input for one image, shape (C, H, W)."""
        wanted = self.preprocessing
        mean, std = (np.array(wanted[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
        image = image.convert("L" if len(mean) == 1 else "RGB")
        resample, (height, width) = FILTERS[wanted["interpolation"]], wanted["size"]
        if wanted["crop"] == "none":
            image = image.resize((width, height), resample)
        else:
            shorter = max(wanted["resize"] or min(image.size), height, width)
            image = resize_and_crop(image, shorter, wanted["size"], resample)
        pixels = np.asarray(image, np.float32).reshape(*image.size[::-1], -1) / 255
        prepared: np.ndarray[Any, Any] = (pixels.transpose(2, 0, 1) - mean) / std
        return prepared

    def __call__(self, images: list[Image.Image]) -> np.ndarray[Any, Any]:
        """Return the probability of each class, shape (images, classes)."""
        batch = np.stack([self.prepare(image) for image in images])
        logits = self.session.run(None, {self.input.name: batch})[0]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: np.ndarray[Any, Any] = odds / odds.sum(axis=1, keepdims=True)
        return probabilities


def resize_and_crop(
    image: Image.Image, shorter_side: int, size: list[int], resample: Image.Resampling
) -> Image.Image:
    """Bring the shorter side to a length, then cut ``size`` (height, width) out of the middle."""
    height, width = size
    scale = shorter_side / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="model.onnx of an output folder")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--labels", type=Path, help="class names, one a line")
    arguments = parser.parse_args()
    labels = arguments.labels.read_text("utf-8").splitlines() if arguments.labels else None
    classifier = Classifier(arguments.model)
    probabilities = classifier([Image.open(path) for path in arguments.images])
    for path, row in zip(arguments.images, probabilities, strict=True):
        best = int(row.argmax())
        name = f"class {best}" if labels is None else labels[best]
        print(f"{path}: {name}, {100 * row[best]:.1f}%")


if __name__ == "__main__":
    main()
