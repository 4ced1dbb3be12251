"""Top-1 accuracy of a model on a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from groupify.data.batches import UNLABELLED, Data, check_labels, is_map_style, iterate_batches
from groupify.data.ranks import ALONE, Ranks
from groupify.errors import DataError

_OUTPUT_NAMES = ("logits", "out")


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy, a fraction, and the number of images it was measured on."""

    top1: float
    images: int


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 256,
    limit: int | None = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Accuracy:
    """Return the top-1 accuracy of a classifier.

    The model runs in eval mode on its own device, and every module gets its training mode back.

    Args:
        model: maps images (N, C, H, W) to logits (N, classes), or to a dict or named tuple with the
            entry ``logits`` or ``out``.
        data: labelled images.
        batch_size: images per batch.
        limit: measure on the first images only.
        progress: show a bar on stderr.
        ranks: the processes that divide the images among themselves; each gets the accuracy of all.

    Example:
        >>> labels = torch.tensor([0, 1, 2, 2])
        >>> images = torch.nn.functional.one_hot(labels, 3).float()[:, :, None, None]
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 2, 0]))
        >>> groupify.evaluate(torch.nn.Flatten(), data)
        Accuracy(top1=0.75, images=4)

    Raises:
        DataError: data without labels, labels out of range, NaN, no images; or outputs that are no logits.
    """
    parameter = next(model.parameters(), torch.empty(0))
    correct = images_seen = 0
    total = len(cast(Any, data)) if is_map_style(data) else None
    if total is not None and limit is not None:
        total = min(total, limit)
    batches = iterate_batches(data, batch_size, limit=limit, share=(ranks.rank, ranks.world))
    with (
        evaluating(model),
        torch.inference_mode(),
        tqdm(total=total, desc="evaluate", unit="images", disable=None if progress else True) as bar,
    ):
        for images, labels in batches:
            if bool((labels == UNLABELLED).any()):
                raise DataError("the images have no labels: accuracy needs a labelled data set")
            logits = class_logits(model(images.to(parameter.device)))
            check_labels(labels, logits.shape[1])
            correct += int((logits.argmax(1).cpu() == labels).sum())
            images_seen += len(labels)
            bar.update(ranks.world * len(labels))
    correct, images_seen = (int(value) for value in ranks.sums(correct, images_seen))
    return Accuracy(correct / images_seen, images_seen)


def class_logits(output: Any) -> Tensor:
    """Return the logits (N, classes) among a model's outputs.

    Raises:
        DataError: outputs of another shape, such as those of a segmentation or detection model.
    """
    if isinstance(output, Mapping):
        named = [output[name] for name in _OUTPUT_NAMES if name in output]
    else:
        named = [getattr(output, name) for name in _OUTPUT_NAMES if hasattr(output, name)]
    if named:
        output = named[0]
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.dim() == 2:
        return output
    found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
    raise DataError(f"the model's output has {found}: top-1 accuracy needs logits of shape (N, classes)")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a while, then give every module its training mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
