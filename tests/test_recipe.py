from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupify.errors import ArtefactError
from groupify.models.preprocessing import Preprocessing
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.recipe import Recipe, current_versions
from groupify.structures import SiteRecipe, Structure

RECIPE = Recipe(
    model=ModelSpec(
        name="resnet18",
        arguments={"num_classes": 10, "replace_stride_with_dilation": [False, True, True]},
        input_shape=(3, 64, 64),
        preprocessing=Preprocessing((64, 64), 72, "center", (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "bilinear"),
    ),
    weights=WeightsOrigin("torchvision", "ResNet18_Weights.IMAGENET1K_V1"),
    sites=(
        SiteRecipe("layer1.0.conv1", Structure(groups=4), shuffle=True),
        SiteRecipe("layer2.0.conv1", Structure(32, 8, 64)),
    ),
    calibration={"images": 256, "seed": 0},
    recovery=None,
    metrics={"accuracy": {"dense": 0.93, "converted": 0.92, "recovered": None}},
    sha256="0f" * 32,
)
DOCUMENT = json.loads(RECIPE.dumps())
STRUCTURE = ("sites", 0, "structure")

# Small and large JSON values, right and wrong ones.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["grouped", "resnet18", "groupify", "../../etc/passwd", 10**30, -1, 0, 2**63]),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=12,
)


def paths_of(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    children: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [prefix, *(path for key, child in children for path in paths_of(child, (*prefix, key)))]


def replaced(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    if not path:
        return value
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return document


def test_round_trip() -> None:
    assert Recipe.loads(RECIPE.dumps()) == RECIPE
    assert json.loads(RECIPE.dumps())["sites"][0] == {
        "name": "layer1.0.conv1",
        "structure": {"reduce": None, "groups": 4, "expand": None},
        "shuffle": True,
    }


def test_versions_are_those_that_run() -> None:
    assert current_versions()["torch"] == torch.__version__
    assert set(DOCUMENT["versions"]) == {"groupify", "torch", "torchvision"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "other", "it is no recipe"),
        (("schema_version",), 1, "schema version is 1, this groupify reads version 5"),
        (("schema_version",), True, "schema version is True"),
        (("schema_version",), "1", "schema version is '1'"),
        (("model",), [], r"model is \[\]; expected an object"),
        (("model", "name"), "", "model.name is ''; expected at least 1 character"),
        (("model", "name"), "x" * 5000, "printable text of at most 4096"),
        (("model", "name"), "a\x1b[31mb", "printable"),
        (("model", "name"), "\ud800", "printable"),
        (("model", "input_shape"), [3, 0, 64], "model.input_shape"),
        (("model", "input_shape"), [3, 65536, 65536], "together at most"),
        (("model", "input_shape"), [3, 64.0, 64], "model.input_shape"),
        (("model", "input_shape"), [], "a list of 0; expected at least 1 item"),
        (("model", "arguments"), None, "model.arguments is None; expected an object"),
        (("model", "preprocessing", "std"), [0.1, 0.0, 0.1], r"std\[1\] is 0.0; expected greater than 0"),
        (("model", "preprocessing", "std"), [0.1], "as many means as standard deviations"),
        (("model", "preprocessing", "resize"), -5, "preprocessing.resize is -5"),
        (("model", "preprocessing", "resize"), 60, "a resize of at least 64, for a crop of 64×64"),
        (("model", "preprocessing", "size"), [64, 32], r"the size of the input shape, \(64, 64\)"),
        (("model", "preprocessing", "crop"), "none", "no resize where nothing is cropped"),
        (("model", "preprocessing", "crop"), "corner", "'center' or 'none'"),
        (("model", "preprocessing", "interpolation"), "lanczos", "'bilinear' or 'bicubic' or 'nearest'"),
        (("weights", "kind"), "torchvison", "did you mean 'torchvision'"),
        (("weights", "value"), 1, "weights of kind 'torchvision' is 1, expected a str"),
        (("memory_format",), "tiled", "'contiguous' or 'channels_last'"),
        (("sha256",), "ABC", "sha256 is 'ABC'; expected pattern"),
        (("sites",), {}, "sites is {}; expected a valid array"),
        (("sites",), [DOCUMENT["sites"][0]] * 10_001, "a list of 10001; expected at most 10000 items"),
        (("sites",), [DOCUMENT["sites"][0]] * 2, "expected each site once"),
        ((*STRUCTURE, "groups"), 65_537, r"sites\[0\] is .*65537.*; expected 1 to 65536 channels and groups"),
        (
            (*STRUCTURE, "reduce"),
            131_072,
            r"sites\[0\] is .*131072.*; expected 1 to 65536 channels and groups",
        ),
        ((*STRUCTURE, "groups"), 0, "recipe: groups is 0; expected 1 or more"),
        ((*STRUCTURE, "groups"), None, r"sites\[0\].structure.groups is None; expected a valid integer"),
        ((*STRUCTURE, "groups"), 2.0, r"sites\[0\].structure.groups is 2.0; expected a valid integer"),
        ((*STRUCTURE, "reduce"), True, r"sites\[0\].structure.reduce is True; expected a valid integer"),
        ((*STRUCTURE, "reduce"), 0, "recipe: reduce is 0; expected 1 or more, or None"),
        (
            (*STRUCTURE, "expand"),
            6,
            "recipe: expand is 6, which 4 groups do not divide; take a multiple of 4",
        ),
        (("sites", 0, "structure"), "grouped", r"sites\[0\].structure is 'grouped'; expected an object"),
        (("sites", 0, "kind"), "grouped", "unknown key 'kind'"),
        (("sites", 0, "shuffle"), "no", "expected a valid boolean"),
        (("sites", 0, "extra"), 1, "unknown key 'extra'"),
        (("versions", "torch"), 2, "expected a valid string"),
        (("extra",), 1, "recipe has an unknown key 'extra'"),
        (("calibration",), [], r"calibration is \[\]; expected an object"),
        (("metrics", "x"), {"deep": math.inf}, "Infinity is not a number"),
        (("metrics", "x"), "x" * 5000, "metrics.x is .*; expected a printable text of at most"),
    ],
)
def test_each_bad_field_is_named(path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(ArtefactError, match=message) as raised:
        Recipe.loads(json.dumps(replaced(DOCUMENT, path, value)))
    assert "\n" not in str(raised.value)


FREE_FORM = ("metrics", "calibration", "versions", "arguments")
REQUIRED = [
    path
    for path in paths_of(DOCUMENT)
    if path and isinstance(path[-1], str) and not any(key in FREE_FORM for key in path[:-1])
]


@pytest.mark.parametrize("path", REQUIRED)
def test_each_missing_field_is_refused(path: tuple[str | int, ...]) -> None:
    document = copy.deepcopy(DOCUMENT)
    parent: Any = document
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    with pytest.raises(
        ArtefactError, match=f"has no '{path[-1]}'|it is no recipe|version is None|torchvision' is None"
    ):
        Recipe.loads(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("0.93", "NaN"), "NaN is not a number"),
        (lambda text: text.replace("0.93", "-Infinity"), "-Infinity is not a number"),
        (lambda text: text.replace("0.93", "1e999"), "'1e999' is out of range"),
        (lambda text: text.replace("0.93", "9" * 5000), "more than 19 digits"),
        (lambda text: text.replace("0.93", "[" * 100_000), "more than 32 levels"),
        (lambda text: text.replace("0.93", "[" * 40 + "]" * 40), "more than 32 levels"),
        (lambda text: text.replace('"seed"', '"images"'), "'images' occurs twice"),
        (lambda text: text[:-20], "not valid JSON"),
        (lambda text: "", "not valid JSON"),
        (lambda text: "[]", r"recipe is \[\]; expected an object"),
        (lambda text: '"\\' * 100_000, "not valid JSON"),
    ],
)
def test_json_loopholes_are_closed(change: Callable[[str], str], message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        Recipe.loads(change(RECIPE.dumps()))


def test_brackets_in_texts_do_not_count_as_nesting() -> None:
    recipe = replaced(DOCUMENT, ("metrics", "note"), '[{"' * 100)
    assert Recipe.loads(json.dumps(recipe)).metrics["note"] == '[{"' * 100


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, torch.tensor(1.0), 10**400, "\x00"])
def test_a_recipe_that_could_not_be_read_is_not_written(value: Any) -> None:
    bad = Recipe(RECIPE.model, RECIPE.weights, RECIPE.sites, metrics={"value": value})
    with pytest.raises(ArtefactError):
        bad.dumps()


def read_or_refuse(text: str) -> None:
    try:
        recipe = Recipe.loads(text)
    except ArtefactError as error:
        if "\n" in str(error):
            pytest.fail(f"more than one line: {error}")
    else:
        assert Recipe.loads(recipe.dumps()) == recipe


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_mutated_recipes_are_read_or_refused(data: st.DataObject) -> None:
    document: Any = DOCUMENT
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths_of(document)))
        document = replaced(document, path, data.draw(VALUES))
    read_or_refuse(json.dumps(document))


@settings(max_examples=600, deadline=None)
@given(st.integers(0, len(RECIPE.dumps())), st.integers(0, 40), st.text(max_size=12))
def test_damaged_texts_are_read_or_refused(start: int, length: int, inserted: str) -> None:
    text = RECIPE.dumps()
    read_or_refuse(text[:start] + inserted + text[start + length :])
