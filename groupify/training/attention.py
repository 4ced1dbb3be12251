"""The features of a student and its teacher whose attention maps are compared."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from groupify.errors import SpecError
from groupify.scores.accuracy import evaluating


def attention_layers(teacher: nn.Module, student: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Return the modules at the end of each stage: the last ones before the image gets smaller.

    Args:
        teacher: the dense model.
        student: the converted one; modules that it has under another name are left out.
        example: images of shape (N, C, H, W), on the teacher's device.

    Raises:
        SpecError: no module of both gives images.
    """
    shared = {name for name, _ in student.named_modules() if name}
    last: dict[tuple[int, ...], str] = {}
    hooks = []
    for name, module in teacher.named_modules():
        if name not in shared:
            continue

        def note(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
                last[tuple(output.shape[2:])] = name

        hooks.append(module.register_forward_hook(note))
    try:
        with evaluating(teacher), torch.no_grad():
            teacher(example)
    finally:
        for hook in hooks:
            hook.remove()
    if not last:
        raise SpecError(
            "no layer gives images whose attention could be compared: distil the logits (distill 'logits')"
        )
    return tuple(last.values())


class Features:
    """Keeps what some modules of a model gave in its last forward pass; a context manager.

    Args:
        model: unwrapped.
        layers: qualified module names.
    """

    def __init__(self, model: nn.Module, layers: tuple[str, ...]) -> None:
        self._model = model
        self._layers = layers
        self._values: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def values(self) -> list[Tensor]:
        """The features of each layer, shape (N, C, H, W)."""
        return [self._values[name] for name in self._layers]

    def __enter__(self) -> Features:
        for name in self._layers:

            def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                self._values[name] = output

            self._hooks.append(self._model.get_submodule(name).register_forward_hook(keep))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._values.clear()
