"""Attention in the form that PyTorch's exporter to ONNX takes."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PlainAttention(TorchFunctionMode):
    """Gives every scaled dot-product attention four dimensions while it is on.

    The exporter knows attention over (batch, heads, length, width) alone; that of windows has more in front.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _attend(*args, **kwargs)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor:
    leading = query.shape[:-3]
    same = key.shape[:-3] == value.shape[:-3] == leading
    folded = len(leading) > 1 and same and (attn_mask is None or attn_mask.dim() <= 3)
    if folded:
        query, key, value = (tensor.flatten(0, -4) for tensor in (query, key, value))
    found: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **named)
    return found.unflatten(0, leading) if folded else found
