"""Sample output positions of a conv and cut out the input patches that they read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Values up to here survive half precision; larger ones are kept in float32.
_HALF_LIMIT = 6.0e4


@dataclass(frozen=True)
class Positions:
    """Output positions of a conv within one batch; all tensors have shape (count,)."""

    image: Tensor
    row: Tensor
    column: Tensor

    def __len__(self) -> int:
        return len(self.image)


def sample_positions(output_shape: torch.Size, count: int, generator: torch.Generator) -> Positions:
    """Draw ``count`` distinct positions of an output of shape (N, O, H, W), or all if there are fewer."""
    images, _, height, width = output_shape
    total = images * height * width
    if count >= total:
        flat = torch.arange(total)
    else:
        # Stratified: one position in each of `count` ranges of equal length (give or take one), so that
        # the images share them evenly; from two positions an image on, every image is seen.
        edges = torch.arange(count + 1) * total // count
        jitter = torch.rand(count, generator=generator, dtype=torch.float64)
        flat = edges[:-1] + (jitter * edges.diff()).long()
    image = flat // (height * width)
    return Positions(image, flat // width % height, flat % width)


def pick(outputs: Tensor, positions: Positions) -> Tensor:
    """Return the output vectors at the positions; (N, O, H, W) → (count, O)."""
    return outputs[positions.image, :, positions.row, positions.column]


def as_images(values: Tensor) -> Tensor:
    """Give the features of a linear layer, shape (N, F), the shape of an image, (N, F, 1, 1)."""
    return values[:, :, None, None] if values.dim() == 2 else values


def input_patches(inputs: Tensor, layer: nn.Conv2d | nn.Linear, positions: Positions) -> Tensor:
    """Return the input patch that each output position reads.

    Args:
        inputs: shape (N, I, H, W), before padding; (N, I) for a linear layer.
        layer: gives kernel size, stride, dilation, padding and padding mode.
        positions: output positions.

    Returns:
        Shape (count, I, kh·kw), the taps in the order of the weight's last two dimensions.
    """
    if isinstance(layer, nn.Linear):
        return inputs[positions.image].unsqueeze(-1)
    conv = layer
    kernel_height, kernel_width = conv.kernel_size
    if conv.kernel_size == (1, 1) and not any(padding_amounts(conv)):
        rows, columns = positions.row * conv.stride[0], positions.column * conv.stride[1]
        return inputs[positions.image, :, rows, columns].unsqueeze(-1)
    padded = pad_inputs(inputs, conv)
    row_taps = torch.arange(kernel_height) * conv.dilation[0]
    column_taps = torch.arange(kernel_width) * conv.dilation[1]
    rows = (positions.row * conv.stride[0])[:, None, None] + row_taps[None, :, None]
    columns = (positions.column * conv.stride[1])[:, None, None] + column_taps[None, None, :]
    taps = padded.permute(0, 2, 3, 1)[positions.image[:, None, None], rows, columns]  # (n, kh, kw, I)
    # In memory order, so that cutting it into groups makes no second copy of what is large.
    return taps.flatten(1, 2).transpose(1, 2).contiguous()


def pad_inputs(inputs: Tensor, conv: nn.Conv2d) -> Tensor:
    """Pad as the conv itself would, in its own padding mode."""
    amounts = padding_amounts(conv)
    if not any(amounts):
        return inputs
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(inputs, amounts, mode=mode)


def padding_amounts(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom) padding in pixels."""
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    height, width = (int(amount) for amount in conv.padding)
    return (width, width, height, height)


def compact(values: Tensor) -> Tensor:
    """Halve the memory of float32 values that wait for later, where half precision can hold them."""
    if values.dtype != torch.float32 or not values.numel():
        return values
    low, high = torch.aminmax(values)
    return values.half() if max(-float(low), float(high)) < _HALF_LIMIT else values
