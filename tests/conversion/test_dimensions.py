"""Conv1d and Conv3d are planned, converted, saved and exported like Conv2d."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groupify
from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.site_fit import FitOptions
from groupify.models.specs import ModelSpec, WeightsOrigin
from groupify.onnx.exporting import export_onnx
from groupify.onnx.parity import check_parity
from groupify.planning.sites import describe
from groupify.structures import SiteRecipe, Structure
from tests.conversion.nets import images, make_block_diagonal, randomise, relative_error

EXACT = FitOptions(ridge=1e-9, refit_ridge=1e-9)
SHAPES = {1: (3, 24), 3: (3, 4, 6, 6)}


class Net(nn.Module):
    """The same residual net in one, two or three dimensions."""

    def __init__(self, dims: int, channels: int = 16) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.stem = conv(3, channels, 3, padding=1)
        self.conv1 = conv(channels, channels, 3, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = conv(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = conv(channels, 2 * channels, 3, stride=2, padding=1)
        self.fc = nn.Linear(2 * channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)
        result: Tensor = self.fc(torch.relu(self.conv3(x)).flatten(2).mean(2))
        return result


@pytest.mark.parametrize(
    ("dims", "family", "shuffle"),
    [(1, "grouped", True), (3, "grouped", True), (3, "grouped-pointwise", False)],
)
def test_plan_convert_save_load_export(dims: int, family: str, shuffle: bool, tmp_path: Path) -> None:
    net, shape = randomise(Net(dims)).eval(), SHAPES[dims]
    rules = groupify.Rules(min_group_width=1, structures=family, shuffle="all" if shuffle else "none")
    found = groupify.plan(net, shape, groups=4, rules=rules)
    assert [site.name for site in found.converted] == ["conv1", "conv2", "conv3"]
    site = found.sites[1]
    assert site.output_size == shape[1:]
    assert site.macs.dense == 16 * 16 * 3**dims * torch.Size(shape[1:]).numel()
    x = images(24, shape, seed=1)
    result = convert(net, found, images(64, shape))
    truncated = convert(net, found)
    assert relative_error(result.model, net, x) < 0.5 * relative_error(truncated.model, net, x)
    spec = ModelSpec("tests.conversion.test_dimensions:Net", {"dims": dims}, shape, None)
    recipe = groupify.Recipe(spec, WeightsOrigin("random", 0), found.recipes)
    groupify.save(tmp_path / "folder", result.model, recipe)
    again = groupify.load(tmp_path / "folder", trust=True)
    with torch.no_grad():
        assert torch.equal(again(x), result.model.eval()(x))
    exported = export_onnx(again, tmp_path / "net.onnx", input_shape=shape)
    assert check_parity(again, exported.path, input_shape=shape).max_rel_diff < 5e-4


@pytest.mark.parametrize("dims", [1, 3])
def test_a_net_that_is_grouped_already_is_recovered(dims: int) -> None:
    net, shape = randomise(Net(dims)).eval(), SHAPES[dims]
    for conv in (net.conv1, net.conv2):
        make_block_diagonal(conv, 4)
    plan = describe(net, [SiteRecipe(name, Structure(groups=4)) for name in ("conv1", "conv2")], shape, "any")
    result = convert(net, plan, Calibration(images(64, shape), fit=EXACT))
    assert max(fit.error for fit in result.fits) < 1e-3
    assert relative_error(result.model, net, images(seed=1, shape=shape)) < 1e-3
