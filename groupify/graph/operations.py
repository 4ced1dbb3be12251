"""What the operations of a graph do to channels: leave them alone, work within each, or only move them.

An operation in none of these tables freezes the channels that it reads, which is always safe.
"""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, stochastic_depth

# Each element of the output depends on the elements at its own place only.
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Softsign, nn.LogSigmoid, nn.Threshold, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.Identity,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS: set[Any] = {
    F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu,
    F.mish, F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, torch.sigmoid, F.tanh, torch.tanh, F.softplus,
    F.dropout, F.dropout2d, torch.clamp, torch.abs, torch.square, torch.sqrt, torch.rsqrt, torch.exp,
    torch.log, torch.neg, torch.reciprocal, operator.neg, operator.pow, torch.pow, operator.add,
    operator.iadd, torch.add, operator.sub, operator.isub, torch.sub, operator.mul, operator.imul, torch.mul,
    operator.truediv, operator.itruediv, torch.div, torch.maximum, torch.minimum, stochastic_depth,
}  # fmt: skip
ELEMENTWISE_METHODS = {
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp", "clamp_", "abs", "neg", "pow", "sqrt",
    "rsqrt", "square", "exp", "log", "reciprocal", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_",
    "maximum", "minimum",
}  # fmt: skip

# The values stay what they are, up to rounding; further tensor arguments only give a dtype or device.
PASSING_METHODS = {
    "contiguous", "clone", "detach", "float", "to", "type_as", "half", "bfloat16", "double",
}  # fmt: skip

# Each channel (dimension 1) by itself, over space.
SPATIAL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.LPPool2d, nn.Upsample, nn.UpsamplingBilinear2d,
    nn.UpsamplingNearest2d, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
SPATIAL_FUNCTIONS: set[Any] = {
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
    torch.max_pool2d, F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d,
}  # fmt: skip

# Values change places and nothing else, so that they can be run on labels.
MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
CONCATENATIONS: set[Any] = {torch.cat, torch.concat}
MOVING_FUNCTIONS: set[Any] = {
    torch.flatten, torch.reshape, torch.cat, torch.concat, torch.stack, torch.chunk, torch.split,
    torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.unbind, torch.narrow,
    torch.channel_shuffle, F.channel_shuffle, F.pixel_shuffle, operator.getitem,
}  # fmt: skip
MOVING_METHODS = {
    "view", "reshape", "flatten", "transpose", "permute", "chunk", "split", "squeeze", "unsqueeze",
    "expand", "unbind", "narrow", "repeat", "unflatten", "t",
}  # fmt: skip

# Over dimensions along which the channel does not change.
REDUCTIONS: set[Any] = {torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin"}

# What they return does not depend on the values of the tensor.
METADATA: set[Any] = {
    "size", "dim", "numel", "ndimension", "stride", "element_size", "is_floating_point", "get_device",
    "nelement", torch.numel, torch.is_floating_point, getattr, len,
}  # fmt: skip

BATCH_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d,
    FrozenBatchNorm2d,
)  # fmt: skip
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def conv_kind(module: nn.Module) -> type[Conv] | None:
    """Return the conv class whose computation a module has; None for any other, as a subclass may be.

    A subclass that changes the constructor alone (torchvision's video models have such) computes the same.
    """
    for kind in CONVS:
        if isinstance(module, kind):
            same = type(module).forward is kind.forward
            return kind if same and type(module)._conv_forward is kind._conv_forward else None
    return None


BatchNorm = nn.modules.batchnorm._BatchNorm


def is_batch_norm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a module is a batch norm that has running statistics, in any number of dimensions.

    Detection models hold theirs as constants, in a class of torchvision's own with the same names.
    """
    return isinstance(module, (BatchNorm, FrozenBatchNorm2d)) and module.running_mean is not None
