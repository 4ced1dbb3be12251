"""Sample output positions of a conv and cut out the input patches that they read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupify.graph.plain_layers import Conv

# Values up to here survive half precision; larger ones are kept in float32.
_HALF_LIMIT = 6.0e4


@dataclass(frozen=True)
class Positions:
    """Output positions of a layer within one batch.

    Attributes:
        image: shape (count,).
        place: coordinate along each spatial dimension, shape (count,) each; none for a plain feature vector.
        channels_last: whether the channels are the last dimension, as behind a linear layer, not the second.
    """

    image: Tensor
    place: tuple[Tensor, ...]
    channels_last: bool = False

    def __len__(self) -> int:
        return len(self.image)

    def subset(self, chosen: Tensor) -> Positions:
        """Return the positions with the given numbers, shape (n,)."""
        return Positions(self.image[chosen], tuple(part[chosen] for part in self.place), self.channels_last)


def sample_positions(
    output_shape: torch.Size,
    count: int,
    generator: torch.Generator,
    *,
    channels_last: bool = False,
    device: torch.device | None = None,
) -> Positions:
    """Draw ``count`` distinct positions of an output, or all if there are fewer.

    Args:
        output_shape: (N, O, *spatial), or (N, *spatial, O) with ``channels_last``.
        count: how many.
        generator: source of the randomness, of the CPU: the same positions on every device.
        channels_last: whether the channels are the last dimension.
        device: where the positions go; None = the CPU.
    """
    images, *spatial = (*output_shape[:-1],) if channels_last else (output_shape[0], *output_shape[2:])
    total = images * math.prod(spatial)
    if count >= total:
        flat = torch.arange(total)
    else:
        # Stratified: one position in each of `count` ranges of equal length (give or take one), so that
        # the images share them evenly; from two positions an image on, every image is seen.
        edges = torch.arange(count + 1) * total // count
        jitter = torch.rand(count, generator=generator, dtype=torch.float64)
        flat = edges[:-1] + (jitter * edges.diff()).long()
    flat, place = flat.to(device), []
    for size in reversed(spatial):
        place.append(flat % size)
        flat = flat // size
    return Positions(flat, tuple(reversed(place)), channels_last)


def pick(outputs: Tensor, positions: Positions) -> Tensor:
    """Return the output vectors at the positions, shape (count, O)."""
    if positions.channels_last:
        return outputs[(positions.image, *positions.place)]
    return _at(outputs, positions.image, positions.place)


def _at(values: Tensor, image: Tensor, place: Sequence[Tensor]) -> Tensor:
    index: tuple[Any, ...] = (image, slice(None), *place)
    return values[index]


def input_patches(inputs: Tensor, layer: Conv | nn.Linear, positions: Positions) -> Tensor:
    """Return the input patch that each output position reads.

    Args:
        inputs: shape (N, I, *spatial), before padding; (N, *spatial, I) for a linear layer.
        layer: gives kernel size, stride, dilation, padding and padding mode.
        positions: output positions.

    Returns:
        Shape (count, I, taps), the taps in the order of the weight's last dimensions.
    """
    if isinstance(layer, nn.Linear):
        return inputs[(positions.image, *positions.place)].unsqueeze(-1)
    conv = layer
    starts = [place * stride for place, stride in zip(positions.place, conv.stride, strict=True)]
    if max(conv.kernel_size) == 1 and not any(padding_amounts(conv)):
        return _at(inputs, positions.image, starts).unsqueeze(-1)
    padded = pad_inputs(inputs, conv)
    dims = len(starts)
    indices = []
    for dim, (start, size, dilation) in enumerate(zip(starts, conv.kernel_size, conv.dilation, strict=True)):
        taps = [1] * dims
        taps[dim] = size
        steps = torch.arange(size, device=start.device) * dilation
        indices.append(start.reshape(-1, *[1] * dims) + steps.reshape(1, *taps))
    image = positions.image.reshape(-1, *[1] * dims)
    found = padded.movedim(1, -1)[(image, *indices)]  # (n, *kernel, I)
    # In memory order, so that cutting it into groups makes no second copy of what is large.
    return found.flatten(1, dims).transpose(1, 2).contiguous()


def pad_inputs(inputs: Tensor, conv: Conv) -> Tensor:
    """Pad as the conv itself would, in its own padding mode."""
    amounts = padding_amounts(conv)
    if not any(amounts):
        return inputs
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(inputs, amounts, mode=mode)


def padding_amounts(conv: Conv) -> tuple[int, ...]:
    """Return the padding in front and behind, in pixels, the last dimension first, as ``F.pad`` takes it."""
    amounts: list[int] = []
    for dim in reversed(range(len(conv.kernel_size))):
        if conv.padding == "valid":
            amounts += (0, 0)
        elif conv.padding == "same":
            total = conv.dilation[dim] * (conv.kernel_size[dim] - 1)
            amounts += (total // 2, total - total // 2)
        else:
            amounts += (int(conv.padding[dim]),) * 2
    return tuple(amounts)


def compact(values: Tensor) -> Tensor:
    """Halve the memory of float32 values that wait for later, where half precision can hold them."""
    if values.dtype != torch.float32 or not values.numel():
        return values
    low, high = torch.aminmax(_in_memory_order(values))
    return values.half() if max(-float(low), float(high)) < _HALF_LIMIT else values


def _in_memory_order(values: Tensor) -> Tensor:
    """View a channels-last tensor as it lies in memory: reductions copy anything else first."""
    if values.is_contiguous() or values.dim() < 3:
        return values
    return values.movedim(1, -1)
