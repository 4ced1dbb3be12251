from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from groupify.errors import ArtefactError, ConversionError, PlanError
from groupify.planning.plan_file import PlanFile
from groupify.planning.rules import Rules
from groupify.planning.uniform import plan
from groupify.structures import Plan, SiteRecipe, Structure
from tests.cli_nets import net

SHAPE = (3, 8, 8)
names = st.text(alphabet="abc.01é{},: ", min_size=1, max_size=6)
widths = st.none() | st.integers(1, 64)


def of_widths(reduce: int | None, groups: int, expand: int | None) -> Structure:
    return Structure(reduce and reduce * groups, groups, expand and expand * groups)


# Structure and shuffle of a site.
entries = st.tuples(st.builds(Structure, groups=st.integers(2, 64)), st.booleans()) | st.tuples(
    st.builds(of_widths, widths, st.integers(1, 64), widths), st.just(False)
)


@given(st.dictionaries(names, entries, min_size=1, max_size=5))
def test_a_plan_reads_what_it_writes(sites: dict[str, tuple[Structure, bool]]) -> None:
    file = PlanFile("net", "avx2", tuple(SiteRecipe(name, *entry) for name, entry in sites.items()))
    text = file.dumps()
    assert PlanFile.loads(text) == file
    assert len(text.splitlines()) == len(sites) + 9  # one line for each conv


def test_a_plan_goes_through_a_file_and_can_be_edited(tmp_path: Path) -> None:
    made = plan(net(), SHAPE, groups=4, rules=Rules(min_group_width=1, cpu="arm64"))
    path = tmp_path / "plan.json"
    PlanFile.of("net", made).write(path)
    assert PlanFile.read(path).precision == "float32"
    PlanFile.of("net", replace(made, precision="int8")).write(path)
    again = PlanFile.read(path).apply(net(), SHAPE)
    assert again.precision == "int8"
    assert again.recipes == made.recipes
    assert (made.cpu, again.cpu) == ("arm64", "arm64")
    assert again.macs == made.macs
    path.write_text(path.read_text().replace('"groups": 4', '"groups": 8', 1))
    assert [site.groups for site in PlanFile.read(path).apply(net(), SHAPE).converted] == [8, 4]
    several = '"reduce": 16, "groups": 8, "expand": 32'
    path.write_text(path.read_text().replace('"reduce": null, "groups": 8, "expand": null', several, 1))
    first = PlanFile.read(path).apply(net(), SHAPE).converted[0]
    assert first.structure == Structure(16, 8, 32)
    document = json.loads(path.read_text())
    del document["sites"][1]
    path.write_text(json.dumps(document))
    left = PlanFile.read(path).apply(net(), SHAPE)
    assert [site.name for site in left.converted] == ["5"]
    assert left.sites[1].reason == "dense in the plan"


def site(**changes: Any) -> dict[str, Any]:
    return {"name": "2", "structure": structure(), "shuffle": False, **changes}


def structure(**changes: Any) -> dict[str, Any]:
    return {"reduce": None, "groups": 4, "expand": None, **changes}


def document(**changes: Any) -> dict[str, Any]:
    fields = {"format": "groupify plan", "schema_version": 5, "model": "net", "cpu": "avx2"}
    return {**fields, "sites": [site()], **changes}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format": "groupify"}, 'expected "format": "groupify plan"'),
        ({"schema_version": 3}, "version is 3, this groupify reads version 5: save one with groupify plan"),
        ({"cpu": "auto"}, "plan.cpu is 'auto'; expected 'avx2' or"),
        ({"extra": 1}, "plan has an unknown key 'extra'"),
        ({"sites": []}, r"plan.sites is a list of 0; expected at least 1"),
        ({"sites": [site(structure=structure(groups=0))]}, "plan: groups is 0; expected 1 or more"),
        ({"sites": [site(structure=structure(reduce=-4))]}, "reduce is -4; expected 1 or more, or None"),
        ({"sites": [site(structure=structure(expand=6))]}, "expand is 6, which 4 groups do not divide"),
        ({"sites": [site(structure=structure(expand=65_540))]}, "expected 1 to 65536 channels and groups"),
        ({"sites": [site(structure=structure(groups="4"))]}, r"sites\[0\].structure.groups is '4'; expected"),
        (
            {"sites": [site(structure=structure(more=4))]},
            r"plan.sites\[0\].structure has an unknown key 'more'",
        ),
        ({"sites": [site(structure={"groups": 4})]}, r"plan.sites\[0\].structure has no 'reduce'"),
        ({"sites": [site(structure="grouped")]}, r"sites\[0\].structure is 'grouped'; expected an object"),
        ({"sites": [{"name": "2", "structure": structure()}]}, r"plan.sites\[0\] has no 'shuffle'"),
        ({"sites": [site(kind="grouped")]}, r"plan.sites\[0\] has an unknown key 'kind'"),
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

    grouped = SiteRecipe("2", Structure(groups=4))
    with pytest.raises(PlanError, match="leaves every conv as it is"):
        applied(replace(grouped, structure=Structure()))
    with pytest.raises(PlanError, match="'conv9', which is no conv"):
        applied(replace(grouped, name="conv9"))
    with pytest.raises(PlanError, match="'conv9', which is no conv"):
        applied(SiteRecipe("conv9", Structure()), grouped)
    with pytest.raises(ConversionError, match=r"layer '2': .* 5 groups do not divide"):
        applied(replace(grouped, structure=Structure(groups=5)))
    with pytest.raises(ConversionError, match="layer '2': a shuffle is for a dense conv that becomes one"):
        applied(replace(grouped, structure=Structure(None, 4, 64), shuffle=True))
    with pytest.raises(ConversionError, match=r"layer '2': .* needless convs; write it so"):
        applied(replace(grouped, structure=Structure(16, 1, 1000)))


def test_a_conv_with_groups_of_its_own_stays_or_gets_more_of_them() -> None:
    own = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 8, 1))

    def applied(structure: Structure) -> Plan:
        sites = (SiteRecipe("1", structure), SiteRecipe("2", Structure(groups=2)))
        return PlanFile("net", "any", sites).apply(own, SHAPE)

    assert [site.name for site in applied(Structure(groups=2)).converted] == ["2"]
    more = applied(Structure(8, 4, 8)).sites[1]
    assert (more.groups_before, more.structure) == (2, Structure(8, 4, 8))
    assert more.params.dense == 16 * 8 * 9 + 16
    assert more.params.grouped == 2 * 8 * 4 + 4 * 2 * 2 * 9 + 2 * 4 * 8 + 16
    with pytest.raises(ConversionError, match=r"has 1 groups for a .* take a multiple of 2"):
        applied(Structure())
    shuffled = SiteRecipe("1", Structure(groups=2), shuffle=True), SiteRecipe("2", Structure(groups=2))
    with pytest.raises(ConversionError, match=r"layer '1': .* is the conv as it is; leave it out"):
        PlanFile("net", "any", shuffled).apply(own, SHAPE)
