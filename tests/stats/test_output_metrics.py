from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from groupify.graph.call import Call
from groupify.stats.output_metrics import output_metrics
from groupify.tasks import OUTPUTS


def images(count: int = 64, channels: int = 3, size: int = 6) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


class Pooled(nn.Module):
    """A conv, whose outputs are mixed by a matrix behind a mean over the positions."""

    def __init__(self, mixed: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, mixed.shape[1], 3)
        self.mixed = nn.Parameter(mixed)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.conv(x).mean((2, 3)) @ self.mixed.T
        return value


def of_unit_mean(matrix: Tensor) -> Tensor:
    return matrix / matrix.diagonal().mean()


def test_of_outputs_it_is_what_the_matrix_behind_makes_of_their_errors() -> None:
    mixed = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    found = output_metrics(Pooled(mixed).eval(), [Call((images(256),))], ["conv"], task=OUTPUTS)
    torch.testing.assert_close(found["conv"].float(), of_unit_mean(mixed.T @ mixed), atol=0.1, rtol=0.1)


def test_of_classes_it_is_the_fisher_information() -> None:
    mixed = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    model, seen = Pooled(mixed).eval(), images(256)
    chances = model(seen).detach().softmax(1)
    curvature = torch.diag(chances.mean(0)) - chances.T @ chances / len(chances)
    found = output_metrics(model, [Call((part,)) for part in seen.split(100)], ["conv"])
    expected = of_unit_mean(mixed.T @ curvature @ mixed)
    torch.testing.assert_close(found["conv"].float(), expected, atol=0.15, rtol=0.15)


def test_outputs_count_relatively_and_each_by_itself() -> None:
    """An output in other units says nothing else."""

    class Two(Pooled):
        def forward(self, x: Tensor) -> Any:
            whole = super().forward(x)
            return whole[:, :2], whole[:, 2:]

    class Scaled(Two):
        def forward(self, x: Tensor) -> Any:
            first, second = super().forward(x)
            return first, 1000 * second

    mixed = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    one, other = (
        output_metrics(kind(mixed).eval(), [Call((images(),))], ["conv"], task=OUTPUTS)["conv"]
        for kind in (Two, Scaled)
    )
    torch.testing.assert_close(one, other)


def test_it_repeats_itself_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = images()
    one, two = (output_metrics(model, [Call((seen,))], ["0"])["0"] for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(seen, images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model[0]._forward_hooks


class Inplace(nn.Module):
    """Changes what it is given, and what its conv gave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        value: Tensor = self.conv(x)
        value.mul_(2)
        return value.mean((2, 3))


class Undifferentiated(nn.Module):
    """The conv is in a part that runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            value: Tensor = self.conv(x).mean((2, 3))
        return value


def test_a_model_that_works_in_place_has_one() -> None:
    seen = images()
    assert set(output_metrics(Inplace().eval(), [Call((seen,))], ["conv"])) == {"conv"}
    assert torch.equal(seen, images())


def test_without_gradients_there_is_none() -> None:
    assert output_metrics(Undifferentiated().eval(), [Call((images(),))], ["conv"]) == {}


def test_outputs_that_nothing_reads_have_none() -> None:
    net = Pooled(torch.zeros(5, 4)).eval()
    assert output_metrics(net, [Call((images(),))], ["conv"], task=OUTPUTS) == {}
