"""What a student learns from: labels, its teacher's logits, and where its teacher's layers respond."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groupify.errors import SpecError
from groupify.graph.call import Call
from groupify.graph.forward import evaluating
from groupify.tasks import class_scores
from groupify.training.settings import FinetuneSettings


class Objective:
    """The loss of a batch, with what the teacher says about it.

    Args:
        model: the student, unwrapped.
        teacher: in eval mode; None = cross-entropy only.
        settings: the loss and the precision.
        example: a call of the model, to find the layers whose attention is compared.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, settings: FinetuneSettings, example: Call
    ) -> None:
        self.settings = settings
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
            labels: shape (N,); None = distil only.
        """
        device = call.tensors[0].device
        with (
            autocast(device, self.settings),
            features(self.teacher, self.layers) as theirs,
            features(self.student, self.layers) as ours,
        ):
            teacher_logits = self._teacher_logits(call, labels)
            logits = class_scores(call.apply(model))
            loss = recovery_loss(logits, labels, teacher_logits, self.settings)
            if self.layers:
                attention = attention_loss(
                    [ours[name] for name in self.layers],
                    [_usable_in_training(theirs[name].to(device)) for name in self.layers],
                )
                loss = loss + self.settings.attention_weight * attention
        if labels is None:
            assert teacher_logits is not None
            labels = teacher_logits.argmax(1)
        return loss, (logits.detach().argmax(1) == labels).sum()

    def _teacher_logits(self, call: Call, labels: Tensor | None) -> Tensor | None:
        """None where nothing of the loss needs them."""
        needed = labels is None or self.settings.distillation_weight > 0 or self.layers
        if self.teacher is None or not needed:
            return None
        with torch.no_grad():
            logits = class_scores(as_input(call, self.teacher).apply(self.teacher))
            logits = logits.to(call.tensors[0].device)
        return _usable_in_training(logits)


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
    logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None, settings: FinetuneSettings
) -> Tensor:
    """Return the weighted sum of cross-entropy and distillation; whichever is absent has no weight.

    Args:
        logits: the student's, shape (N, classes).
        labels: class numbers, shape (N,); None = distil only.
        teacher_logits: shape (N, classes); None = cross-entropy only.
        settings: weights, temperature and label smoothing.
    """
    weight = 1.0 if labels is None else settings.distillation_weight
    if teacher_logits is None:
        weight = 0.0
    loss = torch.zeros((), device=logits.device)
    if teacher_logits is not None and weight > 0:
        loss = loss + weight * distillation_loss(logits, teacher_logits, settings.temperature)
    if labels is not None and weight < 1:
        entropy = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
        loss = loss + (1 - weight) * entropy
    return loss


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
