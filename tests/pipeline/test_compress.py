"""The one call, and the one object that its steps take and return."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import groupify
from groupify.data.calibration import calibration_inputs
from groupify.data.splits import DataSplits
from groupify.errors import GroupifyError, PlanError, SpecError, WrongTypeError
from groupify.graph.call import Call
from groupify.models.specs import Source
from groupify.pipeline.compressed import Compressed
from groupify.structures import FAMILIES
from tests import cli_nets
from tests.conftest import Run

RULES = groupify.Rules(cpu="any", min_group_width=1)
SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return cli_nets.net().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return cli_nets._images(48, 1)[0]


@pytest.fixture(scope="module")
def result(net: nn.Module, images: Tensor) -> Compressed:
    return groupify.compress(net, images, groups=2, rules=RULES)


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][key]) for key, value in states[0].items()
    )


def splits(labelled: bool = True) -> DataSplits:
    train, test = cli_nets.data()
    return DataSplits("mine", train, test, 10, None, labelled)


def untrained() -> Source:
    """The same net with weights that are said to be random, so that nobody expects an accuracy."""
    return groupify.load_model("tests.cli_nets:net", weights="none", input_shape=SHAPE)


# ---- what it does


def test_it_is_plan_and_convert_in_one(net: nn.Module, images: Tensor, result: Compressed) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    plan = groupify.plan(net, SHAPE, groups=2, rules=RULES)
    step_by_step = groupify.convert(net, plan, images)
    assert result.plan == plan
    assert same(result.model, step_by_step.model)
    assert result.fits == step_by_step.fits
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert result.source.model is net


def test_the_command_line_converts_as_the_call_does(run: Run, tmp_path: Path) -> None:
    options = ("--weights", "none", "--input-size", "3,8,8", "--groups", 2, "--min-group-width", 1)
    data = ("--data", "tests.cli_nets:data", "--calibrate", 40)
    outcome = run("convert", "tests.cli_nets:net", *options, *data, "-o", "out")
    assert outcome.code == 0, outcome.err
    source = untrained()
    found = groupify.compress(
        source,
        groupify.load_data("tests.cli_nets:data", source.spec),
        groups=2,
        rules=groupify.Rules(min_group_width=1),
        calibration_images=40,
    )
    assert same(found.model, groupify.load(tmp_path / "out", trust=True))
    written, own = groupify.Recipe.read(tmp_path / "out" / "recipe.json"), found.recipe
    assert replace(written, sha256=None) == replace(own, sha256=None)
    assert f"top-1 on 40 test images: dense {100 * found.recipe.metrics['dense']:.2f}%" in outcome.out
    assert f"top-1 on 40 test images: dense {100 * found.recipe.metrics['dense']:.2f}%" in repr(found)


def kinds_of_images(images: Tensor) -> dict[str, Any]:
    pairs = TensorDataset(images, torch.arange(len(images)))
    return {
        "batches": list(images.split(16)),
        "loader": DataLoader(pairs, batch_size=16),
        "generator": ((batch, ["a label"] * len(batch)) for batch in images.split(16)),
        "dicts": [{"image": batch} for batch in images.split(16)],
        "calibration": groupify.Calibration(images),
    }


@pytest.mark.parametrize("kind", kinds_of_images(torch.zeros(1)))
def test_images_of_any_kind(kind: str, net: nn.Module, images: Tensor, result: Compressed) -> None:
    given = kinds_of_images(images)[kind]
    found = groupify.compress(net, given, groups=2, rules=RULES)
    assert found.plan == result.plan
    assert found.source.spec.input_shape == SHAPE
    assert found.data is not None
    assert len(calibration_inputs(found.data.for_calibration)) == len(images)
    for mine, right in zip(found.fits, result.fits, strict=True):
        assert mine.error == pytest.approx(right.error, rel=0.2)


def test_with_nothing_asked_for_each_conv_gets_what_loses_least(net: nn.Module, images: Tensor) -> None:
    found = groupify.compress(net, images, rules=RULES, search=groupify.SearchOptions())
    assert found.notes[0].startswith("no --groups and no --budget: structures chosen for each conv")
    four = groupify.compress(net, images, groups=4, rules=RULES)
    assert found.costs.compressed.macs <= four.costs.compressed.macs < found.costs.dense.macs
    assert not all(site.structure.is_one_conv for site in found.plan.converted)


def test_budget_structure_and_precision(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    search = groupify.SearchOptions(verify=False)
    found = groupify.compress(
        net, images, budget="macs=60%", structure="grouped-pointwise", precision="int8", search=search,
        rules=groupify.Rules(cpu="any", min_group_width=1, exclude="5"),
    )  # fmt: skip
    assert found.costs.compressed.macs <= 0.6 * found.costs.dense.macs
    assert [site.name for site in found.plan.converted] == ["2"]
    assert found.plan.site("2").structure.expand is not None
    assert (found.plan.precision, found.recipe.precision) == ("int8", "int8")
    exported = found.export(tmp_path / "m.onnx")
    assert exported.int8 is not None
    assert exported.files == {"onnx_int8": str(tmp_path / "m.onnx")}
    file = onnx.load(str(tmp_path / "m.onnx"))
    assert "QuantizeLinear" in {node.op_type for node in file.graph.node}
    # The float file was made on the way and is gone.
    assert exported.exported.path == exported.path == tmp_path / "m.onnx"
    assert exported.exported.file_bytes == exported.path.stat().st_size
    assert exported.exported.opset in {entry.version for entry in file.opset_import if not entry.domain}
    kept = groupify.finetune(found, splits())
    assert kept.plan.precision == "int8"
    assert kept.export(tmp_path / "again.onnx").int8 is not None


def test_without_images(net: nn.Module) -> None:
    with pytest.raises(SpecError, match="nothing says what the model is called with: give images"):
        groupify.compress(net, groups=2)
    found = groupify.compress(net, groups=2, rules=RULES, example_inputs=torch.randn(2, *SHAPE))
    assert found.source.spec.input_shape == SHAPE
    assert any("accuracy is not protected" in note for note in found.notes)
    with pytest.raises(SpecError, match="int8 needs images to calibrate on"):
        found.export("never.onnx", precision="int8")


def test_what_contradicts_itself_is_refused(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(SpecError, match="groups and a budget"):
        groupify.compress(net, images, groups=2, budget="macs=50%")
    with pytest.raises(SpecError, match="precision is 'float32', and 'int8' in rules: say it once"):
        groupify.compress(net, images, precision="float32", rules=groupify.Rules(precision="int8"))
    with pytest.raises(SpecError, match=r"structures is .*: say it once"):
        groupify.compress(net, images, structure="grouped", rules=groupify.Rules(structures=FAMILIES))
    with pytest.raises(PlanError, match="unknown structure 'monarch'"):
        groupify.compress(net, images, structure="monarch")
    with pytest.raises(SpecError, match="'float64'"):
        groupify.compress(net, images, precision="float64")  # type: ignore[arg-type]


class Pair(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3)
        self.head = nn.Linear(32, 4)

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        features = self.two(torch.relu(self.one(image * scale))).mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


def test_a_model_of_two_inputs_from_the_plan_to_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = Pair().eval()
    data = TensorDataset(torch.randn(24, 16, 8, 8), torch.rand(24, 1, 1, 1))

    def inputs(batch: list[Tensor]) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        return (batch[0],), {"scale": batch[1]}

    calibration = groupify.Calibration(data, inputs=inputs, batch_size=7)
    options: dict[str, Any] = {
        "budget": "macs=60%",
        "structure": "grouped",
        "search": groupify.SearchOptions(),
    }
    found = groupify.compress(pair, calibration, rules=RULES, **options)
    assert found.costs.compressed.macs <= 0.6 * found.costs.dense.macs
    exported = groupify.export(found, tmp_path / "pair.onnx")
    assert exported.exported.input_names == ("image", "scale")
    assert exported.parity.max_rel_diff < 1e-3
    with pytest.raises(SpecError, match="float16 is for models called with one tensor of images"):
        found.export(tmp_path / "no.onnx", precision="float16")
    labelled = TensorDataset(*data.tensors, torch.arange(24) % 4)
    settings = groupify.FinetuneSettings(epochs=1, batch_size=8)
    tuned = found.finetune(labelled, settings=settings)
    assert tuned.tuned is not None
    assert tuned.tuned.steps > 0


def test_joined_calls_keep_what_all_examples_share() -> None:
    shared = torch.tensor([7.0, 8.0])
    calls = [Call((torch.full((count, 3), float(count)), {"k": shared}, "word")) for count in (3, 5)]
    joined = Call.joined(calls)
    assert joined.args[0].tolist() == [[3.0] * 3] * 3 + [[5.0] * 3] * 5
    assert joined.args[1]["k"] is shared
    assert joined.args[2] == "word"


# ---- what comes back


def test_it_prints_as_a_report(result: Compressed) -> None:
    text = repr(result)
    assert str(result) == text
    lines = text.splitlines()
    assert lines[1] == "Sequential, compressed"
    assert {lines[0], lines[2], lines[-1]} == {"=" * len(lines[0])}
    error = {fit.name: f"{fit.error:.3g}" for fit in result.fits}
    assert re.split(r"  +", lines[3]) == ["conv", "shape", "groups", "params", "MACs", "error", "reason"]
    rows = [re.split(r"  +", line) for line in lines[4:7]]
    assert rows[0] == ["0", "3 → 32, 3×3, 8×8", "1", "896", "55.3k", "first conv: too few input channels (3)"]
    # 32·64·9 weights, 16 outputs of each channel; a batch norm behind has no bias.
    assert rows[1] == ["2", "32 → 64, 3×3 / 2, 4×4", "1 → 2", "18.4k → 9.22k", "295k → 147k", error["2"]]
    assert rows[2] == ["5", "64 → 64, 1×1, 4×4", "1 → 2", "4.16k → 2.11k", "65.5k → 32.8k", error["5"]]
    assert "MACs                       416k        236k  1.76×" in lines
    assert "2 of 3 convs are converted, planned for any" in lines
    assert "weights: as given; least squares in order, 48 unlabelled images" in lines
    assert not any("top-1" in line for line in lines)


def test_a_result_is_saved_and_loaded(
    result: Compressed, images: Tensor, net: nn.Module, tmp_path: Path
) -> None:
    recipe = result.save(tmp_path / "one")
    assert groupify.save(tmp_path / "two", result) == recipe
    assert groupify.save(tmp_path / "three", result.model, result.recipe) == recipe
    with torch.no_grad():
        loaded = groupify.load(tmp_path / "one", model=net)
        assert torch.equal(loaded(images), result.model(images))
    with pytest.raises(SpecError, match=r"made by code of its own.*give the model itself"):
        groupify.load(tmp_path / "one")
    with pytest.raises(GroupifyError, match="exists; pass --force"):
        result.save(tmp_path / "one")
    result.save(tmp_path / "one", force=True)


def test_a_fine_tune_gives_a_new_result(result: Compressed) -> None:
    train, _ = cli_nets.data()
    settings = groupify.FinetuneSettings(epochs=1, batch_size=16)
    before = {key: value.clone() for key, value in result.model.state_dict().items()}
    loader = DataLoader(train, batch_size=16)
    labelled = groupify.finetune(result, splits(), settings=settings)
    assert isinstance(labelled, Compressed)
    assert all(torch.equal(value, before[key]) for key, value in result.model.state_dict().items())
    assert labelled.accuracy.recovered is not None
    assert labelled.accuracy.images == 40
    assert "fine-tuned" in repr(labelled)
    assert labelled.recipe.recovery is not None
    assert result.recipe.recovery is None
    for data in (train, loader, iter(loader)):
        assert result.finetune(data, settings=settings).tuned is not None
    # Nothing but images: it learns from the dense model alone.
    unlabelled = result.finetune(train.tensors[0])
    assert unlabelled.tuned is not None
    assert not unlabelled.tuned.settings.labels


def test_accuracies_of_other_images_are_not_put_side_by_side() -> None:
    found = groupify.compress(untrained(), splits(), groups=2, rules=RULES, calibration_images=40)
    assert found.accuracy.dense is not None
    settings = groupify.FinetuneSettings(epochs=0.5, batch_size=16)
    same_images = found.finetune(found.data, settings=settings)  # type: ignore[arg-type]
    assert same_images.accuracy.dense == found.accuracy.dense
    others = found.finetune(splits(), settings=settings)
    assert others.accuracy.dense is None
    assert others.accuracy.recovered is not None


def test_the_plan_that_won_is_not_converted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from groupify.pipeline import converting, planning

    calls: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return counted

    for name, module in (("race", planning), ("run", converting)):
        monkeypatch.setattr(module, "convert", counting(name, vars(module)["convert"]))
    options: dict[str, Any] = {
        "budget": "macs=60%", "structure": "grouped", "rules": RULES, "search": groupify.SearchOptions(),
        "calibration_images": 40,
    }  # fmt: skip
    source = untrained()
    found = groupify.compress(source, splits(), **options)
    assert set(calls) == {"race"}
    calls.clear()
    drawn = groupify.calibration_images(splits().for_calibration, 40, seed=0)
    by_hand = groupify.convert(source, found.plan, drawn)
    assert same(found.model, by_hand.model)
    # Fitted on fewer images while plans competed: the winner is fitted on all of them.
    groupify.compress(source, splits(), **{**options, "calibration_images": 96})
    assert calls == ["run"]


# ---- wrong types


WRONG: dict[str, tuple[str, str]] = {
    "text": ("g.compress(net, 'demo')", "images is the text 'demo': expected images as a tensor"),
    "name": ("g.compress('demo', images)", "the model is a str, expected an nn.Module"),
    "swapped": ("g.compress(images, net)", "the model is a Tensor, expected an nn.Module"),
    "a module": ("g.compress(net, net)", "images is a Sequential: expected images"),
    "a number": ("g.compress(net, 3)", "data is a int: expected a Dataset"),
    "rules": ("g.compress(net, images, rules={})", "rules is a dict: expected groupify.Rules"),
    "a result": ("g.compress(result, images)", "the model is a Compressed, .*: give its .model"),
    "a source": ("g.plan(source, (3, 8, 8), groups=2)", "the model is a Source, .*: give its .model"),
    "no plan": ("g.convert(net, 4, images)", "plan is a int: expected what groupify.plan"),
    "its result": ("g.convert(net, result, images)", "plan is a Compressed: .*; give its .plan"),
    "a student": ("g.finetune(result.plan, data)", "student is a Plan: expected what compress"),
    "no data": ("g.finetune(result, 'demo')", "data is a str: expected a Dataset"),
    "settings": ("g.finetune(result, data, settings=3)", "settings is a int: expected"),
    "a path": ("g.export(result, 3)", "path is a int: expected the name of a file"),
    "a plan": ("g.export(result.plan, 'x.onnx')", "the model is a Plan, expected an nn.Module"),
    "shape": ("g.export(result, 'x.onnx', input_shape=(3, 8, 8))", "input_shape is for a module"),
    "int8": ("g.export(net, 'x.onnx', precision='int8')", "there is groupify.export_int8"),
    "turned round": ("g.save(result, 'out')", "folder is a Compressed: expected the name"),
    "alone": ("g.save('out', net)", "recipe is a NoneType: expected the .recipe of what compress"),
    "tuned": ("g.save('out', result.tuned)", "model is a FinetuneResult: .*; give its .model"),
    "no recipe": ("g.save('out', net, result.plan)", "recipe is a Plan: expected"),
    "load": ("g.load(result)", "folder is a Compressed: expected a folder"),
    "apply": ("g.apply(result, net)", "recipe is a Compressed: .*; give its .recipe"),
    "applied": ("g.apply(result.recipe, result.plan)", "the model is a Plan, expected an nn.Module"),
}


@pytest.fixture(scope="module")
def tuned(result: Compressed) -> Compressed:
    return result.finetune(splits(), settings=groupify.FinetuneSettings(epochs=0.2))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_get_a_sentence(
    name: str, tuned: Compressed, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, words = WRONG[name]
    source = groupify.load_model("tests.cli_nets:net", input_shape=SHAPE)
    names = {
        "g": groupify, "net": source.model, "images": images, "result": tuned, "source": source,
        "data": splits(),
    }  # fmt: skip
    with pytest.raises(GroupifyError, match=words) as refused:
        eval(call, names)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_type_is_a_type_error_as_well() -> None:
    assert issubclass(WrongTypeError, TypeError)
    assert issubclass(WrongTypeError, SpecError)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": 3}, "budget is a int: expected a text like"),
        ({"groups": 2.5}, "groups is a float: expected a number, or numbers by name"),
        ({"groups": {"*": 2.5}}, r"the number of groups of '\*' is a float"),
        ({"search": 3}, "search is a int: expected groupify.SearchOptions"),
        ({"memory": 2.5}, "memory is a float: expected bytes"),
    ],
)
def test_arguments_of_another_type_get_a_sentence(given: dict[str, Any], says: str) -> None:
    with pytest.raises(WrongTypeError, match=says):
        groupify.compress(nn.Conv2d(8, 16, 3), torch.randn(4, 8, 8, 8), **given)


@pytest.mark.parametrize("name", ["rules", "options", "budget", "images"])
def test_so_do_those_of_a_search(name: str) -> None:
    given: dict[str, Any] = {"budget": "macs=50%", "images": torch.randn(4, 8, 8, 8), name: 3}
    with pytest.raises(WrongTypeError, match=f"{name} is a int: expected"):
        groupify.plan_for_budget(nn.Conv2d(8, 16, 3), (8, 8, 8), **given)


def test_what_was_lost_is_printed_with_its_error() -> None:
    source = groupify.load_model("demo")
    data = groupify.load_data("demo", source.spec)
    assert data.test is not None
    part = replace(data, test=Subset(cast(Any, data.test), range(60)))
    result = groupify.compress(source, part, groups=16, calibration_images=64)
    changed = result.accuracy.changed
    assert changed is not None
    assert changed.images == 60
    assert result.accuracy.dense is not None
    assert result.accuracy.converted is not None
    lost = 100 * (result.accuracy.dense - result.accuracy.converted)
    assert changed.drop == pytest.approx(lost)
    assert f" {abs(changed.drop):.2f} ± {changed.error:.2f} points" in repr(result)
    assert "preprocessing: the whole image to 28×28" in repr(result)
    assert result.recipe.metrics == {key: getattr(result.accuracy, key) for key in result.recipe.metrics}
