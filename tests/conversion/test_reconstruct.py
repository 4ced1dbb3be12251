from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.reconstruct import ReconstructionOptions, cut_nodes, find_blocks, reconstruct
from groupify.conversion.surgery import restructure
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.model_graph import ModelGraph
from groupify.structures import SiteRecipe, Structure
from tests.conversion.nets import SHAPE, Residual, images, plan_of, randomise, relative_error

SITES = ("conv1", "conv2", "conv3")


def graph_of(model: nn.Module, shape: tuple[int, ...] = (3, 64, 64)) -> ModelGraph:
    captured = capture(model.eval(), Call((torch.zeros(2, *shape),)))
    assert captured.graph is not None, captured.problem
    return captured.graph


def place(node: fx.Node) -> str:
    """Name of the module that made a node."""
    stack = node.meta.get("nn_module_stack") or {"": ("",)}
    return str(list(stack.values())[-1][0]).removeprefix("model.")


def test_resnet_is_cut_behind_its_blocks() -> None:
    graph = graph_of(torchvision.models.resnet18(weights=None)).graph
    sites = [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)]
    blocks = find_blocks(graph, sites)
    assert [[str(n.target) for n in b.nodes if str(n.target) in sites] for b in blocks] == [
        sites[i : i + 2] for i in range(0, 16, 2)
    ]
    for block, following in pairwise(blocks):
        assert block.end is following.start  # the activation behind a block belongs to it
        assert "relu" in block.end.name


def test_vgg_is_cut_behind_each_layer() -> None:
    graph = graph_of(torchvision.models.vgg11(weights=None)).graph
    cuts = {node.name for node in cut_nodes(graph)}
    assert {
        node.name
        for node in graph.nodes
        if node.users and node.op != "get_attr" and "sym_size" not in node.name
    } == cuts
    sites = ["features.3", "features.6"]
    blocks = find_blocks(graph, sites)
    assert [(place(b.start), str(b.nodes[0].target)) for b in blocks] == [
        ("features.2", "features.3"),
        ("features.5", "features.6"),
    ]


def test_densenet_is_cut_at_its_transitions() -> None:
    graph = graph_of(torchvision.models.DenseNet(8, (2, 12, 2, 2), 16)).graph
    inside = [place(n) for n in cut_nodes(graph) if "denselayer" in place(n)]
    # Within a dense block every layer reads all before it; only the first norm stands alone.
    assert not [name for name in inside if "denselayer1." not in name]
    blocks = find_blocks(graph, ["features.denseblock2.denselayer3.conv2"])
    (only,) = blocks
    held = {str(node.target) for node in only.nodes}
    assert {f"features.denseblock2.denselayer{i}.conv2" for i in range(2, 13)} <= held


def pair(seed: int = 0) -> tuple[ModelGraph, ModelGraph]:
    net = randomise(Residual(), seed).eval()
    student = restructure(net, [SiteRecipe(name, Structure(groups=4)) for name in SITES])
    traced = graph_of(net, SHAPE)
    return traced.on(student), traced


def trained(steps: int, seed: int) -> tuple[ModelGraph, ModelGraph]:
    student, teacher = pair()
    options = ReconstructionOptions(steps=steps, batch_size=16)
    reconstruct(student, teacher, images(64), SITES, options, seed=seed)
    return student, teacher


def test_the_error_goes_down_and_the_teacher_stays() -> None:
    untrained, teacher = pair()
    before = copy.deepcopy(teacher.model.state_dict())
    student, teacher = trained(60, seed=0)
    x = images(64, seed=1)
    assert relative_error(student.model, teacher.model, x) < 0.7 * relative_error(
        untrained.model, teacher.model, x
    )
    assert all(torch.equal(before[key], value) for key, value in teacher.model.state_dict().items())
    for key, value in untrained.model.state_dict().items():
        if "running" in key:
            assert torch.equal(student.model.state_dict()[key], value)
    assert all(p.grad is None for p in (*student.model.parameters(), *teacher.model.parameters()))


def test_the_seed_decides() -> None:
    one, two, other = (trained(5, seed)[0].model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_frozen_parameters_stay() -> None:
    student, teacher = pair()
    frozen = student.model.get_parameter("conv1.weight")
    frozen.requires_grad_(False)
    before: Tensor = frozen.clone()
    reconstruct(student, teacher, images(32), SITES, ReconstructionOptions(steps=5, batch_size=16))
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("steps", [0, 100])
def test_as_an_option_of_convert(steps: int) -> None:
    net = randomise(Residual()).eval()
    options = ReconstructionOptions(steps=steps, batch_size=16)
    result = convert(net, plan_of(net, *SITES), Calibration(images(64), reconstruction=options))
    assert ("reconstruction" in result.method) == (steps > 0)
    assert ("reconstruction" in result.seconds) == (steps > 0)
