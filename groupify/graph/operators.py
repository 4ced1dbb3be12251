"""What each ATen operator does to channels: one table.

An operator that is not in it freezes the channels that it reads, which is always safe.
"""

from __future__ import annotations

import operator
from enum import Enum
from typing import Any

import torch
from torch import fx


class Effect(Enum):
    """What an operator does to the channels of the tensors that it reads."""

    ELEMENTWISE = "each element of the output depends on the elements at its own place"
    SAME = "the values stay what they are, up to rounding"
    WITHIN_CHANNELS = "each channel (dimension 1) by itself, over space"
    MOVES = "values change places and nothing else"
    REDUCES = "over dimensions along which the channel does not change"
    SIZES = "no values at all, or none that depend on those of a tensor"
    CONV = "convolution"
    TRANSPOSED_CONV = "transposed convolution"
    LINEAR = "linear layer, features last"
    CHANNEL_NORM = "normalises each channel (dimension 1) by itself"
    GROUP_NORM = "normalises blocks of channels"
    LAYER_NORM = "normalises the last dimension"
    PAD = "pads"
    UNKNOWN = "anything"


_TABLE: dict[Effect, str] = {
    Effect.ELEMENTWISE: """
        relu relu6 leaky_relu rrelu elu celu selu gelu silu mish hardswish hardsigmoid hardtanh
        hardshrink softshrink sigmoid tanh softplus log_sigmoid threshold abs square sqrt rsqrt exp
        exp2 expm1 log log2 log10 log1p neg negative reciprocal pow add sub subtract mul multiply
        div divide true_divide floor_divide rsub maximum minimum clamp clip clamp_min clamp_max erf
        sin cos tan atan atan2 asin acos sinh cosh sign floor ceil round trunc frac fmod remainder
        where fill eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and
        bitwise_or bitwise_not isnan isinf isfinite nan_to_num masked_fill addcmul addcdiv lerp
        square hypot logaddexp logit sinc zeros_like ones_like full_like
    """,
    Effect.SAME: """
        clone contiguous detach alias lift_fresh_copy lift_fresh _to_copy to type_as float half
        double dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout identity
        positive resolve_conj resolve_neg view_as_real_copy
    """,
    Effect.WITHIN_CHANNELS: """
        max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d
        avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
        upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
        _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d
        reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    """,
    Effect.MOVES: """
        view view_as reshape reshape_as _unsafe_view view_copy _reshape_copy flatten unflatten
        transpose permute t swapaxes movedim squeeze unsqueeze expand expand_as repeat tile cat
        concat stack chunk tensor_split split split_with_sizes unbind narrow slice select flip roll
        diagonal numpy_T mT channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle
        slice_scatter select_scatter copy broadcast_to repeat_interleave unsafe_split unsafe_chunk
        permute_copy transpose_copy expand_copy slice_copy select_copy squeeze_copy unsqueeze_copy
        split_copy split_with_sizes_copy unbind_copy rot90
    """,
    Effect.REDUCES: "mean sum amax amin var std logsumexp prod any all norm linalg_vector_norm",
    Effect.SIZES: """
        sym_size sym_numel sym_stride sym_storage_offset size numel dim zeros ones full empty arange
        scalar_tensor eye linspace new_zeros new_ones new_full new_empty empty_like
    """,
    Effect.CONV: "conv1d conv2d conv3d",
    Effect.TRANSPOSED_CONV: "conv_transpose1d conv_transpose2d conv_transpose3d",
    Effect.LINEAR: "linear",
    Effect.CHANNEL_NORM: "batch_norm instance_norm prelu",
    Effect.GROUP_NORM: "group_norm",
    Effect.LAYER_NORM: "layer_norm rms_norm",
    Effect.PAD: "pad constant_pad_nd",
}  # fmt: skip

_EFFECTS = {name: effect for effect, names in _TABLE.items() for name in names.split()}
# What Python computes with sizes.
_ON_NUMBERS = (
    "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge",
)  # fmt: skip
_ON_SYMBOLS = ["sym_max", "sym_min", "sym_not", "sym_float", "sym_int", "sym_ite", "sym_sum"]
_ON_SIZES = {getattr(operator, name) for name in _ON_NUMBERS} | {getattr(torch, name) for name in _ON_SYMBOLS}

CONVS = frozenset(_TABLE[Effect.CONV].split())
ADDITION, CONCATENATIONS, RELU, BATCH_NORM = "add", ("cat", "concat"), "relu", "batch_norm"


def operator_name(node: fx.Node) -> str:
    """Return the name of the ATen operator of a node without its overload; ``""`` where it is none."""
    return packet_name(node.target) if node.op == "call_function" else ""


def packet_name(target: Any) -> str:
    """Return the name of an ATen operator without its overload; ``""`` for anything else."""
    return (
        str(target.overloadpacket.__name__)
        if isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims")
        else ""
    )


def effect(node: fx.Node) -> Effect:
    """Return what a node does to channels."""
    if node.op != "call_function":
        return Effect.UNKNOWN
    if node.target is operator.getitem:
        return Effect.MOVES  # picks one of several outputs
    if node.target in _ON_SIZES:
        return Effect.SIZES
    return _EFFECTS.get(operator_name(node), Effect.UNKNOWN)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument of a node that may be given by position or by name, or may have its default."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
