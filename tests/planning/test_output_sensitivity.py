"""Plans for models that give no class scores: what counts is how far their outputs are off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupify.conversion.conversion import convert
from groupify.errors import DataError, GroupifyWarning, SpecError
from groupify.files import cache_folder
from groupify.graph.forward import output_tensors
from groupify.planning.race import BudgetPlan
from groupify.planning.rules import Rules
from groupify.planning.search import HeldOut, Images, SearchOptions, plan_for_budget
from groupify.planning.uniform import plan
from groupify.reporting.budget import race_lines
from groupify.scores import measure_cost
from groupify.structures import Plan
from groupify.tasks import describe_outputs, has_classes
from tests.conftest import Run

SHAPE = (3, 16, 16)
RULES = Rules(min_group_width=1)


@pytest.fixture(autouse=True)
def _few_samples() -> Iterator[None]:
    """The nets are tiny: a poor fit is no concern here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GroupifyWarning)
        yield


@pytest.fixture(scope="module", autouse=True)
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the convs of a net lose is measured once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROUPIFY_CACHE", str(tmp_path_factory.mktemp("kept")))
        yield


class Segmenter(nn.Module):
    """Scores for each pixel from two branches, of which one hardly counts; several outputs, one nested."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.counts, self.hardly = (
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)) for _ in range(2)
        )
        self.head, self.edges = nn.Conv2d(32, 5, 1), nn.Conv2d(32, 1, 1)

    def forward(self, images: Tensor) -> dict[str, Any]:
        value = torch.relu_(self.stem(images))
        value = torch.relu_(self.counts(value)) + 0.03 * torch.relu_(self.hardly(value))
        return {"out": self.head(value), "more": [self.edges(value)]}


class Enlarger(nn.Module):
    """Twice the size: what is added to the enlarged image comes from two convs in a row and one beside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.counts = nn.Conv2d(32, 32, 3, padding=1)
        self.hardly = nn.Conv2d(32, 32, 3, padding=1)
        self.tail = nn.Conv2d(32, 12, 3, padding=1)
        self.enlarge = nn.PixelShuffle(2)

    def forward(self, images: Tensor) -> Tensor:
        value = torch.relu(self.stem(images))
        value = torch.relu(self.counts(value)) + 0.03 * torch.relu(self.hardly(value))
        enlarged: Tensor = self.enlarge(self.tail(value))
        return enlarged + nn.functional.interpolate(images, scale_factor=2)


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def images(count: int = 48, seed: int = 0) -> Tensor:
    """Smooth noise: neighbouring pixels are alike, as on photographs."""
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(nn.functional.pad(noise, (2, 2, 2, 2), "reflect"), 5, 1) * 5


def planned(model: nn.Module, budget: str = "macs=45%", **options: Any) -> BudgetPlan:
    search = SearchOptions(**{"cache": cache_folder(), **options})
    return plan_for_budget(model, SHAPE, budget, images(), rules=RULES, options=search)


def error(model: nn.Module, other: nn.Module) -> float:
    """The relative error of the outputs on images that nothing was fitted to, by hand."""
    fresh = images(16, seed=1)
    with torch.no_grad():
        pairs = zip(output_tensors(model(fresh)), output_tensors(other(fresh)), strict=True)
    return sum(float((own - found).square().mean() / own.var()) for own, found in pairs)


def converted(model: nn.Module, chosen: Plan) -> nn.Module:
    return convert(model, chosen, images()).model.eval()


@pytest.mark.parametrize("kind", [Segmenter, Enlarger])
def test_what_the_outputs_hardly_mind_gets_fewer_macs(kind: Callable[[], nn.Module]) -> None:
    model = made(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = planned(model, verify=False)
    sites = {name.split(".")[0]: site for site in found.plan.sites for name in [site.name]}
    assert sites["hardly"].macs.grouped < 0.7 * sites["counts"].macs.grouped
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    even = converted(model, plan(model, SHAPE, groups=4, rules=RULES))
    limit = measure_cost(even, images(1)).macs
    ours = converted(model, planned(model, f"macs={limit}", verify=False).plan)
    assert measure_cost(ours, images(1)).macs <= limit
    assert error(model, ours) < 0.7 * error(model, even)


def test_the_winner_is_the_one_whose_outputs_are_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupify.planning.race._FAR_BEHIND", math.inf)
    found = planned(made(Segmenter))
    measured = [contender.measured for contender in found.contenders]
    assert len(measured) > 1
    assert all(one is not None and one.drop is None for one in measured)
    errors = [one.divergence for one in measured if one is not None]
    assert errors == sorted(errors)
    own = error(made(Segmenter), converted(made(Segmenter), found.plan)) / 2  # of two outputs
    assert errors[0] == pytest.approx(own, rel=0.5)
    assert any("measured relative error of the outputs" in line for line in race_lines(found))
    assert "no class scores: (N, 5, 16, 16), (N, 1, 16, 16), judged by their relative error" in found.task


def test_losses_add_up_to_what_is_measured() -> None:
    """Also without a graph, where every replacement runs the whole model."""

    class Branching(Enlarger):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images if bool(images.sum() > -1e9) else images.flip(0))

    wholes = [planned(made(kind)) for kind in (Enlarger, Branching)]
    for found in wholes:
        measured = HeldOut(made(Enlarger), Images.split(images()))(found.plan).divergence
        assert found.winner.loss == pytest.approx(measured, rel=0.6)
    assert wholes[0].winner.loss == pytest.approx(wholes[1].winner.loss, rel=0.2)


def test_one_function_says_what_counts_as_classes() -> None:
    scores, maps = torch.randn(2, 5), torch.randn(2, 5, 4, 4)
    classes: list[Any] = [scores, {"logits": scores}, (scores, maps), {"out": scores, "aux": maps}]
    for output in classes:
        assert has_classes(output)
        assert describe_outputs(output) == "class scores (N, 5)"
    others: list[Any] = [maps, scores[:, :1], {"out": maps}, {"boxes": scores}, [maps, scores], maps[..., 0]]
    for output in others:
        assert not has_classes(output)
    assert describe_outputs({"a": maps, "b": [scores]}) == "no class scores: (N, 5, 4, 4), (N, 5)"


@pytest.mark.parametrize(
    ("budget", "sensitivity", "kind", "says"),
    [
        ("drop=1", "auto", SpecError, r"drop=1 limits the drop of accuracy, but .* no class scores: \(N, 12"),
        (
            "macs=50%",
            "fisher",
            DataError,
            r"that of class scores \(N, K\), and .*take the sensitivity 'outputs'",
        ),
    ],
)
def test_what_needs_classes_is_refused(budget: str, sensitivity: str, kind: Any, says: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 12, 3))
    with pytest.raises(kind, match=says):
        planned(model, budget, sensitivity=sensitivity)


def test_outputs_can_be_measured_for_a_classifier_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 7),
    ).eval()  # fmt: skip
    by_fisher, by_outputs = (planned(model, sensitivity=way) for way in ("auto", "outputs"))
    assert "Fisher" in by_fisher.method
    assert "class scores (N, 7)" in by_outputs.method


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned(made(Segmenter), verify=False, cache=tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("groupify.planning.sensitivity.output_sensitivities", refuse)
    again = planned(made(Segmenter), verify=False, cache=tmp_path)
    assert again.plan.recipes == first.plan.recipes


def test_the_command_line_plans_a_segmenter(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROUPIFY_CACHE", str(tmp_path))
    command = "plan tests.cli_nets:segmenter --input-size 3,8,8 --data tests.cli_nets:data --calibrate 64"
    outcome = run(*command.split(), "--budget", "macs=60%", "--min-group-width", "1")
    assert outcome.code == 0, outcome.err
    assert "no class scores: (N, 5, 8, 8)" in " ".join(outcome.out.split())
