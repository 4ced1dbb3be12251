from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from groupify.conversion.surgery import restructure
from groupify.structures import SiteRecipe, Structure
from groupify.training.finetuning import finetune
from tests.training.nets import SETTINGS, make_data, make_net, splits


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The nets here are tiny: threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def data() -> TensorDataset:
    return TensorDataset(*make_data())


@pytest.fixture(scope="package")
def dense(data: TensorDataset) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make_net()
    settings = dataclasses.replace(SETTINGS, epochs=12)
    return finetune(net, splits(data), settings=settings).model


@pytest.fixture(scope="package")
def student(dense: nn.Module) -> nn.Module:
    return restructure(dense, [SiteRecipe("3", Structure(groups=8))]).eval()
