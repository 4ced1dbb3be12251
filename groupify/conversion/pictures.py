"""What clustering did to a conv, as a small picture: the flow between channels before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from groupify.conversion.clustering import SiteScore
from groupify.documents import Amount, Bytes, Count1
from groupify.graph.channels import Channels
from groupify.graph.permute import layer_orders, row_channels

PICTURES = 3
_SIDE = 48  # pixels at most: enough to see blocks, and one byte each


@dataclass(frozen=True)
class BlockPicture:
    """How much of each output of a conv comes through each input; the grouped conv keeps the diagonal blocks.

    Attributes:
        name: qualified module name.
        groups: number of diagonal blocks.
        rows, columns: size of the pictures; outputs by inputs, several channels to a pixel.
        before, after: one byte per pixel, row by row, 0 to 255, with the given channel order and the chosen.
        kept_before, kept: share of the flow inside the blocks, before and after.
    """

    name: str
    groups: Count1
    rows: Count1
    columns: Count1
    before: Bytes
    after: Bytes
    kept_before: Amount
    kept: Amount


def block_pictures(
    scores: Sequence[SiteScore], channels: Channels, orders: Mapping[int, Tensor], *, count: int = PICTURES
) -> tuple[BlockPicture, ...]:
    """Draw the convs that gained the most from the chosen channel orders, the largest gain first.

    Args:
        scores: flow between the channels of each site, in the given order.
        channels, orders: what was permuted, as for ``graph.apply_orders``.
        count: pictures at most; convs that gained nothing get none, nor those whose outputs read all groups.
    """
    drawn = []
    for one in scores:
        if one.site.structure.expand is not None:
            continue
        inputs, outputs = layer_orders(one.site.name, channels, orders)
        rows = row_channels(len(one.score), one.site.groups, one.site.shuffle)
        drawn.append(_picture(one, one.score[rows], one.score[outputs][:, inputs][rows]))
    gained = [picture for picture in drawn if picture.kept > picture.kept_before]
    return tuple(sorted(gained, key=lambda picture: picture.kept_before - picture.kept)[:count])


def _picture(one: SiteScore, before: Tensor, after: Tensor) -> BlockPicture:
    rows, columns = (min(_SIDE, length) for length in before.shape)
    small = [
        F.adaptive_avg_pool2d(score.float()[None, None], (rows, columns))[0, 0].sqrt()
        for score in (before, after)
    ]
    brightest = max(float(score.amax()) for score in small) or 1.0
    levels = [(score * (255 / brightest)).round().to(torch.uint8) for score in small]
    return BlockPicture(
        name=one.site.name,
        groups=one.site.groups,
        rows=rows,
        columns=columns,
        before=bytes(levels[0].flatten().tolist()),
        after=bytes(levels[1].flatten().tolist()),
        kept_before=_kept(before, one.site.groups),
        kept=_kept(after, one.site.groups),
    )


def _kept(score: Tensor, groups: int) -> float:
    blocks = score.reshape(groups, score.shape[0] // groups, groups, score.shape[1] // groups)
    return float(torch.einsum("aiaj->", blocks) / score.sum().clamp(min=1e-30))
