"""The one call: a dense model and images in, a compressed model and how it came about out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from groupify.conversion.conversion import Calibration
from groupify.data.batches import Data
from groupify.data.splits import DataSplits
from groupify.errors import SpecError, WrongTypeError, expect_type
from groupify.files import cache_folder
from groupify.memory import parse_bytes
from groupify.models.specs import Source
from groupify.pipeline.compressed import Compressed
from groupify.pipeline.converting import compression_stages, run_compression
from groupify.pipeline.requests import PlanRequest, families
from groupify.pipeline.subject import make_subject
from groupify.planning.budget import Budget
from groupify.planning.group_counts import GroupCounts
from groupify.planning.rules import Rules
from groupify.planning.search import SearchOptions
from groupify.scores import Metric
from groupify.stages import Stages
from groupify.structures import Precision
from groupify.tasks import AUTO


def compress(
    model: nn.Module | Source,
    images: Calibration | DataSplits | Data | Tensor | None = None,
    *,
    groups: int | str | Mapping[str, int] | None = None,
    budget: Budget | str | None = None,
    precision: Precision | None = None,
    structure: str | None = None,
    task: str = AUTO,
    metric: Metric | None = None,
    rules: Rules = Rules(),
    search: SearchOptions | None = None,
    example_inputs: Any = None,
    calibration_images: int = 1000,
    memory: int | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Compressed:
    """Plan, convert and measure: what ``groupify convert`` does, without its files.

    Args:
        model: the dense model, in memory or as ``load_model`` returns it; it is left untouched.
        images: what to fit on, labels unused: a tensor (N, C, H, W), all of which is taken; a data set, a
            ``DataLoader`` or another iterable of batches, of which ``calibration_images`` are drawn; a
            ``Calibration``; or what ``load_data`` returns, on whose test part the accuracy is measured. None:
            from the weights alone, which does not protect the accuracy.
        groups: number of groups of each conv, or numbers by name as for ``plan``. With neither this nor a
            budget, each conv gets the structure that loses least, at the MACs of 4 groups.
        budget: like ``"latency=2x"`` or ``"macs=40%,params=8M"``, in the place of ``groups``.
        precision: what the model is planned for and exported in, ``"float32"`` or ``"int8"``; None = as in
            ``rules``.
        structure: the family of structures to choose from, ``"grouped"``, ``"grouped-pointwise"``,
            ``"block-term"`` or ``"auto"``, all of them; None = as in ``rules``.
        task: what the model is judged by where structures are chosen: ``"classes"``, the softmax of its class
            scores, ``"outputs"``, their relative error, or ``"auto"``, by the form of the outputs.
        metric: a model → how well it does, higher is better, like PSNR or mIoU on images that are not among
            those to fit on. A ``drop`` in the budget is in its units; the result has it before and after.
        rules: which convs may be converted, and into what.
        search: how plans are searched; None = as on the command line, where measured latencies are kept in
            the cache folder.
        example_inputs: what the model is called with; None = with images like those given.
        calibration_images: number of images to draw from data.
        memory: bytes, or a text like ``"2GiB"``, of activations that wait in memory; what would be more waits
            on disk. None = half of what is free. A ``Calibration`` has its own.
        seed: seed of everything random.
        progress: say on stderr what is being done, with bars on a terminal.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3))
        >>> result = groupify.compress(net, torch.randn(64, 16, 8, 8), groups=2)
        >>> result.model[2]
        Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), groups=2)
        >>> round(result.costs.dense.macs / result.costs.compressed.macs, 2)
        1.31

    Raises:
        WrongTypeError: an argument of another type.
        SpecError: arguments that contradict each other, or nothing says how the model is called.
        PlanError: no conv can be converted as asked, or the budget cannot be held.
        DataError: no images, or NaN in them.
        ConversionError: the model cannot be converted.
    """
    expect_type(rules, Rules, "rules", "groupify.Rules(...)")
    expect_type(budget, (str, Budget, type(None)), "budget", 'a text like "latency=2x"')
    expect_type(search, (SearchOptions, type(None)), "search", "groupify.SearchOptions(...)")
    expect_type(memory, (int, str, type(None)), "memory", 'bytes, or a text like "2GiB"')
    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    if search is None:
        search = SearchOptions(cache=cache_folder(), seed=seed, progress=progress, memory=limit)
    search = _judged(search, task, metric)
    request = PlanRequest(
        None if groups is None else GroupCounts.of(groups),
        _ruled(rules, precision, structure),
        budget=Budget.parse(budget) if isinstance(budget, str) else budget,
        search=search,
    )
    subject = make_subject(
        model, images, example_inputs, count=calibration_images, seed=seed, memory=limit,
        metric=search.metric, task=search.task,
    )  # fmt: skip
    stages = Stages(compression_stages(subject, request), show=progress)
    return run_compression(subject, request, stages=stages)


def _judged(search: SearchOptions, task: str, metric: Metric | None) -> SearchOptions:
    """Return the options with what is said beside them.

    Raises:
        WrongTypeError: the metric is no function.
    """
    if metric is not None and not callable(metric):
        raise WrongTypeError(
            f"metric is a {type(metric).__name__}: expected a function of a model that returns a number"
        )
    return replace(search, task=search.task if task == AUTO else task, metric=metric or search.metric)


def _ruled(rules: Rules, precision: Precision | None, structure: str | None) -> Rules:
    """Return the rules with what is said beside them.

    Raises:
        SpecError: both say something, and it is not the same.
    """
    said: dict[str, Any] = {"precision": precision, "structures": families(structure)}
    for name, value in said.items():
        own = getattr(rules, name)
        if value is not None and own not in (getattr(Rules(), name), value):
            raise SpecError(f"{name} is {value!r}, and {own!r} in rules: say it once")
    return replace(rules, **{name: value for name, value in said.items() if value is not None})
