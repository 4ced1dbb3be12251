from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from groupify.conversion.conversion import Calibration
from groupify.conversion.surgery import restructure
from groupify.data.images import FlipAndShift, ImageArrays
from groupify.data.splits import load_data
from groupify.errors import ConversionError
from groupify.models import demo
from groupify.models.sources import load_model
from groupify.models.specs import ModelSpec
from groupify.planning.rules import Rules
from groupify.planning.uniform import plan
from groupify.scores import measure_cost
from groupify.stats.positions import input_patches, pick, sample_positions
from groupify.stats.samples import SiteSamples
from groupify.structures import SiteRecipe, Structure
from scripts.benchmarks import efficiency, harness, int8, peers_latency, planning_speed, tables
from scripts.benchmarks.contest import KEYS, Contest, Contestant, Net, Row, order_of
from scripts.benchmarks.harness import Parser, Results, Timing
from scripts.benchmarks.low_rank import STRUCTURES, Size, choose_ranks, factorise
from scripts.benchmarks.methods import PEERS, Setting, randomised, rules_for, truncation
from scripts.benchmarks.peers import take_rates
from scripts.benchmarks.rivals import pack
from scripts.benchmarks.spatial import in_columns, lay_out_columns, merge_columns
from scripts.benchmarks.tables import BENCHMARKS
from scripts.benchmarks.training import RememberingTeacher, Trainer, Twin
from scripts.train_dense import Kept, train
from tests import cli_nets

SHAPE = (8, 10, 9)


class TwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 24, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.first(inputs)))
        logits: Tensor = self.head(torch.relu(self.second(features)).mean((2, 3)))
        return logits


@pytest.fixture
def net() -> TwoConvs:
    torch.manual_seed(0)
    return TwoConvs().eval()


def make_low_rank(conv: nn.Conv2d, structure: str, rank: int) -> None:
    """Give a conv random weights that the structure holds exactly."""
    out, into = conv.weight.shape[:2]
    if structure == "spatial SVD":
        weight = torch.einsum("ria,rob->oiab", torch.randn(rank, into, 3), torch.randn(rank, out, 3))
    else:
        core = torch.randn(rank, rank, 3, 3)
        weight = torch.einsum("or,rsab,si->oiab", torch.randn(out, rank), core, torch.randn(rank, into))
    with torch.no_grad():
        conv.weight.copy_(weight / weight.norm() * conv.weight.norm() * 2)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(128, *SHAPE, generator=torch.Generator().manual_seed(1))


CONVS: list[dict[str, Any]] = [
    {"padding": (1, 2)},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (3, 1), "stride": 2},
    {"kernel_size": (1, 5), "stride": 2},
]


def conv_net(**options: Any) -> tuple[nn.Sequential, nn.Conv2d]:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, **{"kernel_size": (3, 5), **options})
    return nn.Sequential(nn.Conv2d(8, 8, 1), conv).eval(), conv


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_spatial_svd_is_a_structure_of_a_conv_on_columns(options: dict[str, Any]) -> None:
    net, conv = conv_net(**options)
    images = torch.randn(4, *SHAPE)
    laid_out = lay_out_columns(net, ["1"])
    student = restructure(laid_out, [SiteRecipe(in_columns("1"), Structure(5))])
    randomise(student)
    merged = merge_columns(student, ["1"])
    with torch.no_grad():
        torch.testing.assert_close(laid_out(images), net(images))
        torch.testing.assert_close(merged(images), student(images))
        outputs = conv(images)
        positions = sample_positions(outputs.shape, 500, torch.Generator().manual_seed(0))
        samples = SiteSamples([positions], outputs=[pick(outputs, positions)], calls=1)
        samples.patches.append(input_patches(images, conv, positions))
        size = Size((10, 9), (outputs.shape[2], outputs.shape[3]))
        found = STRUCTURES["spatial SVD"](conv, size, samples, torch.ones(12, dtype=torch.float64))
    one = measure_cost(merged.get_submodule("1"), images[:1])
    assert one.macs == found.macs([5])
    assert one.params == 5 * (8 * conv.kernel_size[0] + 12 * conv.kernel_size[1]) + 12


def randomise(model: nn.Module) -> None:
    """Give the converted conv random weights."""
    with torch.no_grad():
        for name, weight in model.get_submodule("1.rows").named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))


@pytest.mark.parametrize("conv", [nn.Conv2d(8, 8, 3, groups=2), nn.Conv1d(8, 8, 3)])
def test_what_has_no_spatial_svd_is_refused(conv: nn.Module) -> None:
    with pytest.raises(ConversionError, match=r"layer '0' .*; expected .*leave it out"):
        lay_out_columns(nn.Sequential(conv), ["0"])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_weight_of_that_form_is_recovered(structure: str) -> None:
    net, conv = conv_net(kernel_size=3, padding=1, bias=False)
    make_low_rank(conv, structure, 4)
    model = at_ranks_of_4(net, structure)
    fresh = torch.randn(16, *SHAPE)
    with torch.no_grad():
        wanted, found = net(fresh), model(fresh)
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 1e-4


def at_ranks_of_4(net: nn.Module, structure: str, images: Tensor | None = None) -> nn.Module:
    """Factorise the second conv of a net with ranks of 4."""
    dense = 90 * 8 * 12 * 9
    ours = 90 * {"spatial SVD": 4 * 3 * (8 + 12), "Tucker-2": 4 * 8 + 4 * 4 * 9 + 4 * 12}[structure]
    calibration = Calibration(torch.randn(64, *SHAPE) if images is None else images)
    model = factorise(net, structure, {"1": dense}, dense - ours, calibration, step=4)
    assert measure_cost(model.get_submodule("1"), torch.randn(1, *SHAPE)).macs == ours
    return model


def test_the_fit_of_both_factors_is_no_worse_than_that_of_the_last_alone() -> None:
    net, conv = conv_net(kernel_size=3, padding=1, bias=False)
    mixing = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    images = torch.einsum("ij,njhw->nihw", mixing, torch.randn(32, *SHAPE))
    model = at_ranks_of_4(net, "spatial SVD", images)
    with torch.no_grad():
        wanted = net(images)
        latents = vertical_svd(net[0](images), conv, 4)
        patches = torch.nn.functional.unfold(latents, (1, 3), padding=(0, 1)).transpose(1, 2).flatten(0, 1)
        rows = wanted.flatten(2).transpose(1, 2).flatten(0, 1)
        before = (patches @ torch.linalg.lstsq(patches, rows).solution - rows).square().sum()
        after = (model(images) - wanted).square().sum()
    assert float(after) < 0.999 * float(before)


def vertical_svd(inputs: Tensor, conv: nn.Conv2d, rank: int) -> Tensor:
    """What the first factor gives if it is the SVD of the weight, weighted by the inputs' covariance."""
    columns = torch.nn.functional.unfold(inputs, (3, 1), padding=(1, 0)).transpose(1, 2).flatten(0, 1)
    root = torch.linalg.cholesky(columns.T @ columns).T
    left = torch.linalg.svd(root @ conv.weight.permute(1, 2, 3, 0).flatten(0, 1).flatten(1)).U[:, :rank]
    first = torch.linalg.solve(root, left).T.reshape(rank, 8, 3, 1)
    return torch.nn.functional.conv2d(inputs, first, padding=(1, 0))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_factorised_net_meets_its_macs_and_stays_close(structure: str, net: TwoConvs, images: Tensor) -> None:
    for conv in (net.first, net.second):
        make_low_rank(conv, structure, 4)
    chosen = plan(net, SHAPE, groups=2, rules=Rules(min_group_width=1))
    sites = {site.name: site.macs.dense for site in chosen.sites}
    dense = measure_cost(net, images[:1]).macs
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = factorise(net, structure, sites, dense // 2, Calibration(images), step=1)
    assert measure_cost(model, images[:1]).macs == pytest.approx(
        dense / 2, rel=0.07
    )  # the steps are large here
    fresh = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, found = net(fresh), model(fresh)
    assert float((found - wanted).square().mean() / wanted.var(0).mean()) < 0.005
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    convs = [part for part in model.get_submodule("second").children() if isinstance(part, nn.Conv2d)]
    norms = convs[-2].weight.flatten(1).norm(dim=1), convs[-1].weight.transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=1e-5)


class _Known:
    """A conv of known energies, one MAC per rank."""

    def __init__(self, *energies: float) -> None:
        self.energies = (torch.tensor(energies),)

    def macs(self, ranks: Any) -> int:
        return int(ranks[0])

    def structure(self, ranks: Any) -> Structure:
        return Structure(ranks[0])


def test_ranks_go_where_the_energy_is() -> None:
    factors: Any = {"flat": _Known(1, 1, 1, 1), "steep": _Known(1, 1e-3, 1e-4, 1e-5)}
    assert choose_ranks(factors, {"flat": 10, "steep": 10}, 5, 1) == {"flat": (4,), "steep": (1,)}
    assert choose_ranks(factors, {"flat": 10, "steep": 10}, 4, 2) == {"flat": (2,), "steep": (2,)}
    # A conv that would get no cheaper stays dense.
    assert choose_ranks(factors, {"flat": 4, "steep": 10}, 5, 1) == {"steep": (1,)}


def test_planned_meets_the_macs_of_uniform_groups() -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3 if not index else 32, 32, 3) for index in range(4)]
    dense = nn.Sequential(*parts, nn.Flatten(), nn.Linear(32, 5)).eval()
    setting = Setting(dense, torch.randn(400, 3, 9, 9), 0, Rules(exclude=("0",), min_group_width=1))
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    made = PEERS["groupify, planned"](setting, 2)
    uniform = setting.macs(truncation(setting, 2))
    assert 0.8 * uniform <= setting.macs(made) <= uniform
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())


ROW = Row("groupify", 4, 92.0, 0.0, 1.5, 3.7, 3.8, 10.0, seeds=1)
LATENCY = {"1": {"dense_ms": 2.0, "ms": 1.0, "speed_up": 2.0}}


def result_file(path: Path, **setting: Any) -> Results[Row]:
    return Results(Row, KEYS, path, setting, order_of(PEERS))


def contest(
    results: Results[Row], contestants: dict[str, Contestant], *rates: float, seeds: int = 1
) -> Contest:
    """A contest on a tiny net, which is its own twin."""
    torch.manual_seed(0)
    model = cli_nets.net()
    splits = load_data("tests.cli_nets:data", ModelSpec("net", {}, (3, 8, 8), None))
    settings = [Setting(model, torch.randn(8, 3, 8, 8), seed) for seed in range(seeds)]
    teacher = RememberingTeacher(model)
    assert splits.test is not None
    twin = Twin(settings[0], teacher, splits, splits.test)
    trainer = Trainer(teacher, splits, results, rates, lambda: twin)
    return Contest(Net(settings, splits), results, contestants, trainer, rate_groups=4)


def same(setting: Setting, groups: int) -> nn.Module:
    return setting.dense


def refused(*_: object) -> nn.Module:
    raise AssertionError("measured again")


def test_rows_are_merged_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    setting = {"dense_accuracy": 93.5, "calibration_images": 1000}
    results = result_file(path, **setting)
    results.put(replace(ROW, method="spatial SVD"))
    results.put(ROW)
    again = result_file(path, **setting)
    assert [row["method"] for row in again.read()["rows"]] == ["groupify", "spatial SVD"]
    assert again.rows["groupify", 4, 0.0] == ROW
    resumed = contest(again, {"groupify": Contestant(refused)}, 0.02)
    resumed.measure("groupify", 4, [0.0])
    with pytest.raises(AssertionError, match="measured again"):
        resumed.measure("groupify", 4, [0.0, 1.0])
    with pytest.raises(AssertionError, match="measured again"):
        replace(resumed, results=replace(again, again=True)).measure("groupify", 4, [0.0])
    with pytest.raises(SystemExit, match="do not mix"):
        result_file(path, **{**setting, "dense_accuracy": 90.0})


def test_missing_seeds_are_measured(tmp_path: Path) -> None:
    made: list[int] = []

    def make(setting: Setting, groups: int) -> nn.Module:
        made.append(setting.seed)
        return setting.dense

    contestants = {"groupify": Contestant(make), "truncation": Contestant(make, seeded=False)}
    results = result_file(tmp_path / "peers.json")
    results.put(replace(ROW, accuracy={"1": 50.0}))
    contest(results, contestants, seeds=3).measure("groupify", 4, [0.0])
    row = results.rows["groupify", 4, 0.0]
    assert (made, row.seeds) == ([0, 2], 3)
    top1 = row.accuracy["0"]  # all seeds have the same net here
    assert row.accuracy == {"0": top1, "1": 50.0, "2": top1}
    assert row.accuracy_mean == pytest.approx((2 * top1 + 50) / 3)
    assert row.accuracy_spread == abs(top1 - 50)
    # A row of an older file says how many seeds its mean is of, and not what they were.
    results.put(ROW)
    contest(results, contestants, seeds=3).measure("groupify", 4, [0.0])
    assert results.rows["groupify", 4, 0.0].accuracy == dict.fromkeys(("0", "1", "2"), top1)
    made.clear()
    contest(results, contestants, seeds=3).measure("truncation", 4, [0.0])
    assert made == [0]


def test_a_quick_run_leaves_the_kept_rows_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(None, "peers", "less")
    monkeypatch.setattr(sys, "argv", ["peers", "--quick", "--json", str(BENCHMARKS / "peers.json")])
    with pytest.raises(SystemExit):
        parser.parse()
    assert "--quick needs a --json of its own" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["peers", "--quick"])
    assert parser.parse().json is None
    monkeypatch.setattr(sys, "argv", ["peers"])
    assert parser.parse().json == BENCHMARKS / "peers.json"
    with pytest.raises(SystemExit):
        parser.chosen(["one", "two"], "three|four")
    assert parser.chosen(["one", "two", "three"], "t*|x") == ["two", "three"]


def test_files_are_made_once_and_timed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(setting: Setting, groups: int) -> nn.Module:
        made.append(groups)
        return setting.dense

    monkeypatch.setitem(PEERS, "truncation", make)
    results = Results(peers_latency.Row, peers_latency.KEYS, tmp_path / "latency.json")
    net = contest(result_file(tmp_path / "peers.json"), {}).net
    timing = Timing(net.dense, (3, 16, 16), [], tmp_path / "onnx")
    making = peers_latency.Bench("net", net, timing, results)
    making.measure("truncation", 4)
    (row,) = results.rows.values()
    assert row.latency == {}
    assert (row.top1, row.side) == (row.dense_top1, 16)
    monkeypatch.setattr(harness, "SECONDS", 0.01)
    for _ in range(2):
        replace(making, timing=replace(timing, threads=[1])).measure("truncation", 4)
    assert made == [4]
    (row,) = results.rows.values()
    assert row.latency["1"]["speed_up"] == pytest.approx(1, rel=0.8)


def test_latency_goes_into_all_rows_of_a_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = result_file(tmp_path / "peers.json")
    monkeypatch.setattr(harness, "SECONDS", 0.01)
    for epochs in (0.0, 1.0):
        results.put(replace(ROW, epochs=epochs))
    bench = contest(results, {"groupify": Contestant(same)})
    timing = Timing(bench.net.dense, (3, 8, 8), [1], tmp_path / "onnx")
    replace(bench, timing=timing).measure("groupify", 4, [0.0])
    first, second = results.rows.values()
    assert first.latency is not None
    assert first.latency == second.latency
    assert first.speed_up == first.latency["1"]["speed_up"]


def test_training_gives_a_row_of_its_own(tmp_path: Path) -> None:
    results = result_file(tmp_path / "peers.json")
    contest(results, {"truncation": Contestant(same)}, 0.01, 0.1).run([4], [0.5, 0.0], "trunc*")
    rows = results.rows
    assert list(rows) == [("truncation", 4, 0.0), ("truncation", 4, 0.5)]
    assert all(row.macs_ratio == 1 and row.latency is None for row in rows.values())
    rates = results.read()["learning_rates"]["truncation"]
    assert sorted(rates) == ["0.01", "0.1"]
    assert rates[f"{rows['truncation', 4, 0.5].learning_rate:g}"] == min(rates.values())


def test_learning_rates_of_another_net_are_taken_over(tmp_path: Path) -> None:
    losses = {"0.01": 0.3, "0.1": 0.2}
    results = result_file(tmp_path / "vgg.json")
    take_rates(results, {"learning_rates": {"truncation": losses}})
    trainer = contest(results, {}, 0.01, 0.1).trainer
    assert trainer is not None

    def no_twin() -> Twin:
        raise AssertionError("measured again")

    assert replace(trainer, twin=no_twin).learning_rate("truncation", refused) == 0.1


def test_learning_rates_are_chosen_by_images_that_the_twin_has_not_seen(tmp_path: Path) -> None:
    data, file = load_data("demo", load_model("demo").spec), tmp_path / "twin.safetensors"
    state = {name: value.contiguous() for name, value in demo.demo_model().state_dict().items()}
    save_file(state, file, {"model": "demo"})
    with pytest.raises(SystemExit, match=r"twin.safetensors may have been trained on the images"):
        Twin.load(file, data, 10)
    save_file(state, file, {"without_demo_images": "True"})
    with pytest.raises(SystemExit, match="--data demo: learning rates are chosen on fashion-mnist"):
        Twin.load(file, data, 10)


def test_random_weights_are_those_of_the_seed() -> None:
    def drawn(seed: int) -> nn.Module:
        return randomised(TwoConvs(), seed)

    first, same, other = drawn(1), drawn(1), drawn(2)
    for name in ("first.weight", "second.weight", "head.weight"):
        assert torch.equal(first.get_parameter(name), same.get_parameter(name))
        assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def few_images() -> ImageArrays:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (256, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageArrays(pixels, torch.arange(256) % 10, demo.PREPROCESSING)


def test_a_training_that_is_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    def learn(kept: Kept | None, images: ImageArrays) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
        model.append(nn.Linear(2704, 10))
        train(model, images, FlipAndShift(1), epochs=2, seed=0, kept=kept)
        return model

    class Stopping(ImageArrays):
        def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            if path.exists():
                raise KeyboardInterrupt
            return super().batch(indices)

    path, images = tmp_path / "net.safetensors.training", few_images()
    kept, whole = Kept(path, {"epochs": 2}), learn(None, images)
    with pytest.raises(KeyboardInterrupt):
        learn(kept, Stopping(images.images, images.labels, images.preprocessing))
    resumed = learn(kept, images)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with pytest.raises(SystemExit, match="remove it or give another --output"):
        learn(Kept(path, {"epochs": 3}), images)


def test_the_bottleneck_net_is_half_pointwise() -> None:
    model = demo.fashion_resnet26().eval()
    image = torch.zeros(1, *demo.INPUT_SHAPE)
    assert model(image).shape == (1, 10)
    names = [name for name, part in model.named_modules() if getattr(part, "kernel_size", 0) == (3, 3)]
    macs = measure_cost(model, image).macs
    saved = macs - measure_cost(truncation(Setting(model, image, 0, rules_for(model)), 2), image).macs
    assert len(names) == 9
    assert saved > 0.4 * macs


def test_what_a_method_is_ahead_by_has_an_interval() -> None:
    right = torch.arange(800) % 4 > 0
    better = right.clone()
    better[:8] = True  # two more images
    assert tables.ahead([(pack(better), pack(right))] * 2) == "+0.25 (-0.10 … +0.60)"
    assert tables.ahead([(pack(right), pack(right))]) == "+0.00 (+0.00 … +0.00)"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*layers? ha(s|ve) fewer samples", "ignore:dense int8 wins")
def test_int8_runs_quickly_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["int8", "--quick", "--json", str(tmp_path / "int8.json")])
    int8.main()
    shown = capsys.readouterr().out
    assert "| planned for int8 | MACs | ms, 1 thr. |" in shown
    (row,) = Results(int8.Row, ("name",), tmp_path / "int8.json").rows.values()
    assert row.top1 is not None
    assert row.top1.keys() == row.file_bytes.keys() == row.peak_memory_bytes.keys()
    assert row.mac_ratio > 1.2
    assert row.file_bytes["planned int8"] < row.file_bytes["dense int8"] < row.file_bytes["dense float32"]


@pytest.mark.slow
def test_efficiency_runs_quickly_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["efficiency", "--quick", "--json", str(tmp_path / "efficiency.json")])
    efficiency.main()
    assert "| squeezenet1_1 | macs=95% | ÷" in capsys.readouterr().out
    (row,) = Results(efficiency.Row, efficiency.KEYS, tmp_path / "efficiency.json").rows.values()
    assert row.mac_ratio >= 1 / 0.95
    assert row.efficiency("1") > 0
    assert sum(row.kernels.values()) == pytest.approx(1)


@pytest.mark.slow
def test_the_speed_of_planning_is_told_in_dense_forwards(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["planning_speed", "--quick"])
    planning_speed.main()
    told = capfd.readouterr().out
    for what in ("ladder", "planning", "conversion"):
        assert re.search(rf"^{what}: \d+\.\d s, \d+\.\d\d dense forwards$", told, re.MULTILINE)
    for what in ("planning", "conversion"):
        assert re.search(rf"^peak memory, {what}: \d\.\d\d GiB$", told, re.MULTILINE)
