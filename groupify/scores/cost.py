"""What a model costs: parameters, multiply-accumulates (MACs), weight and activation bytes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from groupify.errors import ConversionError, GroupifyError


@dataclass(frozen=True)
class ModelCost:
    """Cost of one forward pass over one image.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates of convs, linears and matrix products.
        weight_bytes: bytes of parameters and buffers.
        activation_bytes: largest sum of tensors alive at the same time during the pass, weights
            excluded, as eager PyTorch runs it in inference.
    """

    params: int
    macs: int
    weight_bytes: int
    activation_bytes: int


def conv_params(
    in_channels: int, out_channels: int, kernel_size: tuple[int, ...], groups: int, bias: bool
) -> int:
    """Count the parameters of a conv: in/groups × out × kernel, and a bias each.

    >>> conv_params(8, 6, (1, 1), groups=2, bias=True)
    30
    """
    area = 1
    for size in kernel_size:
        area *= size
    return in_channels // groups * out_channels * area + (out_channels if bias else 0)


def measure_cost(model: nn.Module, example: Tensor) -> ModelCost:
    """Count what one forward pass costs.

    Args:
        model: any module; run once in inference mode, then put back into its training mode.
        example: input, shape (1, C, H, W).

    Raises:
        ConversionError: the model does not run on an input of that shape.
    """
    tensors = [*model.parameters(), *model.buffers()]
    peak = _PeakActivations(example, ignored=tensors)
    counter = FlopCounterMode(display=False)
    with counter, peak:
        run_once(model, example)
    return ModelCost(
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        activation_bytes=peak.peak_bytes,
    )


def run_once(model: nn.Module, example: Tensor) -> Any:
    """Run one forward pass in inference mode without gradients; the training mode is put back.

    Raises:
        ConversionError: the model does not run on an input of that shape.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return model(example)
    except (GroupifyError, MemoryError):
        raise
    except Exception as error:  # the user's model can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(
            f"the model does not run on an input of shape {tuple(example.shape)}: {reason}; "
            "give the shape that it expects with --input-size C,H,W"
        ) from error
    finally:
        for module, was_training in training.items():
            module.training = was_training


class _PeakActivations(TorchDispatchMode):
    """Follows which tensors are alive, by storage, and keeps the largest sum."""

    def __init__(self, example: Tensor, ignored: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}  # views of weights
        self._alive: dict[int, list[int]] = {}  # storage address → [bytes, number of tensors]
        self._bytes = 0
        self.peak_bytes = 0
        self._follow(example)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._ignored:
            return
        entry = self._alive.get(address)
        if entry is None:
            entry = self._alive[address] = [storage.nbytes(), 0]
            self._bytes += entry[0]
        entry[1] += 1
        weakref.finalize(tensor, self._forget, address)

    def _forget(self, address: int) -> None:
        entry = self._alive.get(address)
        if entry is None:
            return
        entry[1] -= 1
        if entry[1] == 0:
            self._bytes -= entry[0]
            del self._alive[address]
