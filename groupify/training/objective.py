"""What a student learns from: labels, its teacher's outputs, and where its teacher's layers respond."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from groupify.errors import SpecError
from groupify.graph.call import Call
from groupify.graph.forward import evaluating
from groupify.tasks import CLASSES, class_scores
from groupify.training.goal import Goal
from groupify.training.output_errors import float_outputs, relative_errors
from groupify.training.settings import FinetuneSettings


class Objective:
    """The loss of a batch, with what the teacher says about it.

    Args:
        model: the student, unwrapped.
        teacher: in eval mode; None = cross-entropy only.
        settings: the weights of the losses and the precision.
        example: a call of the model, to find the layers whose attention is compared.
        goal: what the outputs are, and the loss by labels.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        settings: FinetuneSettings,
        example: Call,
        goal: Goal = Goal(),
    ) -> None:
        self.settings, self.goal = settings, goal
        self.student = model
        self.teacher = None if settings.distill == "none" else teacher
        self.layers: tuple[str, ...] = ()
        if settings.distill == "attention" and teacher is not None:
            self.layers = attention_layers(teacher, model, as_input(example, teacher))

    def __call__(self, model: nn.Module, call: Call, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss and how many images the model classifies as the labels, or the teacher, do.

        Args:
            model: in train mode, also wrapped for data parallelism.
            call: what it is called with, on its device.
            labels: shape (N, …), on its device; None = distil only.
        """
        device = call.tensors[0].device
        with (
            autocast(device, self.settings),
            features(self.teacher, self.layers) as theirs,
            features(self.student, self.layers) as ours,
        ):
            taught = self._of_teacher(call, labels)
            outputs = call.apply(model)
            loss = recovery_loss(outputs, labels, taught, self.settings, self.goal)
            if self.layers:
                attention = attention_loss(
                    [ours[name] for name in self.layers],
                    [_usable_in_training(theirs[name].to(device)) for name in self.layers],
                )
                loss = loss + self.settings.attention_weight * attention
            right = self._right(outputs, labels, taught)
        return loss, torch.zeros((), device=device) if right is None else right.sum()

    def _right(self, outputs: Any, labels: Tensor | None, theirs: Any) -> Tensor | None:
        if self.goal.task != CLASSES:
            return None
        return self.goal.right(outputs, theirs.argmax(1) if labels is None else labels)

    def _of_teacher(self, call: Call, labels: Tensor | None) -> Any:
        """Return what of the teacher's outputs is compared; None where nothing of the loss needs it."""
        needed = labels is None or self.settings.distillation_weight > 0 or self.layers
        if self.teacher is None or not needed:
            return None
        device = call.tensors[0].device
        with torch.no_grad():
            found = self.goal.compared(as_input(call, self.teacher).apply(self.teacher))
            return pytree.tree_map_only(Tensor, lambda x: _usable_in_training(x.to(device)), found)


def _usable_in_training(values: Tensor) -> Tensor:
    """A teacher whose forward runs in inference mode gives tensors that autograd refuses to keep."""
    return values.clone() if values.is_inference() else values


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the batch.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015); the factor T²
    keeps the size of the gradients when the temperature changes.

    Args:
        logits: the student's, shape (N, classes).
        teacher_logits: shape (N, classes).
        temperature: T > 0.
    """
    student = F.log_softmax(logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the squared distance of the attention maps, averaged over batch and layers.

    The attention map of a layer is the mean of its squared channels, scaled to length 1: where in the
    image it responds, whatever the order and number of its channels. Zagoruyko and Komodakis, "Paying
    More Attention to Attention" (2017).

    Args:
        student: features of some layers, each of shape (N, C, H, W).
        teacher: features of the same layers, each of shape (N, C', H, W).
    """

    def attention(layer: Tensor) -> Tensor:
        return F.normalize(layer.float().square().mean(1).flatten(1), dim=1)

    distances = [
        (attention(ours) - attention(theirs)).square().sum(1).mean()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(distances).mean()


def recovery_loss(
    outputs: Any, labels: Tensor | None, theirs: Any, settings: FinetuneSettings, goal: Goal = Goal()
) -> Tensor:
    """Return the weighted sum of the loss by labels and distillation; whichever is absent has no weight.

    Args:
        outputs: the student's.
        labels: shape (N, …); None = distil only.
        theirs: what of the teacher's outputs is compared; None = labels only.
        settings: weights, temperature and label smoothing.
        goal: what the outputs are, and the loss by labels.
    """
    weight = 1.0 if labels is None else settings.distillation_weight
    if theirs is None:
        weight = 0.0
    losses: list[Tensor] = []
    if weight > 0:
        losses.append(weight * _distilled(outputs, theirs, settings, goal))
    if labels is not None and weight < 1:
        losses.append((1 - weight) * goal.supervised(outputs, labels, settings.label_smoothing))
    return sum(losses[1:], losses[0])


def _distilled(outputs: Any, theirs: Any, settings: FinetuneSettings, goal: Goal) -> Tensor:
    if goal.task == CLASSES:
        return distillation_loss(class_scores(outputs), theirs, settings.temperature)
    return relative_errors(float_outputs(outputs), theirs, goal.variances).mean()


def attention_layers(teacher: nn.Module, student: nn.Module, example: Call | Tensor) -> tuple[str, ...]:
    """Return the modules at the end of each stage: the last ones before the image gets smaller.

    Args:
        teacher: the dense model.
        student: the converted one; modules that it has under another name are left out.
        example: images of shape (N, C, H, W), or what the teacher is called with, on its device.

    Raises:
        SpecError: no module of both gives images.
    """
    of_student = {name for name, _ in student.named_modules() if name}
    last: dict[tuple[int, ...], str] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
            last[tuple(output.shape[2:])] = name

    shared = [name for name, _ in teacher.named_modules() if name in of_student]
    with _watched(teacher, shared, note), evaluating(teacher), torch.no_grad():
        Call.of(example).apply(teacher)
    if not last:
        raise SpecError(
            "no layer gives images whose attention could be compared: distil the logits (distill 'logits')"
        )
    return tuple(last.values())


@contextlib.contextmanager
def features(model: nn.Module | None, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Give what modules of an unwrapped model put out in its last forward pass, (N, C, H, W), by name."""
    values: dict[str, Tensor] = {}
    if model is None:
        yield values
        return
    with _watched(model, layers, values.__setitem__):
        yield values


@contextlib.contextmanager
def _watched(model: nn.Module, layers: Iterable[str], note: Callable[[str, Any], None]) -> Iterator[None]:
    """Call ``note`` with the name and the output of each of the layers when it has run."""

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        return model.get_submodule(name).register_forward_hook(lambda _, __, output: note(name, output))

    hooks = [watch(name) for name in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_input(call: Call, model: nn.Module, settings: FinetuneSettings | None = None) -> Call:
    """Return a call on the device, in the precision and the memory format of ``model``."""
    parameter = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    last = settings is not None and settings.channels_last

    def fitting(tensor: Tensor) -> Tensor:
        if parameter is not None:
            dtype = parameter.dtype if tensor.is_floating_point() else tensor.dtype
            tensor = tensor.to(parameter.device, dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if last and tensor.dim() == 4 else tensor

    return call.map(fitting)


def autocast(device: torch.device, settings: FinetuneSettings) -> contextlib.AbstractContextManager[object]:
    """Return the context of mixed precision, if the settings ask for it."""
    if settings.amp is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
