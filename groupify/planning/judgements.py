"""What was measured of plans, kept on disk: a search that was interrupted goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from groupify.data.calls import Inputs, model_inputs
from groupify.files import NumberCache, fingerprint
from groupify.machine import describe_machine, package_version
from groupify.paired import Paired
from groupify.scores import Judgement
from groupify.structures import Plan

_VERSION = "2"  # of what is measured: another one makes the kept numbers void
_DIVERGENCE, _COUNTS = "divergence", ("lost", "gained", "images")


class Judgements:
    """Judgements of the plans of one model, by the same images.

    Args:
        path: the file; None = they are kept in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._store = NumberCache(path)

    @classmethod
    def of(
        cls, folder: Path, model: nn.Module, images: Sequence[Tensor], inputs: Inputs | None, *setting: str
    ) -> Judgements:
        """Return those that are kept in a folder.

        Args:
            folder: of the cache.
            model: the dense model.
            images: to fit on and to measure on, and labels where there are some.
            inputs: a batch of images → what the model is called with; None = the images.
            setting: whatever else they depend on.
        """
        # A function has no fingerprint, but what it gives has.
        given = () if inputs is None else model_inputs(images[0], inputs).tensors
        texts = (_VERSION, str(package_version("groupify")), str(describe_machine()), repr(model), *setting)
        key = fingerprint(texts, (*model.state_dict().values(), *images, *given))
        return cls(folder / f"judgements-{key}.json")

    def get(self, plan: Plan) -> Judgement | None:
        """Return what was measured of a plan; None = nothing."""
        numbers, name = self._store.numbers, _name(plan)
        divergence = numbers.get(f"{name} {_DIVERGENCE}")
        if divergence is None:
            return None
        counts = [int(numbers[key]) for count in _COUNTS if (key := f"{name} {count}") in numbers]
        changed = Paired(*counts) if len(counts) == len(_COUNTS) else None
        return Judgement(divergence, None if changed is None else changed.drop, changed)

    def put(self, plan: Plan, judgement: Judgement) -> None:
        """Keep what was measured of a plan."""
        name, changed = _name(plan), judgement.changed
        counts = {} if changed is None else {count: float(getattr(changed, count)) for count in _COUNTS}
        numbers = {_DIVERGENCE: judgement.divergence, **counts}
        self._store.add({f"{name} {what}": number for what, number in numbers.items()})


def _name(plan: Plan) -> str:
    return fingerprint((plan.precision, str(plan.input_shape), *map(repr, plan.recipes)))
