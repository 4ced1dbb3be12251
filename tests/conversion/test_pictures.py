from __future__ import annotations

import torch
from torch import Tensor, nn

from groupify.conversion.clustering import SiteScore
from groupify.conversion.pictures import block_pictures
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.channels import channel_classes
from groupify.structures import SiteRecipe, Structure


class Pair(nn.Module):
    """The channels between the convs may be reordered; the flow into them may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(8, 2, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.third(torch.relu(self.second(torch.relu(self.first(inputs)))))
        return outputs


def test_reordering_brings_the_flow_into_the_blocks() -> None:
    net = Pair()
    call = Call((torch.zeros(2, 3, 4, 4),))
    graph = capture(net, call).graph
    assert graph is not None
    channels = channel_classes(graph, call)
    shuffled = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    blocks = torch.kron(torch.eye(2), torch.ones(4, 4))
    score = torch.zeros(8, 8)
    score[shuffled.unsqueeze(1), shuffled] = blocks
    site = SiteRecipe("second", Structure(groups=2))
    orders = {index: shuffled for index, found in enumerate(channels.classes) if found.size == 8}
    assert len(orders) == 2
    (picture,) = block_pictures([SiteScore(site, score)], channels, orders)
    assert (picture.name, picture.groups, picture.rows, picture.columns) == ("second", 2, 8, 8)
    assert (picture.kept_before, picture.kept) == (0.5, 1.0)
    assert picture.after == bytes((255 * blocks).to(torch.uint8).flatten().tolist())
    assert picture.before == bytes((255 * score).to(torch.uint8).flatten().tolist())
    identity = {index: torch.arange(8) for index in orders}
    assert block_pictures([SiteScore(site, score)], channels, identity) == ()


def test_pictures_are_small_and_few() -> None:
    net = nn.Sequential(*(nn.Conv2d(96, 96, 1) for _ in range(5)))
    call = Call((torch.zeros(2, 96, 2, 2),))
    graph = capture(net, call).graph
    assert graph is not None
    channels = channel_classes(graph, call)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(96, generator=generator)
    scores = []
    for strength in range(4):
        score = torch.full((96, 96), 1.0)
        score[order.unsqueeze(1), order] += strength * torch.kron(torch.eye(4), torch.ones(24, 24))
        scores.append(SiteScore(SiteRecipe(str(strength), Structure(groups=4)), score))
    orders = dict.fromkeys(range(len(channels.classes)), order)
    pictures = block_pictures(scores[1:], channels, orders)
    assert [picture.name for picture in pictures] == ["3", "2", "1"]
    assert all(len(picture.before) == 48 * 48 for picture in pictures)
