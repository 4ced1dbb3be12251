"""The convs of a model, what feeds and reads each, and the permutation classes of its channels."""

from groupify.graph.channels import ChannelClass, ChannelUse, channel_classes
from groupify.graph.permute import apply_orders
from groupify.graph.trace import Traced, trace

__all__ = ["ChannelClass", "ChannelUse", "Traced", "apply_orders", "channel_classes", "trace"]
