"""Everything that runs a model gives on another device what it gives on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.utils import backend_registration

from tests.conftest import ROOT
from tests.devices.steps import STEPS


@pytest.fixture(scope="module", params=[(), ("no-float64",)], ids=["float64", "no-float64"])
def outcomes(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """What went wrong in each step on a device that refuses what a GPU refuses."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch cannot have a device that is written in Python")
    command = [sys.executable, "-m", "tests.devices.on_fake", *request.param]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, str | None] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("step", STEPS)
def test_runs_on_a_device_that_refuses_what_a_gpu_refuses(outcomes: dict[str, str | None], step: str) -> None:
    assert outcomes[step] is None, outcomes[step]


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
def test_runs_on_the_gpu(step: str) -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        pytest.skip("PyTorch sees no GPU here")
    STEPS[step](device)
