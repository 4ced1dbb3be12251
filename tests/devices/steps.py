"""Everything that runs a model, run on a device: what the CPU gives it must give too.

``STEPS`` are run by the tests of this folder on whatever device there is: nothing here knows which.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import groupify
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.conversion.site_fit import FitOptions
from groupify.data.splits import DataSplits
from groupify.planning.candidates import candidates
from groupify.planning.search import Images
from groupify.planning.sensitivity import measure_sensitivity
from groupify.planning.sites import describe
from groupify.scores import Judge
from groupify.structures import Plan, SiteRecipe, Structure

SHAPE = (3, 5, 5)
STRUCTURES = {
    "grouped": Structure(groups=2),
    "grouped-pointwise": Structure(groups=2, expand=4),
    "low rank": Structure(reduce=4),
    "Tucker-2": Structure(reduce=4, expand=4),
    "block-term": Structure(reduce=4, groups=2, expand=4),
    "depthwise core": Structure(reduce=4, groups=4, expand=4),
}


class Net(nn.Module):
    """A residual block with batch norms, a conv without, and a classifier or a map of values."""

    def __init__(self, classes: int | None = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.head = None if classes is None else nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes), or values (N, 8, H, W)."""
        first = torch.relu(self.stem(images))
        values = self.last(torch.relu(self.norm(self.conv(first)) + first))
        result: Tensor = values if self.head is None else self.head(torch.relu(values).mean((2, 3)))
        return result


class Wandering(Net):
    """A path that depends on values, which no graph can show."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        return super().forward(images if float(images.mean()) > -100 else -images)


def make_net(kind: type[Net] = Net, classes: int | None = 5) -> Net:
    """Return a net of known weights, on the CPU."""
    torch.manual_seed(0)
    net = kind(classes).eval()
    assert net.norm.running_mean is not None
    assert net.norm.running_var is not None
    net.norm.running_mean.uniform_(-0.5, 0.5)
    net.norm.running_var.uniform_(0.5, 1.5)
    return net


def images(count: int = 16) -> Tensor:
    """Return images on the CPU, where data comes from."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def plan_for(net: nn.Module, structure: Structure, *, shuffle: bool = False) -> Plan:
    """Return a plan that gives convs a structure: both one of a single conv, one of them one of several."""
    names = ("conv", "last") if structure.is_one_conv else ("conv",)
    sites = [SiteRecipe(name, structure, shuffle) for name in names]
    return describe(net, sites, SHAPE, "avx2")


def same(found: nn.Module, expected: nn.Module, device: torch.device) -> None:
    """Check that a model is on the device, and gives what another one on the CPU gives."""
    assert {tensor.device.type for tensor in found.state_dict().values()} == {device.type}
    with torch.no_grad():
        given, right = found(images(8).to(device)).cpu(), expected(images(8))
    scale = float(right.abs().max())
    assert float((given - right).abs().max()) < 0.05 * scale, "other outputs than on the CPU"


def converted(
    device: torch.device,
    plan: Callable[[nn.Module], Plan],
    calibration: groupify.Calibration | None = None,
    kind: type[Net] = Net,
) -> None:
    """Convert on the device as on the CPU, and compare."""
    here, there = make_net(kind), make_net(kind).to(device)
    expected = groupify.convert(here, plan(here), calibration)
    found = groupify.convert(there, plan(there), calibration)
    same(found.model, expected.model, device)


def calibration(**options: Any) -> groupify.Calibration:
    """Return images, on the CPU, and how to use them."""
    return groupify.Calibration(images(), **options)


def _conversion(structure: Structure) -> Callable[[torch.device], None]:
    def step(device: torch.device) -> None:
        fit = FitOptions(relu_iterations=1)
        converted(device, lambda net: plan_for(net, structure), calibration(fit=fit))

    return step


def _weights_only(structure: Structure) -> Callable[[torch.device], None]:
    def step(device: torch.device) -> None:
        converted(device, lambda net: plan_for(net, structure))

    return step


def plan_uniform(device: torch.device) -> None:
    """Plan with a number of groups, and convert with the graph that the plan has kept."""
    converted(device, lambda net: groupify.plan(net, SHAPE, groups=2, rules=_rules()), calibration())


def shuffled(device: torch.device) -> None:
    """Convert to grouped convs with a channel shuffle behind."""
    converted(device, lambda net: plan_for(net, STRUCTURES["grouped"], shuffle=True), calibration())


def by_norm(device: torch.device) -> None:
    """Convert on the dense inputs, channels clustered by their weights, the fit drawn to the dense blocks."""
    fit = FitOptions(keep_prior=True, in_order=False)
    converted(
        device, lambda net: plan_for(net, STRUCTURES["grouped"]), calibration(clustering="norm", fit=fit)
    )


def without_graph(device: torch.device) -> None:
    """Convert a model that cannot be captured, with images and without."""
    converted(device, lambda net: plan_for(net, STRUCTURES["grouped"]), calibration(), Wandering)
    converted(device, lambda net: plan_for(net, STRUCTURES["Tucker-2"]), kind=Wandering)


def reconstruction(device: torch.device) -> None:
    """Convert and train each block."""
    options = ReconstructionOptions(steps=2, batch_size=8)
    converted(device, lambda net: plan_for(net, STRUCTURES["grouped"]), calibration(reconstruction=options))


def _rules(*structures: str) -> groupify.Rules:
    return groupify.Rules(cpu="any", min_group_width=1, structures=structures or None)


def _budget(device: torch.device, classes: int | None, given: Images | None, rules: groupify.Rules) -> None:
    here, there = make_net(classes=classes), make_net(classes=classes).to(device)
    expected, found = (
        groupify.plan_for_budget(net, SHAPE, "macs=60%", given, rules=rules) for net in (here, there)
    )
    assert abs(found.winner.loss - expected.winner.loss) <= 0.05 * expected.winner.loss


def _given(labels: bool = False) -> Images:
    numbers = torch.randint(5, (8,), generator=torch.Generator().manual_seed(2))
    return Images(images(), images(8), numbers if labels else None)


def budget_from_weights(device: torch.device) -> None:
    """Plan for a budget without images."""
    _budget(device, 5, None, _rules("block-term"))


def budget_of_classes(device: torch.device) -> None:
    """Plan for a budget by Fisher information, and let plans compete."""
    _budget(device, 5, _given(), _rules("grouped", "grouped-pointwise"))


def budget_of_outputs(device: torch.device) -> None:
    """Plan for a budget by the outputs' relative error."""
    _budget(device, None, _given(), _rules("grouped", "grouped-pointwise"))


def images_that_are_there(device: torch.device) -> None:
    """Give images and labels that are on the device already."""
    net, given = make_net().to(device), _given(labels=True)
    assert given.labels is not None
    there = Images(given.fit.to(device), given.held_out.to(device), given.labels.to(device))
    assert there.labels is not None
    found = groupify.convert(net, plan_for(net, STRUCTURES["grouped"]), there.fit)
    measure_sensitivity(net, candidates(net, SHAPE, _rules("grouped")), there.fit)
    data = TensorDataset(there.held_out, there.labels)
    assert groupify.evaluate(net, data) == groupify.evaluate(make_net(), data)
    assert Judge(net, there.held_out, there.labels).judge(found.model).divergence > 0


def judging(device: torch.device) -> None:
    """Judge a model and measure accuracy."""
    net, other = make_net().to(device), make_net().to(device)
    with torch.no_grad():
        other.last.weight.mul_(0.5)
    given = _given(labels=True)
    found = Judge(net, given.held_out, given.labels).judge(other)
    assert found.divergence > 0
    assert found.drop is not None
    assert given.labels is not None
    data = TensorDataset(given.held_out, given.labels)
    assert groupify.evaluate(net, data) == groupify.evaluate(make_net(), data)


def finetuning(device: torch.device) -> None:
    """Train for an epoch with labels and a teacher, averaging the weights."""
    numbers = torch.randint(5, (16,), generator=torch.Generator().manual_seed(2))
    data = TensorDataset(images(), numbers)
    splits = DataSplits("test", data, data, 5, None, labelled=True)
    net = make_net().to(device)
    settings = groupify.FinetuneSettings(epochs=1, batch_size=8, ema_decay=0.5, distill="attention")
    tuned = groupify.finetune(net, splits, teacher=make_net().to(device), settings=settings)
    assert {tensor.device.type for tensor in tuned.model.state_dict().values()} == {device.type}


def exporting(device: torch.device) -> None:
    """Compress in one call, write the folder, and export to float32 and int8, checked."""
    given = images()
    result = groupify.compress(make_net().to(device), given, groups=2, rules=_rules())
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder, "out"))
        result.export(Path(folder, "net.onnx"))
        groupify.export_int8(result.model, Path(folder, "net.int8.onnx"), given.to(device))
    assert result.costs.compressed.macs < result.costs.dense.macs


STEPS: dict[str, Callable[[torch.device], None]] = {
    "plan": plan_uniform,
    **{f"convert to {name}": _conversion(structure) for name, structure in STRUCTURES.items()},
    **{
        f"convert to {name} from the weights": _weights_only(STRUCTURES[name])
        for name in ("grouped", "block-term")
    },
    "shuffle": shuffled,
    "cluster by norm": by_norm,
    "model without a graph": without_graph,
    "reconstruct": reconstruction,
    "budget from the weights": budget_from_weights,
    "budget of classes": budget_of_classes,
    "budget of outputs": budget_of_outputs,
    "images on the device": images_that_are_there,
    "judge and evaluate": judging,
    "finetune": finetuning,
    "compress, save and export": exporting,
}
