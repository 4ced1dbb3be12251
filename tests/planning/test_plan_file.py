from __future__ import annotations

import json
from dataclasses import replace
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
names = st.text(alphabet="abc.01é{},: ", min_size=1, max_size=6)
# Kind, groups and shuffle of a site.
entries = st.just(("dense", 1, False)) | st.tuples(
    st.sampled_from(["grouped", "grouped-pointwise"]), st.integers(2, 64), st.booleans()
)


@given(st.dictionaries(names, entries, min_size=1, max_size=5))
def test_a_plan_reads_what_it_writes(sites: dict[str, tuple[str, int, bool]]) -> None:
    file = PlanFile("net", "avx2", tuple(SiteRecipe(name, *entry) for name, entry in sites.items()))
    text = file.dumps()
    assert PlanFile.loads(text) == file
    assert len(text.splitlines()) == len(sites) + 8  # one line for each conv


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


def site(**changes: Any) -> dict[str, Any]:
    return {"name": "2", "kind": "grouped", "groups": 4, "shuffle": False, **changes}


def document(**changes: Any) -> dict[str, Any]:
    fields = {"format": "groupify plan", "schema_version": 3, "model": "net", "cpu": "avx2"}
    return {**fields, "sites": [site()], **changes}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format": "groupify"}, 'expected "format": "groupify plan"'),
        ({"schema_version": 2}, "version is 2, this groupify reads version 3: save one with groupify plan"),
        ({"cpu": "auto"}, "plan.cpu is 'auto'; expected 'avx2' or"),
        ({"extra": 1}, "plan has an unknown key 'extra'"),
        ({"sites": []}, r"plan.sites is a list of 0; expected at least 1"),
        ({"sites": [site(groups=1)]}, r"plan.sites\[0\] is .*; expected groups from 2"),
        ({"sites": [site(groups="4")]}, r"plan.sites\[0\].groups is '4'; expected"),
        ({"sites": [{"name": "2", "kind": "grouped", "groups": 4}]}, r"plan.sites\[0\] has no 'shuffle'"),
        ({"sites": [site(kind="winograd")]}, r"plan.sites\[0\] is .*'winograd'.*; expected the kind 'dense'"),
        ({"sites": [site(kind="dense", shuffle=True)]}, "no shuffle behind a conv that stays dense"),
        ({"sites": [site(), site()]}, "plan.sites is .*; expected each site once, and '2' occurs twice"),
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
    def applied(*sites: SiteRecipe) -> None:
        PlanFile("net", "any", sites).apply(net(), SHAPE)

    grouped = SiteRecipe("2", "grouped", 4)
    with pytest.raises(PlanError, match="leaves every conv dense"):
        applied(replace(grouped, kind="dense", groups=1))
    with pytest.raises(ConversionError, match="no layer 'conv9'"):
        applied(replace(grouped, name="conv9"))
    with pytest.raises(PlanError, match="'conv9', which is no conv"):
        applied(SiteRecipe("conv9", "dense", 1), grouped)
    with pytest.raises(PlanError, match="leaves '5' dense and gives it 8 groups; expected 1, as it has"):
        applied(SiteRecipe("5", "dense", 8), grouped)
    with pytest.raises(ConversionError, match="5 groups do not divide"):
        applied(replace(grouped, groups=5))
