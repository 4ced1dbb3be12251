"""Grouped convs in a dense model, and its weights from a safetensors file, with torch alone.

The text of this module is copied into the files that ``export --python`` writes, so it imports nothing of
groupify's.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64,
}  # fmt: skip


class Shuffled(nn.Module):
    """A grouped conv whose output channels are interleaved, as in ShuffleNet."""

    def __init__(self, *args: Any, shuffle_groups: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shuffle_groups = shuffle_groups

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Convolve, then shuffle; shapes as in the conv itself."""
        outputs: Tensor = super().forward(input)
        blocks: Tensor = outputs.unflatten(1, (self.shuffle_groups, -1))
        return blocks.transpose(1, 2).reshape(outputs.shape)


def grouped(conv: Any, reduce: int | None, groups: int, expand: int | None, shuffle: bool) -> nn.Module:
    """Return what takes the place of a conv, its weights still to be loaded.

    Args:
        conv: the conv, in one, two or three dimensions.
        reduce: channels behind a 1×1 conv in front; None without one.
        groups: number of groups of the conv.
        expand: channels in front of a 1×1 conv behind; None without one.
        shuffle: whether a channel shuffle follows.
    """
    base = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(conv, kind))
    place = {"stride": conv.stride, "padding": conv.padding, "padding_mode": conv.padding_mode}
    kernel = {"kernel_size": conv.kernel_size, "dilation": conv.dilation}
    inputs, outputs, biased = conv.in_channels, conv.out_channels, conv.bias is not None
    if shuffle:
        shuffled: nn.Module = type("Shuffled", (Shuffled, base), {})(
            inputs, outputs, groups=groups, bias=biased, shuffle_groups=groups, **kernel, **place
        )
        return shuffled
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if reduce is not None:
        first = place if set(conv.kernel_size) == {1} else {}  # what is not computed need not be reduced
        place = {} if first else place
        layers["reduce"] = base(inputs, reduce, 1, groups=conv.groups, bias=False, **first)
    own = biased and expand is None
    layers["core"] = base(reduce or inputs, expand or outputs, groups=groups, bias=own, **kernel, **place)
    if expand is not None:
        layers["expand"] = base(expand, outputs, 1, groups=conv.groups, bias=biased)
    return layers["core"] if len(layers) == 1 else nn.Sequential(layers)


def with_groups(model: nn.Module, sites: dict[str, tuple[int | None, int, int | None, bool]]) -> nn.Module:
    """Return a copy of a dense model with the named convs replaced."""
    model = copy.deepcopy(model)
    for name, site in sites.items():
        become(model.get_submodule(name), grouped(model.get_submodule(name), *site))
    return model


def become(conv: nn.Module, replacement: nn.Module) -> None:
    """Turn a conv into its replacement; hooks, attributes and layers of its own stay on it."""
    if type(replacement) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        conv.__class__ = type(replacement)
    for name in ("weight", "bias"):
        del conv._parameters[name]
    conv._parameters.update(replacement._parameters)
    conv._modules.update(replacement._modules)
    sizes = {name: value for name, value in vars(replacement).items() if not name.startswith("_")}
    vars(conv).update(sizes | {"training": conv.training})


def read_safetensors(path: str | Path) -> OrderedDict[str, Tensor]:
    """Return the tensors of a safetensors file: a length, a JSON header, then the bytes of all tensors."""
    content = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    tensors = OrderedDict[str, Tensor]()
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        values = torch.empty(0, dtype=dtype)
        if last > first:
            values = torch.frombuffer(content[start + first : start + last], dtype=dtype)
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def fill(model: nn.Module, state: OrderedDict[str, Tensor], channels_last: bool) -> nn.Module:
    """Load weights strictly into a model, which takes their types, and return it in eval mode."""
    types = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(types) == 1:
        model.to(types.pop())
    target = model.state_dict(keep_vars=True)
    for name, value in target.items():
        if name in state and value.dtype != state[name].dtype:
            value.data = value.data.to(state[name].dtype)
    for name in state.keys() - target.keys():
        # Tensors that were no part of the state of the dense model, but have other values here.
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        module._non_persistent_buffers_set.discard(own)
        if isinstance(vars(module).get(own), Tensor):
            module.register_buffer(own, vars(module).pop(own))
    # Some modules (torchvision's MNASNet) refuse a state without their own version number.
    state._metadata = getattr(target, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(state, strict=True)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.eval()
