"""Models that fail in ways of their own; the command line names them ``tests.cases.bad_nets:...``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.cases.small import Between

MESSAGE = "no such thing as a free lunch"


class HungryError(Exception):
    """Of the user's own, with a line break in its text."""

    def __str__(self) -> str:
        return MESSAGE.replace("thing as", "thing\nas")


class Failing(Between):
    """Raises, always or under a condition."""

    def __init__(self, when: str = "always") -> None:
        super().__init__(torch.relu)
        self.when = when
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.when == "always" or (self.when == "many images" and len(x) > 4):
            raise HungryError
        return super().forward(x)


def failing() -> nn.Module:
    return Failing()


def failing_on_many_images() -> nn.Module:
    return Failing("many images")


class Odd(Between):
    """Returns what is no result."""

    def __init__(self, result: Any) -> None:
        super().__init__(torch.relu)
        self.result = result

    def forward(self, x: Tensor) -> Any:
        super().forward(x)
        return self.result


def without_result() -> nn.Module:
    return Odd(None)


class Unfinished(nn.Module):
    """Has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)
