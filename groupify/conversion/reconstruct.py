"""Block reconstruction: a few Adam steps per block on what the dense model computes there, without labels.

The net is cut where a single tensor carries everything that follows (behind a residual block, say).
Each block with converted convs is trained to map what the student feeds it to what the teacher has
behind it, as BRECQ does for quantised blocks (Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang and Gu, 2021).
Training the whole net on the teacher's outputs afterwards, with the same images, brought nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from tqdm import tqdm

from groupify.devices import double
from groupify.graph.call import Call
from groupify.graph.execute import BatchedRun
from groupify.graph.model_graph import ModelGraph
from groupify.graph.operators import Effect, effect
from groupify.kept import KeptTensors, Shelf
from groupify.stats.positions import compact


@dataclass(frozen=True)
class ReconstructionOptions:
    """How blocks are reconstructed.

    Attributes:
        steps: Adam steps for each block; 0 = none.
        learning_rate: peak learning rate; a half cosine takes it to zero.
        batch_size: images per step.
    """

    steps: int = 0
    learning_rate: float = 1e-3
    batch_size: int = 64


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
        if node.users and not _is_there_anyway(node):
            waiting[node] = len(node.users)
            if list(waiting) == [node]:
                cuts.append(node)
    return cuts


def _is_there_anyway(node: fx.Node) -> bool:
    """Parameters, and sizes."""
    return node.op == "get_attr" or (node.op == "call_function" and effect(node) is Effect.SIZES)


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
    student: ModelGraph,
    teacher: ModelGraph,
    images: Tensor | Sequence[Call],
    sites: Iterable[str],
    options: ReconstructionOptions,
    *,
    seed: int = 0,
    shelf: Shelf | None = None,
    progress: bool = False,
) -> None:
    """Train the converted blocks of ``student`` in place, in order; batch norms keep their statistics.

    Args:
        student: graph of the converted model.
        teacher: the same graph over the dense model.
        images: unlabelled images, shape (N, C, H, W), or batches of them.
        sites: names of the converted convs.
        options: what to do.
        seed: seed of the order of the images.
        shelf: where activations wait; None = in memory.
        progress: show a bar on stderr.
    """
    generator = torch.Generator().manual_seed(seed)
    shelf = Shelf() if shelf is None else shelf
    batches = images
    if isinstance(batches, Tensor):
        batches = [Call((batch,)) for batch in batches.split(options.batch_size)]
    student_run, teacher_run = (BatchedRun(graph, batches, compact, shelf) for graph in (student, teacher))
    blocks = {block.start: block for block in find_blocks(student.graph, sites)}
    for block in blocks.values():
        student_run.pin(block.start)
        teacher_run.pin(block.end)
    nodes = list(student.graph.nodes)
    for node in tqdm(nodes, desc="reconstruct", disable=None if progress else True, leave=False):
        block_here = blocks.get(node)
        with torch.no_grad():
            student_run.run(node)
            for ahead in (node, *(block_here.nodes if block_here else ())):
                if not teacher_run.done(ahead):
                    teacher_run.run(ahead)
        if block_here is None:
            continue
        end = block_here.end
        inputs, targets = KeptTensors(shelf), KeptTensors(shelf)
        for batch in range(len(batches)):
            inputs.append(compact(student_run.value(node, batch)))
            targets.append(compact(teacher_run.value(end, batch)))
        student_run.release(node)
        teacher_run.release(end)
        _train_block(student, block_here, inputs, targets, options, generator)


def _train_block(
    student: ModelGraph,
    block: Block,
    inputs: KeptTensors,
    targets: KeptTensors,
    options: ReconstructionOptions,
    generator: torch.Generator,
) -> None:
    parameters = _parameters(student, block.nodes)
    scale = max(_variance(targets), 1e-12)
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    for step in range(options.steps):
        chosen = torch.randint(inputs.row_count, (options.batch_size,), generator=generator)
        _set_learning_rate(optimizer, options.learning_rate, step, options.steps)
        optimizer.zero_grad()
        output = _run_block(student, block, inputs.rows(chosen).float())
        loss = F.mse_loss(output, targets.rows(chosen).float()) / scale
        loss.backward()
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _variance(parts: KeptTensors) -> float:
    count, total, squares = 0, 0.0, 0.0
    for part in parts:
        values = double(part.float())
        count, total = count + values.numel(), total + float(values.sum())
        squares += float(values.square().sum())
    return (squares - total * total / count) / max(count - 1, 1)


def _run_block(student: ModelGraph, block: Block, inputs: Tensor) -> Any:
    run = BatchedRun(student, [Call((inputs,))])  # sizes are read from the input
    run.preset(block.start, [inputs])
    for node in run.requirements(block.end):
        run.run(node)
    return run.value(block.end, 0)


def _parameters(student: ModelGraph, nodes: Sequence[fx.Node]) -> list[nn.Parameter]:
    found: dict[int, nn.Parameter] = {}
    for node in nodes:
        tensors: Iterable[Tensor] = ()
        if node.op == "call_module":
            tensors = student.layer(node).parameters()
        elif node.op == "call_function":
            tensors = [student.tensor(str(s.target)) for s in node.all_input_nodes if s.op == "get_attr"]
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                found[id(tensor)] = tensor
    return list(found.values())


def _set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    rate = peak * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps))))
    for group in optimizer.param_groups:
        group["lr"] = rate
