from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupify.errors import ArtefactError, ConversionError, PlanError
from groupify.planning.plan_file import PlanFile
from groupify.planning.rules import Rules
from groupify.planning.uniform import plan
from groupify.structures import SiteRecipe
from tests.cli_nets import net

SHAPE = (3, 8, 8)
recipes = st.builds(
    SiteRecipe,
    st.just("x"),
    st.sampled_from(["grouped", "grouped-pointwise"]),
    st.integers(2, 64),
    st.booleans(),
)
names = st.text(alphabet="abc.01é", min_size=1, max_size=6)


@given(st.dictionaries(names, st.none() | recipes, min_size=1, max_size=5))
def test_a_plan_reads_what_it_writes(sites: dict[str, SiteRecipe | None]) -> None:
    named = tuple(
        (name, None if recipe is None else SiteRecipe(name, recipe.kind, recipe.groups, recipe.shuffle))
        for name, recipe in sites.items()
    )
    file = PlanFile("net", "avx2", named)
    assert PlanFile.loads(file.dumps()) == file


def test_a_plan_goes_through_a_file_and_can_be_edited(tmp_path: Path) -> None:
    made = plan(net(), SHAPE, groups=4, rules=Rules(min_group_width=1, cpu="arm64"))
    path = tmp_path / "plan.json"
    PlanFile.of("net", made).write(path)
    again = PlanFile.read(path).apply(net(), SHAPE)
    assert again.recipes == made.recipes
    assert (made.cpu, again.cpu) == ("arm64", "arm64")
    assert again.macs == made.macs
    path.write_text(path.read_text().replace('"groups": 4', '"groups": 8', 1))
    assert [site.groups for site in PlanFile.read(path).apply(net(), SHAPE).converted] == [8, 4]
    document = json.loads(path.read_text())
    del document["sites"][1]
    path.write_text(json.dumps(document))
    left = PlanFile.read(path).apply(net(), SHAPE)
    assert [site.name for site in left.converted] == ["5"]
    assert left.sites[1].reason == "dense in the plan"


def document(**changes: Any) -> dict[str, Any]:
    fields = {"format": "groupify plan", "schema_version": 2, "model": "net", "cpu": "avx2"}
    site = {"name": "2", "kind": "grouped", "groups": 4, "shuffle": False}
    return {**fields, "sites": [site], **changes}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format": "groupify"}, 'expected "format": "groupify plan"'),
        ({"schema_version": 1}, "schema version is 1, this groupify reads version 2: save the plan again"),
        ({"cpu": "auto"}, "expected 'avx2'"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"sites": []}, "a list of 0"),
        ({"sites": [{"name": "2", "kind": "grouped", "groups": 1, "shuffle": False}]}, "from 2"),
        ({"sites": [{"name": "2", "kind": "grouped", "groups": 4}]}, "has no 'shuffle'"),
        ({"sites": [{"name": "2", "kind": "winograd"}]}, "expected 'dense' or 'grouped'"),
        ({"sites": [{"name": "2", "kind": "dense", "groups": 4}]}, "unknown key 'groups'"),
        ({"sites": [{"name": "2", "kind": "dense"}] * 2}, "names '2' twice"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document(**changed)))
    with pytest.raises(ArtefactError, match=says):
        PlanFile.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot read plan"):
        PlanFile.read(tmp_path / "none.json")


def test_a_plan_for_another_model_is_refused() -> None:
    def applied(*sites: tuple[str, SiteRecipe | None]) -> None:
        PlanFile("net", "any", sites).apply(net(), SHAPE)

    with pytest.raises(PlanError, match="leaves every conv dense"):
        applied(("2", None))
    with pytest.raises(ConversionError, match="no layer 'conv9'"):
        applied(("conv9", SiteRecipe("conv9", "grouped", 4)))
    with pytest.raises(PlanError, match="'conv9', which is no conv"):
        applied(("conv9", None), ("2", SiteRecipe("2", "grouped", 4)))
    with pytest.raises(ConversionError, match="5 groups do not divide"):
        applied(("2", SiteRecipe("2", "grouped", 5)))
