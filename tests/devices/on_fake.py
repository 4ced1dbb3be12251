"""Runs the steps on the fake device, in its own process: ``python -m tests.devices.on_fake [no-float64]``.

Prints one JSON object: the name of each step, and what went wrong in it, or null.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings

import torch

from groupify.conversion import factor_fit, held_out
from tests.devices import fake
from tests.devices.steps import STEPS

# Of each fit of factors: every operator takes Python's time here.
_FEW = (
    (factor_fit, "EVALUATIONS", 4),
    (factor_fit, "_CHECKING_EVALUATIONS", 2),
    (factor_fit, "_FOLLOWING_EVALUATIONS", 2),
    (held_out, "_LADDER", (10.0,)),
)


def main() -> None:
    """Run all steps."""
    device = fake.register(float64="no-float64" not in sys.argv)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "An output with one or more elements was resized")  # of the fake's own
    warnings.filterwarnings("ignore", ".*are expected to be slower than the dense ones")
    for module, name, few in _FEW:
        setattr(module, name, few)
    found: dict[str, str | None] = {}
    for name, step in STEPS.items():
        try:
            step(device)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
