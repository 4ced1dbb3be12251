"""Block reconstruction: a few Adam steps per block on what the dense model computes there, without labels.

The net is cut where a single tensor carries everything that follows (behind a residual block, say).
Each block with converted convs is trained to map what the student feeds it to what the teacher has
behind it, as BRECQ does for quantised blocks (Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang and Gu, 2021);
then the whole net is trained on the teacher's outputs (Hinton, Vinyals and Dean, 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from tqdm import tqdm

from groupify.conversion.sampling import compact
from groupify.graph.execute import BatchedRun

_POOL_BYTES = 400 * 2**20  # of images that wait for the training of the whole net
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class ReconstructionOptions:
    """How blocks are reconstructed.

    Attributes:
        steps: Adam steps for each block; 0 = none.
        network_steps: steps for the whole net on the teacher's outputs, after the blocks.
        learning_rate: peak learning rate of the blocks; a half cosine takes it to zero.
        network_learning_rate: the same for the whole net.
        batch_size: images per step.
        temperature: softens both distributions when the whole net is trained.
        views: augmented views of each image that the whole net is trained on, the image included.
        mix: whether views are mixed in pairs (mixup; Zhang, Cisse, Dauphin and Lopez-Paz, 2018).
    """

    steps: int = 0
    network_steps: int = 0
    learning_rate: float = 1e-3
    network_learning_rate: float = 3e-4
    batch_size: int = 64
    temperature: float = 2.0
    views: int = 8
    mix: bool = True


@dataclass(frozen=True)
class Block:
    """A part of the graph between two cuts: ``start`` is its input, ``end`` its output."""

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]


def cut_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes whose value alone carries everything that follows, in order."""
    waiting: dict[fx.Node, int] = {}
    cuts = []
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source in waiting:
                waiting[source] -= 1
                if waiting[source] == 0:
                    del waiting[source]
        if node.users and node.op != "get_attr":  # parameters are there anyway
            waiting[node] = len(node.users)
            if list(waiting) == [node]:
                cuts.append(node)
    return cuts


def find_blocks(graph: fx.Graph, sites: Iterable[str]) -> list[Block]:
    """Return the smallest blocks between cuts that hold converted convs, each up to the next one's start."""
    names, cuts, nodes = set(sites), cut_nodes(graph), list(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    with_sites = []
    for start, end in pairwise(cuts):
        inside = nodes[position[start] + 1 : position[end] + 1]
        if any(node.op == "call_module" and str(node.target) in names for node in inside):
            with_sites.append((start, end))
    blocks = []
    for index, (start, end) in enumerate(with_sites):
        # Take in the activation behind the block, which is what the next one sees.
        limit = with_sites[index + 1][0] if index + 1 < len(with_sites) else end
        while end is not limit and _is_pointwise_tail(end, limit, position):
            end = next(iter(end.users))
        blocks.append(Block(start, end, tuple(nodes[position[start] + 1 : position[end] + 1])))
    return blocks


def _is_pointwise_tail(end: fx.Node, limit: fx.Node, position: dict[fx.Node, int]) -> bool:
    return len(end.users) == 1 and position[next(iter(end.users))] <= position[limit]


def reconstruct(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    images: Tensor,
    sites: Iterable[str],
    options: ReconstructionOptions,
    *,
    augment: Augment | None = None,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Train the converted blocks of ``student`` in place; batch norms keep their statistics.

    Args:
        student: traced converted model.
        teacher: the traced dense model; the same graph.
        images: unlabelled images, shape (N, C, H, W).
        sites: names of the converted convs.
        options: what to do.
        augment: augmentation of a batch, for the whole net; the blocks fit the images themselves better.
        seed: seed of the order of the images and of the augmentation.
        progress: show a bar on stderr.
    """
    generator = torch.Generator().manual_seed(seed)
    student.eval()
    teacher.eval()
    if options.steps:
        _train_blocks(student, teacher, images, list(sites), options, generator, progress)
    if options.network_steps:
        _train_network(student, teacher, images, options, augment, generator, progress)


def _train_blocks(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    images: Tensor,
    sites: list[str],
    options: ReconstructionOptions,
    generator: torch.Generator,
    progress: bool,
) -> None:
    batches = images.split(options.batch_size)
    runs = BatchedRun(student, batches, compact), BatchedRun(teacher, batches, compact)
    twins = {node.name: node for node in teacher.graph.nodes}
    blocks = {block.start: block for block in find_blocks(student.graph, sites)}
    order = list(student.graph.nodes)
    ends = {block.end for block in blocks.values()}
    for node in blocks:
        runs[0].pin(node)
    for node in ends:
        runs[1].pin(twins[node.name])
    for node in tqdm(order, desc="reconstruct", disable=None if progress else True, leave=False):
        with torch.no_grad():
            if not runs[1].done(twins[node.name]):
                runs[1].run(twins[node.name])
            runs[0].run(node)
        block = blocks.get(node)
        if block is None:
            continue
        with torch.no_grad():
            for later in block.nodes:
                if not runs[1].done(twins[later.name]):
                    runs[1].run(twins[later.name])
        inputs = torch.cat([compact(runs[0].value(node, b)) for b in range(len(batches))])
        targets = torch.cat([compact(runs[1].value(twins[block.end.name], b)) for b in range(len(batches))])
        _train_block(student, block, inputs, targets, options, generator)
        runs[0].release(node)
        runs[1].release(twins[block.end.name])


def _train_block(
    student: fx.GraphModule,
    block: Block,
    inputs: Tensor,
    targets: Tensor,
    options: ReconstructionOptions,
    generator: torch.Generator,
) -> None:
    parameters = _parameters(student, block.nodes)
    scale = targets.float().var().clamp(min=1e-12)
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    for step in range(options.steps):
        chosen = torch.randint(len(inputs), (options.batch_size,), generator=generator)
        _set_learning_rate(optimizer, options.learning_rate, step, options.steps)
        optimizer.zero_grad()
        output = _run_block(student, block, inputs[chosen].float())
        loss = F.mse_loss(output, targets[chosen].float()) / scale
        loss.backward()
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _run_block(student: fx.GraphModule, block: Block, inputs: Tensor) -> Any:
    run = BatchedRun(student, [inputs])
    run.preset(block.start, [inputs])
    for node in run.requirements(block.end):
        run.run(node)
    return run.value(block.end, 0)


def _train_network(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    images: Tensor,
    options: ReconstructionOptions,
    augment: Augment | None,
    generator: torch.Generator,
    progress: bool,
) -> None:
    pool = _views(images, options, augment, generator)
    with torch.no_grad():
        batches = pool.split(options.batch_size)
        answers = [teacher(batch.contiguous(memory_format=torch.channels_last)) for batch in batches]
    targets = torch.utils._pytree.tree_map(lambda *parts: torch.cat(parts), *answers)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=options.network_learning_rate)
    order = torch.randperm(len(pool), generator=generator)
    steps = range(options.network_steps)
    for step in tqdm(steps, desc="reconstruct net", disable=None if progress else True, leave=False):
        start = step * options.batch_size % len(pool)
        if start + options.batch_size > len(pool):
            start = 0
        if start == 0:
            order = torch.randperm(len(pool), generator=generator)
        chosen = order[start : start + options.batch_size]
        batch = pool[chosen].contiguous(memory_format=torch.channels_last)
        target = torch.utils._pytree.tree_map(lambda value, chosen=chosen: value[chosen], targets)
        _set_learning_rate(optimizer, options.network_learning_rate, step, options.network_steps)
        optimizer.zero_grad()
        loss = _output_loss(student(batch), target, options.temperature)
        loss.backward()
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _views(
    images: Tensor, options: ReconstructionOptions, augment: Augment | None, generator: torch.Generator
) -> Tensor:
    """The images, augmented views of them, and mixtures of two of those; the teacher labels them all."""
    per_image = images[0].numel() * images.element_size()
    views = max(1, min(options.views, _POOL_BYTES // (per_image * len(images))))
    pool = [images]
    for _ in range(views - 1):
        view = images if augment is None else augment(images, generator)
        if options.mix:
            other = view[torch.randperm(len(view), generator=generator)]
            share = torch.rand((len(view), 1, 1, 1), generator=generator) * 0.5
            view = (1 - share) * view + share * other
        pool.append(view)
    return torch.cat(pool)


def _output_loss(output: Any, target: Any, temperature: float) -> Tensor:
    if isinstance(output, dict):
        losses = [_output_loss(output[key], target[key], temperature) for key in output]
        return torch.stack(losses).sum()
    if isinstance(output, (tuple, list)):
        losses = [_output_loss(a, b, temperature) for a, b in zip(output, target, strict=True)]
        return torch.stack(losses).sum()
    expected = F.log_softmax(target / temperature, 1)
    actual = F.log_softmax(output / temperature, 1)
    return F.kl_div(actual, expected, log_target=True, reduction="none").sum(1).mean() * temperature**2


def _parameters(student: nn.Module, nodes: Sequence[fx.Node]) -> list[nn.Parameter]:
    found: dict[int, nn.Parameter] = {}
    for node in nodes:
        if node.op == "call_module":
            for parameter in student.get_submodule(str(node.target)).parameters():
                if parameter.requires_grad:
                    found[id(parameter)] = parameter
    return list(found.values())


def _set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    rate = peak * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps))))
    for group in optimizer.param_groups:
        group["lr"] = rate
