"""How much a model's outputs mind errors of a conv's outputs.

To second order an error e of the conv's outputs changes what the model gives by ½ eᵀ F e with the mean
``F = E[g gᵀ]`` of gradients g at that place. For class scores that is the Fisher information, and the change
one of the KL divergence; for other outputs it is the Gauss-Newton matrix of their relative squared error. A
batch norm's scale is only its diagonal, and knows nothing of what comes behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from groupify.devices import double
from groupify.graph.call import Call
from groupify.graph.forward import output_tensors
from groupify.tasks import AUTO, CLASSES, class_scores, task_of

# Means of more images are hardly better, and cost a backward pass each.
_IMAGES = 256
# All activations of so many images are kept for the backward pass.
_BATCH = 8


class OutputGradients:
    """Sums ``g gᵀ`` of the gradients at the outputs of convs, over images and positions.

    Attributes:
        sums: by name, shape (O, O).
        cut: the first layer whose outputs get no gradient; None = all do.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.cut: str | None = None

    def watch(self, name: str, output: Tensor) -> None:
        """Count what comes back to an output of a layer."""
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(name, gradient))
        else:
            self.cut = self.cut or name

    def _add(self, name: str, gradient: Tensor) -> None:
        flat = gradient.transpose(0, 1).flatten(1)  # (O, N·H·W)
        product = double(flat @ flat.T)
        self.sums[name] = self.sums[name] + product if name in self.sums else product


def output_metrics(
    model: nn.Module, calls: Sequence[Call], names: Sequence[str], *, task: str = AUTO, seed: int = 0
) -> dict[str, Tensor]:
    """Return F for each conv, shape (O, O), with a mean of 1 on its diagonal.

    Args:
        model: the dense model, in evaluation mode; left untouched.
        calls: what it is called with; the first 256 images tell enough.
        names: the convs.
        task: what the model is for, see ``groupify.tasks``.
        seed: of the random signs that stand for all directions of the outputs.

    Returns:
        Without those convs to which nothing comes back, or nothing but zeros, NaN or infinity.

    Raises:
        RuntimeError: PyTorch cannot differentiate the model.
    """
    gradients, generator = OutputGradients(), torch.Generator().manual_seed(seed)
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: gradients.watch(name, output)
        )
        for name in names
    ]
    try:
        for call in _first(calls):
            _run(model, call, task, generator)
    finally:
        for handle in handles:
            handle.remove()
    means = {name: total / total.diagonal().mean() for name, total in gradients.sums.items()}
    return {name: mean for name, mean in means.items() if bool(mean.isfinite().all())}


def score_directions(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``L ε`` for each image: random with covariance ``diag(p) − p pᵀ``, shaped like the scores."""
    chances = scores.float().softmax(1)
    signs = _signs(scores, generator).to(chances)
    steps = chances.sqrt() * signs
    return (steps - chances * steps.sum(1, keepdim=True)).to(scores.dtype)


def leaf(tensor: Tensor) -> Tensor:
    """Return a tensor to which gradients go, and which a model may change in place."""
    return tensor.detach().requires_grad_().clone()


def _first(calls: Sequence[Call]) -> Iterator[Call]:
    left = _IMAGES
    for call in calls:
        yield from call.head(left).split(math.ceil(min(left, call.batch_size) / _BATCH))
        left -= call.batch_size
        if left <= 0:
            return


def _run(model: nn.Module, call: Call, task: str, generator: torch.Generator) -> None:
    """Run forward, and backward from random directions of the outputs."""
    with torch.enable_grad():
        # A leaf that needs gradients makes all that depends on it have one; the weights need none.
        leaves = call.floats(leaf)
        value = leaves.apply(model)
        found = _directions(value, task, generator)
        outputs = [(output, direction) for output, direction in found if output.requires_grad]
        if outputs:
            wanted = [tensor for tensor in leaves.tensors if tensor.requires_grad]
            torch.autograd.grad(
                [output for output, _ in outputs], wanted, [direction for _, direction in outputs],
                allow_unused=True,
            )  # fmt: skip


def _directions(value: Any, task: str, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """The outputs that count, each with a random direction of the covariance that its errors weigh by."""
    if task_of(value, task) == CLASSES:
        scores = class_scores(value)
        return [(scores, score_directions(scores.detach(), generator))]
    outputs = [output for output in output_tensors(value) if output.is_floating_point()]
    return [(output, _signs(output, generator) / _size(output)) for output in outputs]


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


def _size(output: Tensor) -> Tensor:
    """Root of the energy of an output, so that errors count relatively."""
    return output.detach().float().square().sum().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
